"""A table: what a frozen reference says of each completion token, computed once, kept on disk, shared by all runs.

    ROOT/<digest of identity, statistic and format>/identity.json, shard-*/

A table is found by what its numbers depend on (`identity`: weights, dtype), a row of it by the token ids it is of. So a
changed model is another table and a changed template, tokenizer or truncation is another row, while subsets, shuffles,
losses and seeds find what is there. Nothing here runs a model.

In a bucket there is no lock: writers that meet write a row twice, and both are read (`table_files`). What is read of a
bucket is copied to a local temporary directory first, which lasts as long as the table.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxpo import storage
from jaxpo.errors import InputError, unknown
from jaxpo.references import table_files
from jaxpo.types import TABLE_STATISTICS

FORMAT = 1
IDENTITY, LOCK = 'identity.json', 'lock'
SIGNS = {'logps': -1.0, 'entropy': 1.0}  # which side of 0 the numbers of a statistic lie on
SIGN_TOLERANCE = 1e-3  # nats: rounding may carry a number past 0 by this much
SAME_TOLERANCE = 1e-4  # nats: two computations of one row may differ by this much


def sequence_key(prompt: np.ndarray, completion: np.ndarray) -> bytes:
    """The name of a row: 16 bytes that depend on both lengths and on every token id.

    Args:
      prompt, completion: token ids, vectors of integers that fit int32.
    """
    # Lengths first: else a token moved from the prompt to the completion would be the same bytes.
    parts = (np.array([len(prompt), len(completion)]), np.asarray(prompt), np.asarray(completion))
    stored = b''.join(part.astype('<i4', casting='same_kind').tobytes() for part in parts)
    return hashlib.blake2b(stored, digest_size=16).digest()


def open_table(root: str | os.PathLike, identity: Mapping[str, Any], statistic: str) -> 'Table':
    """The table of one statistic of one frozen model; empty where none was written. Nothing is created before a write.

    Args:
      root: directory of all tables (`config.tables`), local or in a bucket.
      identity: what the numbers depend on besides token ids, as JSON: weights (`models.identity`), dtype.
      statistic: one of TABLE_STATISTICS; nats, one number a completion token.

    Raises:
      InputError: the directory belongs to another identity or cannot be read, or a shard is damaged or contradicts
        another.
    """
    if statistic not in TABLE_STATISTICS:
        raise unknown('table statistic', statistic, TABLE_STATISTICS)
    root = storage.path(root)
    if not storage.is_remote(root):
        root = root.expanduser()
        if root.exists() and not root.is_dir():
            raise InputError(f'tables: {root} is a file. Name a directory.')
    described = {'identity': dict(identity), 'statistic': statistic, 'format': FORMAT}
    canonical = json.dumps(described, sort_keys=True, allow_nan=False)
    directory = root / hashlib.sha256(canonical.encode()).hexdigest()[:32]
    with storage.said_plainly(root):
        return Table(directory, json.loads(canonical))


class Table:
    """A table that was opened: an index of the rows on disk. `open_table` makes it."""

    def __init__(self, directory: storage.Path, described: dict[str, Any]):
        self.directory = directory
        self.statistic = described['statistic']
        self._described = described
        self._cache: pathlib.Path | None = None  # where files of a bucket are copied to
        self._shards: set[str] = set()
        self._rows: dict[bytes, tuple[np.ndarray, str]] = {}  # its numbers on disk, and the shard they are of
        _check_identity(directory, described)
        self._refresh()

    def __len__(self) -> int:
        return len(self._rows)

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of `keys` that no process has written yet, each once, in order."""
        self._refresh()
        return [key for key in dict.fromkeys(keys) if key not in self._rows]

    def read(self, keys: Iterable[bytes]) -> list[np.ndarray]:
        """The rows' numbers: read-only float32 views of the files, nats, one number a completion token.

        Raises:
          InputError: a row is not there, or its numbers cannot be those of the statistic.
        """
        keys = list(keys)
        absent = [key for key in keys if key not in self._rows]
        if absent:
            raise InputError(
                f'{self.directory} lacks {len(absent)} of {len(keys)} rows, the first of them {absent[0].hex()}.'
            )
        for values, shard in (self._rows[key] for key in keys):
            fault = _fault(values, self.statistic)
            if fault:
                raise table_files.damaged(self.directory / shard, fault)
        return [self._rows[key][0] for key in keys]

    def check_writable(self) -> None:
        """InputError where the table's bucket takes no file: to be asked before anything is computed for it."""
        storage.check_writable(self.directory)

    def write(self, keys: Sequence[bytes], values: Sequence[np.ndarray]) -> None:
        """Adds rows as one shard: all of them or, should the process end, none. Rows that are there stay as they are.

        Args:
          keys: of `sequence_key`.
          values: a float32 vector for each, nats, one number a completion token.

        Raises:
          InputError: numbers that are not finite or of the wrong sign, or two answers for one key.
        """
        rows = self._checked(keys, values)
        if not self.missing(rows):
            return
        with _alone(self.directory):
            _write_identity(self.directory, self._described)
            new = self.missing(rows)  # another process may have written some of them by now
            if new:
                table_files.write_shard(self.directory, new, [rows[key] for key in new])
        self._refresh()

    def _checked(self, keys: Sequence[bytes], values: Sequence[np.ndarray]) -> dict[bytes, np.ndarray]:
        rows: dict[bytes, np.ndarray] = {}
        for key, vector in zip(keys, values, strict=True):
            vector = np.asarray(vector, np.float32)
            fault = _fault(vector, self.statistic)
            if fault:
                raise InputError(f'Row {key.hex()} is not written to {self.directory}: {fault}.')
            if not _same(rows.setdefault(key, vector), vector):
                raise InputError(f'Row {key.hex()} is not written to {self.directory}: it has two different values.')
        return rows

    def _refresh(self) -> None:
        """Reads the shards that came since the last look."""
        for name in table_files.shard_names(self.directory):
            if name not in self._shards:
                self._add(table_files.read_shard(self.directory / name, self._files_of(name)))
                self._shards.add(name)

    def _files_of(self, shard: str) -> pathlib.Path:
        """Where the files of a shard are to be read."""
        if not storage.is_remote(self.directory):
            return self.directory / shard
        if self._cache is None:
            self._cache = pathlib.Path(tempfile.mkdtemp(prefix='jaxpo-table-'))
            weakref.finalize(self, shutil.rmtree, self._cache, ignore_errors=True)
        return self._cache / shard

    def _add(self, shard: table_files.Shard) -> None:
        name = shard.directory.name
        for key, vector in zip(shard.keys, shard.vectors, strict=True):
            held, other = self._rows.setdefault(key, (vector, name))
            if not _same(held, vector):
                raise table_files.damaged(
                    shard.directory, f'its row {key.hex()} differs from that of {other}, one of them is wrong'
                )


def _fault(values: np.ndarray, statistic: str) -> str | None:
    """Why these cannot be a row's numbers."""
    if values.ndim != 1:
        return f'its numbers have shape {values.shape}, not one a token'
    if not np.isfinite(values).all():
        return 'it holds numbers that are not finite'
    if (SIGNS[statistic] * values < -SIGN_TOLERANCE).any():
        return f'{statistic} must be {"at least" if SIGNS[statistic] > 0 else "at most"} 0'
    return None


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or (len(one) == len(other) and bool((np.abs(one - other) <= SAME_TOLERANCE).all()))


def _check_identity(directory: storage.Path, described: dict[str, Any]) -> None:
    """InputError where the directory holds another table than its name says."""
    path = directory / IDENTITY
    if not path.exists():
        if table_files.shard_names(directory):
            raise InputError(
                f'{path} is missing: nothing says whose numbers these are. Delete {directory}; it is computed again.'
            )
        return
    try:
        found = json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise InputError(f'{path} is not readable JSON ({error}). Delete {directory}; it is computed again.') from None
    if found == described:
        return
    theirs, ours = dict(_flat(found)), dict(_flat(described))
    differ = sorted(name for name in {*theirs, *ours} if theirs.get(name, ...) != ours.get(name, ...))
    changes = ', '.join(f'{name} ({theirs.get(name)!r} there, {ours.get(name)!r} asked for)' for name in differ)
    raise InputError(
        f'{path} is not the identity that its directory is named by: {changes}. '
        f'Delete {directory}; it is computed again.'
    )


def _flat(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict) or not tree:
        yield path, tree
        return
    for name, branch in tree.items():
        yield from _flat(branch, f'{path}.{name}' if path else name)


def _write_identity(directory: storage.Path, described: dict[str, Any]) -> None:
    """The identity beside its shards, and before them: no shard is ever without it."""
    path = directory / IDENTITY
    if path.exists():
        return
    content = json.dumps(described, indent=2, sort_keys=True) + '\n'
    if storage.is_remote(directory):
        path.write_text(content)
    else:
        partial = directory / f'.{IDENTITY}.{uuid.uuid4().hex[:8]}{table_files.PARTIAL}'
        partial.write_text(content, 'utf-8')
        os.replace(partial, path)


@contextlib.contextmanager
def _alone(directory: storage.Path) -> Iterator[None]:
    """One writer of a local directory at a time. The lock ends with its process, so a crash leaves none behind."""
    if storage.is_remote(directory):
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = (directory / LOCK).open('w')
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        raise InputError(f'tables: {directory} cannot be written to: {error}') from None
    with file:
        table_files.remove_abandoned(directory)
        yield
