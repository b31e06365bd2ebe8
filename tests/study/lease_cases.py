"""What holds of leases wherever they are kept: each case gets a place, and a clock that moves when it is told to."""

import contextlib
import itertools
import json
import pathlib
import subprocess
import sys
import time
import types

import pytest

from jaxpo.study import leases
from jaxpo.study.leases import LeaseLost, Leases

SECONDS = 60.0
ROOT = pathlib.Path(leases.__file__).parents[2]
RACE = """
import json, os, sys, time
from jaxpo import storage
from jaxpo.study.leases import Leases
mine = Leases(storage.path(sys.argv[1]), sys.argv[2], 60)
mine.acquire(f'first{os.getpid()}')  # connected, so that neither has to be while the other runs
print('ready', flush=True)
for number in range(int(sys.argv[3])):
    begin = float(sys.stdin.readline())
    while time.time() < begin:  # awake when it comes
        pass
    print(json.dumps(mine.acquire(f'name{number}') is not None), flush=True)
"""


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(leases, 'time', types.SimpleNamespace(monotonic=made.monotonic))
    return made


def pair(place):
    return Leases(place, 'first', SECONDS), Leases(place, 'second', SECONDS)


def one_holds_a_name_and_others_other_names(place, clock):
    first, second = pair(place)
    assert first.acquire('name') is not None
    assert second.acquire('name') is None and first.acquire('name') is None
    assert second.acquire('other') is not None


def what_is_released_is_free_at_once(place, clock):
    first, second = pair(place)
    for holder, waiter in itertools.islice(itertools.cycle([(first, second), (second, first)]), 4):
        lease = holder.acquire('name')
        assert lease is not None and waiter.acquire('name') is None
        lease.release()
        assert lease.lost
        with pytest.raises(LeaseLost):
            lease.renew()


def what_is_renewed_is_never_taken(place, clock):
    first, second = pair(place)
    lease = first.acquire('name')
    for _ in range(12):
        clock.now += 0.9 * SECONDS
        assert second.acquire('name') is None
        assert not lease.lost
        lease.renew()
    assert second.acquire('name') is None


def what_was_seen_unchanged_for_long_is_taken_and_not_before(place, clock):
    first, second = pair(place)
    lease = first.acquire('name')
    clock.now += 5 * SECONDS
    # However old the lease is, this one has not watched it yet.
    assert second.acquire('name') is None
    clock.now += SECONDS - 1
    assert second.acquire('name') is None
    clock.now += 1
    assert second.acquire('name') is not None
    assert lease.lost


def a_holder_counts_its_lease_as_lost_before_it_can_be_taken(place, clock):
    first, second = pair(place)
    lease = first.acquire('name')
    assert second.acquire('name') is None
    clock.now += SECONDS - 1
    assert not lease.lost
    clock.now += 1
    assert lease.lost
    lease.renew()  # nobody has taken it
    assert not lease.lost and second.acquire('name') is None


def one_of_many_that_waited_takes_it(place, clock):
    holder, *waiters = (Leases(place, f'worker{number}', SECONDS) for number in range(5))
    holder.acquire('name')
    assert [waiter.acquire('name') for waiter in waiters] == [None] * 4
    clock.now += SECONDS
    taken = [waiter.acquire('name') for waiter in waiters]
    assert sum(lease is not None for lease in taken) == 1


def who_was_robbed_learns_it_and_harms_nobody(place, clock):
    first, second = pair(place)
    robbed = first.acquire('name')
    second.acquire('name')
    clock.now += SECONDS
    taken = second.acquire('name')
    with pytest.raises(LeaseLost, match='name: first holds it no more'):
        robbed.renew()
    assert robbed.lost
    robbed.release()
    taken.renew()
    assert not taken.lost and first.acquire('name') is None


def who_is_slow_to_take_what_was_free_has_lost(place, clock):
    first, second = pair(place)
    first.acquire('name').release()
    seen = first._store.read('name')
    version = seen and seen[0]
    for _ in range(2):
        second.acquire('name').release()
    held = second.acquire('name')
    assert first._store.take('name', version, 'slow one', 'slow one') is None
    held.renew()
    assert first.acquire('name') is None


CASES = {
    case.__name__: case
    for case in (
        one_holds_a_name_and_others_other_names,
        what_is_released_is_free_at_once,
        what_is_renewed_is_never_taken,
        what_was_seen_unchanged_for_long_is_taken_and_not_before,
        a_holder_counts_its_lease_as_lost_before_it_can_be_taken,
        one_of_many_that_waited_takes_it,
        who_was_robbed_learns_it_and_harms_nobody,
        who_is_slow_to_take_what_was_free_has_lost,
    )
}


def winners(processes, count: int) -> list[int]:
    """How many of processes that run RACE win each of `count` names: all try at one moment, name by name."""
    numbers = []
    for _ in range(count):
        begin = time.time() + 0.005
        for process in processes:
            process.stdin.write(f'{begin}\n')
            process.stdin.flush()
        numbers.append(sum(json.loads(process.stdout.readline()) for process in processes))
    return numbers


@contextlib.contextmanager
def started(code: str, *words: str, environment=None):
    """A process that runs `code`, once it has said that it is ready."""
    command = [sys.executable, '-c', code, *words]
    pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            assert process.stdout.readline() == 'ready\n'
            yield process
        finally:
            process.kill()
