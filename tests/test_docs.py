"""What the README says, against the code that it says it of."""

import pathlib
import re

import pytest

from jaxpo import catalogue, cli, mixture_catalogue
from jaxpo.losses import priors

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / 'README.md').read_text()
PAGES = sorted(ROOT.glob('*.md')) + [
    page for folder in ('benchmarks', 'experiments', 'tpu_setup') for page in sorted((ROOT / folder).rglob('*.md'))
]


@pytest.mark.parametrize(
    'table',
    [
        catalogue.markdown_table,
        priors.unification_table,
        lambda: mixture_catalogue.markdown_tables().split('\n\n')[0],
        lambda: mixture_catalogue.markdown_tables().split('\n\n')[1].rstrip(),
    ],
    ids=['losses', 'priors', 'weightings', 'mixes'],
)
def test_the_tables_of_registries_are_theirs(table):
    assert table() in README, '`jaxpo losses --markdown` and `jaxpo mixtures --markdown` print what it should hold.'


def test_every_command_is_in_the_readme():
    assert all(f'jaxpo {name} EXPERIMENT' in README for name in cli.COMMANDS | cli.PLANNERS)
    assert all(f'jaxpo {name} {tool.usage}' in README for name, tool in cli.TOOLS.items())


def test_every_module_is_in_the_file_tree():
    tree = README.split('```\njaxpo/\n')[1].split('```')[0]
    package = pathlib.Path(cli.__file__).parent
    rooms = {path.name for path in package.iterdir() if path.suffix == '.py' and not path.name.startswith('__')}
    assert set(re.findall(r'\w+\.py', tree)) == rooms


@pytest.mark.parametrize('file', PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for target, anchor in re.findall(r'\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)', file.read_text()):
        linked = file.parent / target if target else file
        assert linked.exists(), f'{target} is not there'
        if anchor:
            assert anchor in anchors(linked), f'{target}#{anchor} is no heading'


def anchors(file):
    """The names that a page's headings get: lower case, words joined by hyphens."""
    headings = re.findall(r'^#+ (.*)$', file.read_text(), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}
