"""Leases in a local directory: one holder a name, whoever is killed, suspended, slow, or has another clock."""

import json
import os
import shutil
import signal
import time

import pytest
from study.lease_cases import CASES, RACE, SECONDS, clock, pair, started, winners

from jaxpo.errors import InputError
from jaxpo.study import leases
from jaxpo.study.lease_files import Files
from jaxpo.study.leases import LeaseLost, Leases, holding

clock = clock  # a fixture, which is asked for by name

HOLDER = """
import sys, time
import jaxpo.study.leases as leases
from jaxpo import storage
if sys.argv[3] == 'elsewhere':
    leases._machine = lambda: None
mine = leases.Leases(storage.path(sys.argv[1]), 'holder', float(sys.argv[2]))
with leases.holding(*[mine.acquire(f'name{number}') for number in range(int(sys.argv[4]))]):
    print('ready', flush=True)
    time.sleep(600)
"""
WAITER = """
import json, sys, time
from jaxpo import storage
from jaxpo.study.leases import Leases
mine, waiting, taken = Leases(storage.path(sys.argv[1]), 'waiter', float(sys.argv[2])), set(range(int(sys.argv[3]))), []
print('ready', flush=True)
sys.stdin.readline()
over = time.monotonic() + 20
while waiting and time.monotonic() < over:
    for number in sorted(waiting):
        lease = mine.acquire(f'name{number}')
        # Only the first to follow the holder counts: one that is not renewed is taken over like any other.
        if lease is not None and lease._version == 2:
            taken.append((number, time.monotonic()))
        if lease is not None or mine._store.read(f'name{number}')[0] > 1:
            waiting.remove(number)
    time.sleep(0.01)
print(json.dumps(taken))
"""


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_on_a_disk(case, tmp_path, clock):
    case(tmp_path / 'leases', clock)


def answers(processes):
    """What they say once all are told to begin."""
    for process in processes:
        process.stdin.write('\n')
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in processes]


def test_of_two_processes_one_wins_each_name(tmp_path):
    with started(RACE, str(tmp_path), 'a', '200') as first, started(RACE, str(tmp_path), 'b', '200') as second:
        assert winners([first, second], 200) == [1] * 200
    for number in range(200):
        assert len(list((tmp_path / f'name{number}').iterdir())) == 1


def test_what_a_killed_holder_held_elsewhere_is_taken_by_one_of_two_after_its_time(tmp_path):
    seconds, place = '0.5', str(tmp_path)
    with (
        started(HOLDER, place, seconds, 'elsewhere', '40') as holder,
        started(WAITER, place, seconds, '40') as first,
        started(WAITER, place, seconds, '40') as second,
    ):
        holder.kill()
        holder.wait()
        began = time.monotonic()
        ours, theirs = answers([first, second])
    assert sorted(number for number, _ in ours + theirs) == list(range(40))
    # Both began to watch when the holder was dead.
    assert min(when for _, when in ours + theirs) >= began + 0.5


@pytest.mark.parametrize('reaped', [True, False])
def test_what_a_dead_process_of_this_machine_held_is_taken_at_once(tmp_path, reaped):
    mine = Leases(tmp_path, 'holder', 3600)
    with started(HOLDER, str(tmp_path), '3600', 'here', '1') as holder:
        assert mine.acquire('name0') is None
        os.kill(holder.pid, signal.SIGSTOP)  # it may go on yet
        assert mine.acquire('name0') is None
        holder.kill()
        # A process whose parent has not asked for its end yet is dead, too.
        os.waitid(os.P_PID, holder.pid, os.WEXITED | (0 if reaped else os.WNOWAIT))
        assert mine.acquire('name0') is not None


@pytest.mark.parametrize(
    ('changes', 'dead'),
    [
        ({}, False),
        ({'started': '1'}, True),  # its number is another process's now
        ({'process': 2**22 + 1}, True),  # more than Linux gives
        ({'process': 2**22 + 1, 'machine': ['another', 'boot', 'pid:[1]']}, False),
        ({'process': 2**22 + 1, 'machine': None}, False),
        ({'process': 2**22 + 1, 'started': None}, False),
        ({'process': 2**80}, False),
        ({'process': 'one'}, False),
        (None, False),
    ],
)
def test_only_a_proof_of_death_is_one(tmp_path, changes, dead):
    first, second = pair(tmp_path)
    first.acquire('name')
    file = tmp_path / 'name' / '1'
    file.write_text('{"half' if changes is None else json.dumps(json.loads(file.read_text()) | changes))
    assert (second.acquire('name') is not None) == dead


def test_a_lease_that_is_renewed_in_the_background_is_kept_and_given_back(tmp_path):
    first, second = Leases(tmp_path, 'first', 2.0), Leases(tmp_path, 'second', 2.0)
    with holding(first.acquire('one'), first.acquire('two')) as held:
        over = time.monotonic() + 3.0
        while time.monotonic() < over:
            assert second.acquire('one') is None and second.acquire('two') is None
            time.sleep(0.05)
        assert not any(lease.lost for lease in held)
    assert second.acquire('one') is not None and second.acquire('two') is not None


def test_work_that_fails_gives_its_lease_back(tmp_path):
    first, second = pair(tmp_path)
    with pytest.raises(ValueError, match='diverged'), holding(first.acquire('name')):
        raise ValueError('diverged')
    assert second.acquire('name') is not None


def test_a_directory_that_does_not_answer_for_a_while_ends_no_lease(tmp_path, monkeypatch):
    renew, failures = Files.renew, [OSError('away'), OSError('away')]

    def sometimes(*words):
        if failures:
            raise failures.pop()
        return renew(*words)

    with holding(Leases(tmp_path, 'first', 0.9).acquire('name')) as (lease,):
        monkeypatch.setattr(Files, 'renew', sometimes)
        over = time.monotonic() + 20
        before = (tmp_path / 'name' / '1').read_text()
        while (tmp_path / 'name' / '1').read_text() == before:
            assert time.monotonic() < over
            time.sleep(0.01)
        assert not failures
    assert Leases(tmp_path, 'second', SECONDS).acquire('name') is not None


def test_a_lease_that_cannot_be_renewed_is_lost_in_time(tmp_path, monkeypatch, clock):
    lease = pair(tmp_path)[0].acquire('name')

    def away(*words):
        clock.now += SECONDS / 2  # it took that long to fail
        raise OSError('away')

    monkeypatch.setattr(Files, 'renew', away)
    for lost in (False, True):
        with pytest.raises(OSError, match='away'):
            lease.renew()
        assert lease.lost == lost


def test_a_slow_renewal_counts_from_its_beginning(tmp_path, monkeypatch, clock):
    lease = pair(tmp_path)[0].acquire('name')
    renew = Files.renew

    def slow(*words):
        version = renew(*words)
        clock.now += SECONDS - 1
        return version

    monkeypatch.setattr(Files, 'renew', slow)
    lease.renew()
    assert not lease.lost
    clock.now += 1
    assert lease.lost


@pytest.mark.parametrize(
    'name', ['', '.', '..', '../up', 'a/b', '/absolute', '.hidden', 'a b', 'a\nb', 'a\n', 'ä', 'x' * 65]
)
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(InputError, match='lease .*use letters'):
        Leases(tmp_path / 'leases', 'worker', SECONDS).acquire(name)
    with pytest.raises(InputError, match='worker .*use letters'):
        Leases(tmp_path / 'leases', name, SECONDS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('seconds', [0, -1.0, float('inf'), float('nan')])
def test_what_is_no_time_is_refused(tmp_path, seconds):
    with pytest.raises(InputError, match='seconds above 0'):
        Leases(tmp_path, 'worker', seconds)


def test_who_begins_anew_in_an_emptied_directory_is_left_alone(tmp_path):
    first, second = pair(tmp_path)
    lease = first.acquire('name')
    shutil.rmtree(tmp_path / 'name')
    taken = second.acquire('name')
    with pytest.raises(LeaseLost):
        lease.renew()
    assert lease.lost
    lease.release()
    taken.renew()


def test_one_file_is_left_of_a_name(tmp_path):
    first, second = pair(tmp_path)
    for holder in (first, second, first):
        holder.acquire('name').release()
    assert os.listdir(tmp_path / 'name') == ['3']
    assert first._store.take('name', 1, 'slow one', 'slow one') is None
    assert os.listdir(tmp_path / 'name') == ['3']


def test_a_successor_that_died_before_it_tidied_up_is_one(tmp_path):
    first, second = pair(tmp_path)
    lease = first.acquire('name')
    (tmp_path / 'name' / '2').write_text('')
    with pytest.raises(LeaseLost):
        lease.renew()
    lease.release()
    assert (tmp_path / 'name' / '1').read_text() != leases.RELEASED and second.acquire('name') is None


def test_a_place_that_is_no_directory_is_said_plainly(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='file: no leases can be kept there .*NotADirectoryError'):
        Leases(tmp_path / 'file', 'worker', SECONDS).acquire('name')


def test_a_lease_of_another_process_is_lost_where_it_was_taken_over(tmp_path):
    with started(HOLDER, str(tmp_path), '0.6', 'elsewhere', '1') as holder:
        mine = Leases(tmp_path, 'second', 0.6)
        os.kill(holder.pid, signal.SIGSTOP)  # a machine that is suspended, and wakes up
        over = time.monotonic() + 20
        while (lease := mine.acquire('name0')) is None:
            assert time.monotonic() < over
            time.sleep(0.02)
        with holding(lease):
            os.kill(holder.pid, signal.SIGCONT)
            time.sleep(0.5)  # it tries to renew
            lease.renew()
        with pytest.raises(LeaseLost):
            lease.renew()
    assert leases.RELEASED in (tmp_path / 'name0' / '2').read_text()
