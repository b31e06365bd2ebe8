"""Shards: the files of a table. Each is an Arrow data set in a directory of its own, written whole or not at all.

    shard-<digest of its keys>/  data-*.arrow, dataset_info.json, state.json (library `datasets`)
                                 shard.json: {'rows': number, 'files': {name: sha256}}

A row is `{'key': bytes, 'values': [float32, ...]}`.

A bucket has no directory that could be renamed into place: there the data come first and `shard.json` last, and a shard
exists when that does. Its name holds the digest of its files too, so that writers of the same rows, which nothing keeps
apart, write the same bytes or another shard. What a writer leaves behind there is no shard, and takes room only.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from jaxpo import storage
from jaxpo.errors import InputError

MANIFEST, PREFIX, PARTIAL = 'shard.json', 'shard-', '.partial'
ABANDONED_SECONDS = 24 * 60 * 60  # no writer of one shard takes so long


@dataclasses.dataclass(frozen=True)
class Shard:
    """One verified shard; its numbers stay on disk until they are looked at."""

    directory: storage.Path
    keys: tuple[bytes, ...]
    vectors: tuple[np.ndarray, ...]  # float32 views of the memory-mapped files, one a key


def shard_names(directory: storage.Path) -> list[str]:
    """The shards of a table's directory, sorted; none where there is no directory. Temporaries are not shards."""
    if storage.is_remote(directory):
        return sorted(path.parent.name for path in directory.glob(f'{PREFIX}*/{MANIFEST}'))
    if not directory.is_dir():
        return []
    return sorted(path.name for path in directory.iterdir() if path.name.startswith(PREFIX))


def shard_name(keys: Sequence[bytes]) -> str:
    return PREFIX + hashlib.sha256(b''.join(keys)).hexdigest()[:32]


def write_shard(directory: storage.Path, keys: Sequence[bytes], vectors: Sequence[np.ndarray]) -> None:
    """Writes rows as one new shard: a crash leaves a temporary that no reader looks at."""
    if storage.is_remote(directory):
        with tempfile.TemporaryDirectory(prefix='jaxpo-shard-') as folder:
            local = pathlib.Path(folder) / shard_name(keys)
            files = _fill(local, keys, vectors)
            shard = directory / f'{local.name}-{_digest_of(files)}'
            for name in (*files, MANIFEST):
                storage.copy(local / name, shard / name)
        return
    name = shard_name(keys)
    partial = directory / f'.{name}.{uuid.uuid4().hex[:8]}{PARTIAL}'
    try:
        _fill(partial, keys, vectors)
        os.rename(partial, directory / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _fill(directory: pathlib.Path, keys: Sequence[bytes], vectors: Sequence[np.ndarray]) -> dict[str, str]:
    """Writes the files of a shard; gives their checksums by name, without that of the manifest."""
    import datasets  # takes seconds
    import pyarrow

    features = datasets.Features({'key': datasets.Value('binary'), 'values': datasets.List(datasets.Value('float32'))})
    # Arrow's own arrays: lists of vectors would become Python numbers one by one.
    offsets = pyarrow.array(np.cumsum([0, *map(len, vectors)]), pyarrow.int32())
    values = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(np.concatenate(vectors)))
    rows = datasets.Dataset.from_dict({'key': pyarrow.array(keys), 'values': values}, features=features)
    with _no_progress_bars():
        rows.save_to_disk(directory)
    files = {path.name: _sha256(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps({'rows': len(keys), 'files': files}, indent=2) + '\n', 'utf-8')
    return files


def _digest_of(files: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def read_shard(directory: storage.Path, files: pathlib.Path) -> Shard:
    """A shard, its files compared with their checksums. InputError, which says what to do, where they differ.

    Args:
      files: the directory itself, or where one in a bucket is copied to: a local place that numbers are read from.
    """
    import datasets  # takes seconds

    if storage.is_remote(directory):
        _fetch_shard(directory, files)
    rows = _verified_rows(directory, files)
    data = datasets.load_from_disk(files, keep_in_memory=False).data
    keys = tuple(data.column('key').to_pylist())
    vectors = tuple(vector for chunk in data.column('values').chunks for vector in _vectors(chunk))
    if not len(keys) == len(vectors) == rows:
        raise damaged(directory, f'it holds {len(keys)} rows and not the {rows} of its {MANIFEST}')
    if directory.name.rpartition('-')[0] != shard_name(keys) != directory.name:
        raise damaged(directory, 'its name is not that of its rows')
    return Shard(directory, keys, vectors)


def _fetch_shard(directory: storage.Path, files: pathlib.Path) -> None:
    """Copies what the manifest names; what is not there is found missing where the copy is read."""
    files.mkdir(parents=True, exist_ok=True)
    storage.copy(directory / MANIFEST, files / MANIFEST)
    for name in _manifest(directory, files)[1]:
        with contextlib.suppress(FileNotFoundError):
            storage.copy(directory / name, files / name)


def damaged(directory: storage.Path, what: str) -> InputError:
    return InputError(f'{directory} is damaged: {what}. Delete this directory, and its rows are computed again.')


def remove_abandoned(directory: pathlib.Path) -> None:
    """Removes temporaries that a writer left behind more than a day ago."""
    for path in directory.glob(f'.{PREFIX}*{PARTIAL}'):
        with contextlib.suppress(FileNotFoundError):  # its writer has just finished
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _verified_rows(directory: storage.Path, files: pathlib.Path) -> int:
    """The number of rows its manifest tells, after each file was found to be the one that was written."""
    rows, digests = _manifest(directory, files)
    for name, digest in digests.items():
        path = files / name
        if not path.is_file():
            raise damaged(directory, f'{name} is missing')
        if _sha256(path) != digest:
            raise damaged(directory, f'{name} is not as it was written')
    return rows


def _manifest(directory: storage.Path, files: pathlib.Path) -> tuple[int, dict[str, str]]:
    """The number of rows, and the checksum of each file by its name."""
    try:
        manifest = json.loads((files / MANIFEST).read_text('utf-8'))
        rows, digests = int(manifest['rows']), dict(manifest['files'])
    except FileNotFoundError:
        raise damaged(directory, f'it has no {MANIFEST}') from None
    except (ValueError, KeyError, TypeError):
        raise damaged(directory, f'its {MANIFEST} cannot be read') from None
    if any(os.path.basename(name) != name for name in digests):
        raise damaged(directory, f'its {MANIFEST} names files elsewhere')
    return rows, digests


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
