"""What the README says, against the code that it says it of."""

import pathlib
import re

import pytest

from jaxpo import catalogue, cli, mixture_catalogue
from jaxpo.losses import priors

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


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
