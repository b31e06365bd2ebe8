"""What a run was made of, written beside its results: config, versions, commit. Process 0 looks and writes."""

import importlib.metadata
import json
import pathlib
import platform
import subprocess

import jax

from jaxpo import experiment, processes, storage
from jaxpo.config import Config
from jaxpo.errors import InputError
from jaxpo.metrics import flatten

PACKAGES = ('jaxpo', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'transformers', 'datasets', 'numpy')


def check(directory: storage.Path, config: Config) -> None:
    """InputError where `directory` holds a run with other settings, and which ones differ, or something else."""
    processes.decide(lambda: _check(directory, config))


def _check(directory: storage.Path, config: Config) -> None:
    path = directory / 'config.json'
    if path.exists():
        _refuse_other(path, config)
    elif directory.exists() and any(directory.iterdir()):
        raise InputError(f'output: {directory} is not empty and holds no run. Name a new directory.')


def claim(directory: storage.Path, config: Config) -> None:
    """Makes `directory` the run's, or finds that it is already; writes config.json and versions.json there.

    InputError as `check` has it: a directory never mixes two runs.
    """
    processes.decide(lambda: _claim(directory, config))


def _claim(directory: storage.Path, config: Config) -> None:
    _check(directory, config)
    storage.write_text(directory / 'config.json', experiment.to_json(config) + '\n')
    storage.write_text(directory / 'versions.json', json.dumps(versions(), indent=2) + '\n')


def _refuse_other(path: storage.Path, config: Config) -> None:
    theirs = flatten(experiment.computed(json.loads(path.read_text(encoding='utf-8'))))
    ours = flatten(experiment.computed(json.loads(experiment.to_json(config))))
    differ = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if differ:
        changes = ', '.join(f'{name} ({theirs.get(name)!r} there, {ours.get(name)!r} now)' for name in differ)
        raise InputError(f'output: {path.parent} holds a run with other settings: {changes}. Name a new directory.')


def versions() -> dict[str, str | int | None]:
    """Versions, commit and devices of this process."""
    return {
        'python': platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        'commit': _commit(),
        'backend': jax.default_backend(),
        'device': jax.devices()[0].device_kind,
        'devices': jax.device_count(),
        'processes': jax.process_count(),
    }


def _commit() -> str | None:
    """The commit the package runs from, marked where files differ from it; None outside a checkout."""
    here = pathlib.Path(__file__).parent
    try:
        commit = _git(here, 'rev-parse', 'HEAD')
        return commit + (' (modified)' if _git(here, 'status', '--porcelain') else '')
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(directory: pathlib.Path, *words: str) -> str:
    command = ['git', '-C', str(directory), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
