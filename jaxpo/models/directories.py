"""A directory that appears whole or not at all, written by process 0 while the others wait."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpo import storage
from jaxpo.errors import InputError


@contextlib.contextmanager
def exported(directory: storage.Path, size: int) -> Iterator[pathlib.Path | None]:
    """A temporary directory that becomes `directory` at the end, or nothing; None except on process 0.

    Every process must enter it, and none leaves before the directory is there. In a bucket config.json comes last: what
    has none is no whole export. Raises InputError on all of them where the directory exists and is not empty, cannot be
    written to, or the disk has no room for `size` bytes.
    """
    _agree(_obstacle(directory, size) if jax.process_index() == 0 else None)
    with _atomic_directory(directory) as folder:
        yield folder
    _agree(None)


def write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    """An indented JSON file."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', 'utf-8')


def _obstacle(directory: storage.Path, size: int) -> str | None:
    """Why `size` bytes cannot be exported to the directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        return f'{directory} exists and is not empty: choose another export directory or remove it.'
    if storage.is_remote(directory):
        try:
            storage.check_writable(directory)
        except InputError as error:
            return str(error)
        parent = pathlib.Path(tempfile.gettempdir())
    else:
        parent = directory.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(parent).free, size + 50_000_000  # the tokenizer's files, generously
    if needed > free:
        return f'No room for the export: {needed / 1e9:.2f} GB needed in {parent}, {free / 1e9:.2f} GB free.'
    return None


def _agree(problem: str | None) -> None:
    """Raises InputError on all processes where process 0 has a problem, so that none waits for another."""
    failed = problem is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failed:
        raise InputError(problem or 'Process 0 cannot export; its own message says why.')


@contextlib.contextmanager
def _atomic_directory(directory: storage.Path) -> Iterator[pathlib.Path | None]:
    if jax.process_index() != 0:
        yield None
        return
    if storage.is_remote(directory):
        with tempfile.TemporaryDirectory(prefix='jaxpo-export-') as folder:
            yield pathlib.Path(folder)
            for file in sorted(pathlib.Path(folder).iterdir(), key=lambda file: file.name == 'config.json'):
                storage.copy(file, directory / file.name)
        return
    folder = directory.absolute().parent / f'.{directory.name}.{uuid.uuid4().hex[:8]}.partial'
    folder.mkdir()
    try:
        yield folder
        os.rename(folder, directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
