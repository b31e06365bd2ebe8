"""Who works on what, among workers that share a directory (local, mounted, or gs://) and nothing else.

A worker acquires the lease of a name before it works on it, and renews it while it does. One that is killed renews no
more, and another takes its lease over. Clocks of machines differ, so none is read: a waiting worker takes over what it
has itself seen unchanged for `seconds`, and a holder counts its lease as lost `seconds` after it last renewed it, which
is never later. What is computed under a lease must still be written whole and depend on its name alone: a worker that
was suspended may finish what another has taken over.

    leases = Leases(directory, worker='slice-3', seconds=60)
    lease = leases.acquire(name)  # does not wait: None while another holds it, to be asked again
    if lease is not None:
        with holding(lease):
            ...  # look first whether another has finished it meanwhile

Of several processes that run one program together, one acquires for all.
"""

import contextlib
import json
import os
import pathlib
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator

from jaxpo import storage
from jaxpo.errors import InputError
from jaxpo.study.lease_files import RELEASED, Files
from jaxpo.study.lease_objects import Objects

NAME = re.compile(r'[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}')
CANNOT = 'no leases can be kept there'


class LeaseLost(RuntimeError):
    """Another worker has taken the lease over, as it was not renewed in time."""


class Leases:
    """The leases of one directory as one worker sees them; remembers since when it has seen each unchanged.

    Args:
      directory: Made where it is missing; holds nothing but leases.
      worker: Who this is, for people to read; several may have the same name.
      seconds: After how long without renewal a lease may be taken over: longer than the longest pause of a worker that
        lives. The same for all workers of a directory.
    """

    def __init__(self, directory: storage.Path, worker: str, seconds: float):
        self.worker = checked(worker, 'worker')
        if not 0 < seconds < float('inf'):
            raise InputError(f'A lease lasts a number of seconds above 0, not {seconds}.')
        self.seconds = seconds
        self.directory = directory
        with storage.said_plainly(directory, CANNOT):
            self._store = Objects(directory) if storage.is_remote(directory) else Files(pathlib.Path(directory))
        self._watched: dict[str, tuple[tuple[int, str], float]] = {}

    def acquire(self, name: str) -> 'Lease | None':
        """The lease of `name`, or None while another holds it. Does not wait: ask again, about every `seconds` / 3.

        A lease whose holder is known to be dead (a process of this machine that is gone) is taken over at once.

        Raises:
          InputError: no name, or the directory cannot be read and written.
        """
        checked(name, 'lease')
        with storage.said_plainly(self.directory, CANNOT):
            asked = time.monotonic()
            seen = self._store.read(name)
            if seen is not None and not self._is_free(name, seen, asked):
                return None
            self._watched.pop(name, None)
            token, began = uuid.uuid4().hex, time.monotonic()
            version = self._store.take(name, seen and seen[0], token, _text(self.worker, token))
        return None if version is None else Lease(self, name, version, token, began)

    def _is_free(self, name: str, seen: tuple[int, str], asked: float) -> bool:
        if seen[1] == RELEASED or _is_dead(seen[1]):
            return True
        before, since = self._watched.get(name, (None, 0.0))
        if before != seen:
            self._watched[name] = seen, time.monotonic()
            return False
        return asked - since >= self.seconds


class Lease:
    """A name that this worker holds, made by `Leases.acquire`. Threads may share it."""

    def __init__(self, leases: Leases, name: str, version: int, token: str, renewed: float):
        self.name = name
        self.seconds = leases.seconds
        self._worker, self._store = leases.worker, leases._store
        self._version, self._token, self._renewed, self._gone = version, token, renewed, False
        self._turn = threading.Lock()

    @property
    def lost(self) -> bool:
        """Whether another holds it, or may, as it was not renewed for `seconds`."""
        return self._gone or time.monotonic() - self._renewed >= self.seconds

    def renew(self) -> None:
        """Holds the lease for another `seconds` from now.

        Raises:
          LeaseLost: another has taken it over.
          OSError: the directory does not answer; the lease holds until it is `lost`, and may be renewed later.
        """
        with self._turn:
            began = time.monotonic()
            version = None if self._gone else self._renewed_version()
            if version is None:
                self._gone = True
                raise LeaseLost(f'{self.name}: {self._worker} holds it no more.')
            self._version, self._renewed = version, began

    def _renewed_version(self) -> int | None:
        return self._store.renew(self.name, self._version, self._token, _text(self._worker, self._token))

    def release(self) -> None:
        """Gives the lease back: others may acquire it at once. Of one that was taken over nothing remains to give.

        Raises:
          OSError: the directory does not answer; others then wait for `seconds`.
        """
        with self._turn:
            if not self._gone:
                self._gone = True
                self._store.release(self.name, self._version, self._token)


@contextlib.contextmanager
def holding(*leases: Lease) -> Iterator[tuple[Lease, ...]]:
    """Renews leases from another thread while the block runs, at a third of their seconds, and releases them after it.

    Each says in `lost` whether that succeeded.
    """
    over = threading.Event()
    pause = min(lease.seconds for lease in leases) / 3

    def renew():
        while not over.wait(pause):
            for lease in leases:
                with contextlib.suppress(LeaseLost, OSError):
                    lease.renew()

    thread = threading.Thread(target=renew, name='leases', daemon=True)
    thread.start()
    try:
        yield leases
    finally:
        over.set()
        thread.join()
        for lease in leases:
            with contextlib.suppress(OSError):  # it ends by itself, and what was done under it stands
                lease.release()


def checked(name: str, kind: str) -> str:
    """The name, which is one of a file too. InputError for any other."""
    if not NAME.fullmatch(name):
        raise InputError(f'{kind} {name!r}: use letters, digits, ".", "_" and "-", at most 64, and no "." in front.')
    return name


def _text(worker: str, token: str) -> str:
    """What stands in a lease: never the same twice, so that a lease which is held is seen to change."""
    process = {'machine': _machine(), 'process': os.getpid(), 'started': _started(os.getpid())}
    return json.dumps({'worker': worker, 'token': token, 'renewal': uuid.uuid4().hex, **process})


def _machine() -> list[str] | None:
    """Where a number names one process: host, its boot, and the namespace. None where the system does not say (Linux
    does)."""
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return [socket.gethostname(), boot, os.readlink('/proc/self/ns/pid')]
    except OSError:
        return None


def _started(process: int) -> str | None:
    """When a process of this machine started, in ticks since its boot; '' for one that is dead, None if hidden."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ''
    except (OSError, OverflowError):
        pass
    try:
        fields = pathlib.Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return None
    return '' if fields[0] in 'ZX' else fields[19]


def _is_dead(text: str) -> bool:
    """Whether the holder is proven dead: it ran on this machine, since its last boot, and its process is gone."""
    try:
        holder = json.loads(text)
        machine, process, started = holder['machine'], int(holder['process']), holder['started']
    except (ValueError, TypeError, KeyError):
        return False
    if not machine or not started or machine != _machine():
        return False
    now = _started(process)
    return now is not None and now != started
