"""What the README says, against the code that it says it of."""

import pathlib
import re

from jaxpo import cli, losses

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()


def losses_table():
    """The README's table of losses, from the registry."""
    lines = ['| loss | what it is | source | defaults |', '|---|---|---|---|']
    for name, entry in sorted(losses.LOSSES.items()):
        defaults = ', '.join(f'{key} {value}' for key, value in entry.defaults.items())
        lines.append(f'| `{name}` | {entry.summary} | {entry.source} | {defaults} |')
    return '\n'.join(lines)


def test_the_table_of_losses_is_the_registry():
    assert losses_table() in README, f'The README should hold:\n\n{losses_table()}'


def test_every_command_is_in_the_readme():
    assert all(f'jaxpo {name} EXPERIMENT' in README for name in cli.COMMANDS)


def test_every_module_is_in_the_file_tree():
    tree = README.split('```\njaxpo/\n')[1].split('```')[0]
    package = pathlib.Path(cli.__file__).parent
    rooms = {path.name for path in package.iterdir() if path.suffix == '.py' and not path.name.startswith('__')}
    assert set(re.findall(r'\w+\.py', tree)) == rooms
