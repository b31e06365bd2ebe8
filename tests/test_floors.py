"""Imports point down: a module imports only floors below its own, or its own package."""

import ast
import pathlib

import pytest

import jaxpo

ROOT = pathlib.Path(jaxpo.__file__).parent
FLOORS = {
    'errors': 0,
    'types': 0,
    'config': 0,
    'models': 1,
    'data': 1,
    'sharding': 1,
    'logps': 1,
    'losses': 2,
    'references': 3,
    'specification': 4,
    'pair_metrics': 4,
    'objective': 5,
    'state': 5,
    'sampling': 4,
    'checkpoint': 6,
    'console': 6,
    'experiment': 6,
    'metrics': 6,
    'settings': 6,
    'completions': 6,
    'scoring': 7,
    'step': 8,
    'catalogue': 7,
    'mixture_catalogue': 7,
    'provenance': 7,
    'run': 9,
    'loading': 10,
    'tabulate': 11,
    'weighing': 10,
    'evaluate': 10,
    'report': 12,
    'commands': 13,
    'train': 13,
    'cli': 14,
    '__main__': 15,
}
MODULES = sorted(path for path in ROOT.rglob('*.py') if path != ROOT / '__init__.py')


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix('.py')


def imported(path):
    """The rooms of jaxpo that a module imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == 'jaxpo':
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('jaxpo.'):
            yield node.module.split('.')[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split('.')[1] for alias in node.names if alias.name.startswith('jaxpo.'))


def test_every_room_has_a_floor():
    assert {room(path) for path in MODULES} == set(FLOORS)


@pytest.mark.parametrize('path', MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    for other in imported(path):
        assert other == room(path) or FLOORS[other] < FLOORS[room(path)], f'{path.name} imports {other}'


@pytest.mark.parametrize('word', ['pickle.', 'import pickle', 'trust_remote_code=True', 'allow_pickle=True'])
def test_nothing_is_unpickled_and_no_remote_code_is_run(word):
    assert not [path for path in MODULES if word in path.read_text()]
