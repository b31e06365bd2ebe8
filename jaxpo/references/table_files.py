"""Shards: the files of a table. Each is an Arrow data set in a directory of its own, written whole or not at all.

    shard-<digest of its keys>/  data-*.arrow, dataset_info.json, state.json (library `datasets`)
                                 shard.json: {'rows': number, 'files': {name: sha256}}

A row is `{'key': bytes, 'values': [float32, ...]}`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence

import numpy as np

from jaxpo.errors import InputError

MANIFEST, PREFIX, PARTIAL = 'shard.json', 'shard-', '.partial'
ABANDONED_SECONDS = 24 * 60 * 60  # no writer of one shard takes so long


@dataclasses.dataclass(frozen=True)
class Shard:
    """One verified shard; its numbers stay on disk until they are looked at."""

    directory: pathlib.Path
    keys: tuple[bytes, ...]
    vectors: tuple[np.ndarray, ...]  # float32 views of the memory-mapped files, one a key


def shard_names(directory: pathlib.Path) -> list[str]:
    """The shards of a table's directory, sorted; none where there is no directory. Temporaries are not shards."""
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(PREFIX))


def shard_name(keys: Sequence[bytes]) -> str:
    return PREFIX + hashlib.sha256(b''.join(keys)).hexdigest()[:32]


def write_shard(directory: pathlib.Path, keys: Sequence[bytes], vectors: Sequence[np.ndarray]) -> None:
    """Writes rows as one new shard: a crash leaves a temporary that no reader looks at."""
    import datasets  # takes seconds
    import pyarrow

    name = shard_name(keys)
    features = datasets.Features({'key': datasets.Value('binary'), 'values': datasets.List(datasets.Value('float32'))})
    partial = directory / f'.{name}.{uuid.uuid4().hex[:8]}{PARTIAL}'
    try:
        # Arrow's own arrays: lists of vectors would become Python numbers one by one.
        offsets = pyarrow.array(np.cumsum([0, *map(len, vectors)]), pyarrow.int32())
        values = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(np.concatenate(vectors)))
        rows = datasets.Dataset.from_dict({'key': pyarrow.array(keys), 'values': values}, features=features)
        with _no_progress_bars():
            rows.save_to_disk(partial)
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({'rows': len(keys), 'files': files}, indent=2) + '\n', 'utf-8')
        os.rename(partial, directory / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_shard(directory: pathlib.Path) -> Shard:
    """A shard, its files compared with their checksums. InputError, which says what to do, where they differ."""
    import datasets  # takes seconds

    rows = _verified_rows(directory)
    data = datasets.load_from_disk(directory, keep_in_memory=False).data
    keys = tuple(data.column('key').to_pylist())
    vectors = tuple(vector for chunk in data.column('values').chunks for vector in _vectors(chunk))
    if not len(keys) == len(vectors) == rows:
        raise damaged(directory, f'it holds {len(keys)} rows and not the {rows} of its {MANIFEST}')
    if directory.name != shard_name(keys):
        raise damaged(directory, 'its name is not that of its rows')
    return Shard(directory, keys, vectors)


def damaged(directory: pathlib.Path, what: str) -> InputError:
    return InputError(f'{directory} is damaged: {what}. Delete this directory, and its rows are computed again.')


def remove_abandoned(directory: pathlib.Path) -> None:
    """Removes temporaries that a writer left behind more than a day ago."""
    for path in directory.glob(f'.{PREFIX}*{PARTIAL}'):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _verified_rows(directory: pathlib.Path) -> int:
    """The number of rows its manifest tells, after each file was found to be the one that was written."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text('utf-8'))
        rows, files = int(manifest['rows']), dict(manifest['files'])
    except FileNotFoundError:
        raise damaged(directory, f'it has no {MANIFEST}') from None
    except (ValueError, KeyError, TypeError):
        raise damaged(directory, f'its {MANIFEST} cannot be read') from None
    for name, digest in files.items():
        path = directory / name
        if not path.is_file():
            raise damaged(directory, f'{name} is missing')
        if _sha256(path) != digest:
            raise damaged(directory, f'{name} is not as it was written')
    return rows


def _sha256(path: pathlib.Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _vectors(chunk) -> Iterator[np.ndarray]:
    """The rows of an Arrow list array, as views."""
    offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=True)
    for start, stop in zip(offsets[:-1], offsets[1:]):
        yield values[start:stop]


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()
