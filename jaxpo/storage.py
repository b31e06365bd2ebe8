"""Where files lie: a local directory, or `gs://BUCKET/...` in Google Cloud Storage, by one kind of path.

An object of a bucket is written whole, appears at once and is never appended to; buckets have no locks, and what looks
like their directories are the beginnings of objects' names. What needs a file that grows, or one that can be mapped
into memory, keeps it in a local temporary directory and copies.
"""

import contextlib
import importlib.util
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator

from etils import epath

from jaxpo.errors import InputError

SCHEME = 'gs://'
BUCKET = re.compile(r'[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]')
COPY_BYTES = 2**24
PACKAGES = {'gcsfs': 'gcsfs', 'google.cloud.storage': 'google-cloud-storage'}  # module: package
INSTALL = "pip install 'jaxpo[gcs]'"

Path = pathlib.Path | epath.Path


def path(text: str | os.PathLike) -> Path:
    """A local path, or one in a bucket, which has the methods of pathlib's that are used here.

    Raises:
      InputError: another scheme than gs://, no name of a bucket, or the packages that read buckets are missing.
    """
    text = os.fspath(text)
    scheme = re.match(r'([a-z][a-z0-9+.-]+):/', text)
    if scheme is None:
        return pathlib.Path(text)
    if not text.startswith(SCHEME):
        raise InputError(f'{text}: name a local directory or gs://BUCKET/DIRECTORY.')
    bucket = text.removeprefix(SCHEME).split('/')[0]
    if not BUCKET.fullmatch(bucket):
        raise InputError(
            f'{text}: {bucket!r} is no name of a bucket. Write gs://BUCKET/DIRECTORY; a name has 3 or more '
            'lower-case letters, digits, dashes, dots and underscores.'
        )
    _check_packages(text)
    _forget_listings()
    return epath.Path(text)


def _check_packages(text: str) -> None:
    missing = [package for module, package in PACKAGES.items() if not _is_installed(module)]
    if missing:
        raise InputError(f'{text}: reading and writing buckets needs {" and ".join(missing)}: {INSTALL}')


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def _forget_listings() -> None:
    """What other processes wrote is seen: without this a listing, once read, would be believed for ever."""
    import fsspec

    fsspec.config.conf.setdefault('gcs', {}).setdefault('use_listings_cache', False)


def is_remote(directory: Path) -> bool:
    """Whether it lies in a bucket."""
    return str(directory).startswith(SCHEME)


def absolute(directory: Path) -> Path:
    """The same place whatever the working directory."""
    return directory if is_remote(directory) else directory.absolute()


def check_writable(directory: Path) -> None:
    """InputError where a bucket takes no files: to be asked before what is to be written there is computed."""
    if is_remote(directory):
        round_trip(directory)


def round_trip(directory: Path) -> dict[str, float]:
    """Writes a small file into `directory`, reads it back and deletes it.

    Returns:
      Seconds that `write`, `read` and `delete` took.

    Raises:
      InputError: one of them failed, and which.
    """
    probe, written, seconds = directory / f'.jaxpo-{uuid.uuid4().hex}', os.urandom(1024), {}
    steps = {'write': lambda: probe.write_bytes(written), 'read': probe.read_bytes, 'delete': probe.unlink}
    for name, act in steps.items():
        started = time.monotonic()
        with said_plainly(directory, f'cannot {name} a file there'):
            found = act()
        if name == 'read' and found != written:
            raise InputError(f'{directory}: a file that was just written there reads otherwise.')
        seconds[name] = time.monotonic() - started
    return seconds


@contextlib.contextmanager
def said_plainly(directory: Path, what: str = 'cannot be read') -> Iterator[None]:
    """Turns what a file system, the network or the credentials object to into an InputError that says what to check."""
    log = logging.getLogger('gcsfs')  # it would print every failure with a trace of its own
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except _failures(directory) as error:
        reason = f'{type(error).__name__}: {error}'[:300].replace('\n', ' ')
        raise InputError(f'{directory}: {what} ({reason}).{_hint(directory)}') from error
    finally:
        log.setLevel(level)


def _failures(directory: Path) -> tuple[type[Exception], ...]:
    if not is_remote(directory):
        return (OSError,)
    import aiohttp
    import google.auth.exceptions
    from gcsfs.retry import HttpError

    return OSError, HttpError, aiohttp.ClientError, google.auth.exceptions.GoogleAuthError


def _hint(directory: Path) -> str:
    if not is_remote(directory):
        return ' Check that it exists and who may write to it.'
    bucket = str(directory).removeprefix(SCHEME).split('/')[0]
    return (
        f' Check that the bucket exists (gcloud storage buckets describe gs://{bucket}) and that this account may '
        'create and delete objects in it (roles/storage.objectAdmin), or log in: gcloud auth application-default login.'
    )


def free_bytes(directory: pathlib.Path) -> tuple[pathlib.Path, int]:
    """The part of a local path that exists, and the bytes that are free on its disk."""
    whole = directory.absolute()
    existing = next(parent for parent in [whole, *whole.parents] if parent.exists())
    return existing, shutil.disk_usage(existing).free


def write_text(file: Path, text: str) -> None:
    """Writes a file, and makes the local directory that it is to be in."""
    if not is_remote(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding='utf-8')


def copy(source: Path, target: Path) -> None:
    """Copies one file, from or to a bucket, by parts: the host's memory need not hold it."""
    with source.open('rb') as reading, target.open('wb') as writing:
        shutil.copyfileobj(reading, writing, COPY_BYTES)


@contextlib.contextmanager
def grown_locally(directory: Path) -> Iterator[tuple[pathlib.Path, Callable[[], None]]]:
    """A local directory for files that grow, and `publish()`, which copies what changed in it to `directory`.

    A local `directory` is given as it is, and publishing does nothing. One in a bucket is published once more on
    leaving, whatever the reason; what a process that is killed wrote since it last published is lost.
    """
    if not is_remote(directory):
        yield directory, lambda: None
        return
    published: dict[pathlib.Path, tuple[int, int]] = {}
    with tempfile.TemporaryDirectory(prefix='jaxpo-') as folder:
        local = pathlib.Path(folder)

        def publish():
            for file in sorted(file for file in local.rglob('*') if file.is_file()):
                stat = file.stat()
                if published.get(file) != (stat.st_size, stat.st_mtime_ns):
                    copy(file, directory / file.relative_to(local).as_posix())
                    published[file] = (stat.st_size, stat.st_mtime_ns)

        try:
            yield local, publish
        finally:
            publish()
