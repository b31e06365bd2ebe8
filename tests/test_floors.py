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
    'failures': 1,
    'processes': 2,
    'roll_call': 3,
    'health': 4,
    'rings': 1,
    'sharding': 1,
    'storage': 1,
    'vocabulary': 1,
    'models': 2,
    'data': 2,
    'logps': 2,
    'losses': 3,
    'references': 4,
    'specification': 5,
    'pair_metrics': 5,
    'objective': 6,
    'state': 6,
    'sampling': 5,
    'checkpoint': 7,
    'console': 7,
    'experiment': 7,
    'metrics': 7,
    'settings': 7,
    'completions': 7,
    'scoring': 8,
    'step': 9,
    'catalogue': 8,
    'mixture_catalogue': 8,
    'opening': 8,
    'provenance': 8,
    'run': 10,
    'loading': 11,
    'tabulate': 12,
    'weighing': 11,
    'evaluate': 11,
    'report': 13,
    'commands': 14,
    'train': 14,
    'plan': 14,
    'doctor': 8,
    'study': 15,
    'cli': 16,
    '__main__': 17,
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
