"""What the README says, against the code that it says it of."""

import pathlib
import re

import pytest

from jaxpo import catalogue, cli
from jaxpo.losses import priors

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


@pytest.mark.parametrize('table', [catalogue.markdown_table, priors.unification_table])
def test_the_tables_of_losses_and_priors_are_the_registries(table):
    assert table() in README, '`jaxpo losses --markdown` prints what the README should hold.'


def test_every_command_is_in_the_readme():
    assert all(f'jaxpo {name} EXPERIMENT' in README for name in cli.COMMANDS)
    assert all(f'jaxpo {name} {tool.usage}' in README for name, tool in cli.TOOLS.items())


def test_every_module_is_in_the_file_tree():
    tree = README.split('```\njaxpo/\n')[1].split('```')[0]
    package = pathlib.Path(cli.__file__).parent
    rooms = {path.name for path in package.iterdir() if path.suffix == '.py' and not path.name.startswith('__')}
    assert set(re.findall(r'\w+\.py', tree)) == rooms
