"""An experiment is a Python module whose `get_config()` returns a Config, and which may define a `reward`."""

import dataclasses
import importlib.util
import json
import pathlib
import sys
import types
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro

from jaxpo import objective
from jaxpo.config import Config
from jaxpo.errors import InputError, unknown

Reward = Callable[[str, str], float]
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A resolved experiment: its module's config with the command line's overrides."""

    path: pathlib.Path
    config: Config
    reward: Reward | None  # (prompt, completion) -> a number, larger is better


def load(path: str, overrides: Sequence[str], command: str) -> Experiment:
    """Imports the module at `path` and overrides its config.

    Args:
      overrides: `--section.field value` words, as typed.
      command: the command's name, for messages.

    Raises:
      InputError: no such file, one that cannot be imported, no get_config, or not a Config. A wrong override prints
        its own message, the nearest setting included, and exits with code 2.
    """
    module, config = defined(path, 'get_config', Config)
    written, references = config.objective, tuple(config.references)
    config = dataclasses.replace(config, objective=objective.spelled_out(written, references))
    # A switch has a value too, True or False, as every other field has.
    options = {'prog': f'jaxpo {command} {path}', 'config': (tyro.conf.FlagConversionOff,)}
    config = tyro.cli(Config, default=config, args=list(overrides), **options)
    changed = objective.spelled_out_again(written, config.objective, references)
    config = dataclasses.replace(config, objective=changed)
    return Experiment(pathlib.Path(path), config, getattr(module, 'reward', None))


def defined(path: str, function: str, kind: type[T]) -> tuple[types.ModuleType, T]:
    """The module at `path` and what its `function()` returns. InputError: no such function, or no `kind` from it."""
    module, expected = import_module(path), f'{kind.__module__}.{kind.__name__}'
    if not hasattr(module, function):
        raise InputError(f'{path} defines no {function}(). It returns the {expected} to run.')
    found = getattr(module, function)()
    if not isinstance(found, kind):
        raise InputError(f'{path}: {function}() returned {type(found).__name__}, not a {expected}.')
    return module, found


def import_module(path: str) -> types.ModuleType:
    """The Python file at `path`, run as a module. InputError: no such file, or one that cannot be imported."""
    file = pathlib.Path(path)
    if not file.is_file():
        neighbours = [str(p) for p in file.parent.glob('*.py')] if file.parent.is_dir() else []
        raise unknown('Python file', path, neighbours)
    # A name that no other module has: Python looks up what a dataclass's annotations mean in the module of that name.
    name = f'{file.stem} of {file.resolve().parent}'
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise InputError(f'{path} is not a Python module (.py).')
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise InputError(f'{path} cannot be imported: {error}.') from error
    return module


def to_json(config: Config) -> str:
    """The resolved config as JSON: all that is needed to repeat the run."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def computed(config: dict) -> dict:
    """Of a config as a dict, what decides its results: not where they go, nor on which devices, sampling or export."""
    aside = ('output', 'mesh', 'processes', 'sample', 'export')
    return {name: value for name, value in config.items() if name not in aside}
