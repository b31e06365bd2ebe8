"""How several processes end together.

A process that fails says so to the others, which end with its message and its exit code: none waits for one that is
gone. One that dies without a word is missed after `processes.heartbeat_seconds`, and JAX then ends the others.
"""

import atexit
import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax._src import distributed  # the coordinator's keys and barriers: JAX has no public name for them

from jaxpo.errors import InputError, Interrupted, TrainingError

SECONDS_BETWEEN_LOOKS = 0.5
SECONDS_TO_LEAVE = 5.0  # how long the coordinator stays for the others to read why all end

_FAILURE, _LEAVING = 'jaxpo/failure', 'jaxpo/leaving'
_leaving = threading.Lock()  # taken once, by the thread that ends the process


class _Failure(NamedTuple):
    process: int
    code: int
    message: str


def started() -> bool:
    """Whether this process is one of several, or was started as if."""
    return jax.distributed.is_initialized()


def end(code: int, message: str) -> None:
    """Ends this process and all others with `code`; the first to fail gives its own to all. Returns where it is alone.

    Leaving as usual would wait for the others, which wait for this one.
    """
    if started():
        _leave(_tell(code, message))


def failure_of(problem: BaseException) -> tuple[int, str]:
    """The exit code of an error, and what is said of it."""
    if isinstance(problem, KeyboardInterrupt):
        return 130, 'Stopped; the last checkpoint stands.'
    if isinstance(problem, InputError):
        return 2, str(problem)
    return 1, str(problem) if isinstance(problem, TrainingError) else f'{type(problem).__name__}: {problem}'


@contextlib.contextmanager
def telling_at_once() -> Iterator[None]:
    """Tells the other processes of an error before the block is left, as what is around it may wait for them.

    This process then has SECONDS_TO_LEAVE to leave, and is ended where it waits after that. Errors that all processes
    meet together are left to them.
    """
    try:
        yield
    except (Interrupted, TrainingError):
        raise
    except BaseException as problem:
        if started():
            failure = _tell(*failure_of(problem))
            timer = threading.Timer(SECONDS_TO_LEAVE, _end_where_it_waits, (problem, failure))
            timer.daemon = True
            timer.start()
        raise


def _end_where_it_waits(problem: BaseException, failure: _Failure) -> None:
    with contextlib.suppress(OSError):  # a disk that is full may be what the words would go to
        traceback.print_exception(problem)
    _leave(failure)


def _tell(code: int, message: str) -> _Failure:
    """Says why this process fails, where no other has; gives the failure that all end with."""
    mine = _Failure(jax.process_index(), code, message)
    with contextlib.suppress(Exception):  # another process may have failed first
        distributed.global_state.client.key_value_set(_FAILURE, json.dumps(mine))
    return _failure() or mine


def watch() -> None:
    """A thread that ends this process once another has said that it fails."""
    over = threading.Event()

    def look():
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            failure = _failure()
            if failure is not None and failure.process != jax.process_index():
                say(f'process {failure.process}: {failure.message}')
                _leave(failure)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()

    def stop():
        over.set()
        thread.join()

    atexit.register(stop)  # before JAX leaves, whose keys it reads


def _failure() -> _Failure | None:
    try:
        return _Failure(*json.loads(distributed.global_state.client.key_value_try_get(_FAILURE)))
    except Exception:  # not there, or nobody to ask: JAX itself ends a process whose coordinator is gone
        return None


def _leave(failure: _Failure) -> None:
    """Ends the process at once. The others are given time to read why, as process 0 keeps what they read."""
    _leaving.acquire()
    with contextlib.suppress(Exception):
        distributed.global_state.client.wait_at_barrier(_LEAVING, int(SECONDS_TO_LEAVE * 1000))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(failure.code)


@contextlib.contextmanager
def overdue(seconds: float, give_up: Callable[[], None]) -> Iterator[None]:
    """Calls `give_up` from another thread where the block takes longer: it may wait where no exception reaches it."""
    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(message: str) -> None:
    """A line on stderr, where that can be written to."""
    with contextlib.suppress(OSError):
        print(f'jaxpo: {message}', file=sys.stderr, flush=True)
