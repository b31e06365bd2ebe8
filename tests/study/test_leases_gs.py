"""Leases in a bucket: the same promises, kept by preconditions, which the server here heeds as Cloud Storage does."""

import os
import uuid

import pytest
import tiny_buckets
from study import strict_buckets
from study.lease_cases import CASES, RACE, SECONDS, clock, pair, started, winners

from jaxpo import storage
from jaxpo.errors import InputError
from jaxpo.study.leases import LeaseLost, Leases, holding

tiny_buckets.skip_where_missing()
clock = clock  # a fixture, which is asked for by name


@pytest.fixture
def place(monkeypatch):
    for name, value in strict_buckets.environment().items():
        monkeypatch.setenv(name, value)
    return storage.path(f'gs://bucket/{uuid.uuid4().hex[:8]}/leases')


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_in_a_bucket(case, place, clock):
    case(place, clock)


def test_of_two_processes_one_wins_each_name(place):
    environment = os.environ | strict_buckets.environment()
    words = (str(place), 'worker', '40')
    with started(RACE, *words, environment=environment) as first, started(RACE, *words, environment=environment) as two:
        assert winners([first, two], 40) == [1] * 40


def test_a_lease_is_renewed_in_the_background_and_deleted_after_it(place):
    first = Leases(place, 'first', 3.0)
    with holding(first.acquire('name')) as (lease,):
        before = lease._version
        while lease._version == before:
            assert not lease.lost
        assert Leases(place, 'second', 3.0).acquire('name') is None
    assert first._store.read('name') is None


@pytest.mark.parametrize('whole', [True, False])
def test_a_renewal_whose_answer_is_lost_loses_no_lease(place, monkeypatch, whole):
    first, second = pair(place)
    lease = first.acquire('name')
    upload = first._store._write
    lost = []

    def write(name, version, text):
        written = upload(name, version, text)
        if not lost:
            lost.append(written)
            if whole:  # the service was asked again, and refused as the first request had succeeded
                return upload(name, version, text)
            raise OSError('no answer')
        return written

    monkeypatch.setattr(first._store, '_write', write)
    if not whole:
        with pytest.raises(OSError, match='no answer'):
            lease.renew()
    lease.renew()
    assert lost and not lease.lost and second.acquire('name') is None
    lease.release()
    assert second.acquire('name') is not None


def test_what_is_held_under_another_name_in_front_is_another_lease(place):
    first, second = pair(place)
    assert first.acquire('name') is not None
    assert Leases(place / 'deeper', 'first', SECONDS).acquire('name') is not None
    assert second.acquire('nam') is not None


def test_a_bucket_that_is_not_there_is_said_plainly(place):
    with pytest.raises(InputError, match='gs://nobodys-bucket/leases: no leases can be kept .*gcloud storage buckets'):
        Leases(storage.path('gs://nobodys-bucket/leases'), 'worker', SECONDS).acquire('name')


def test_what_is_no_name_is_refused(place):
    with pytest.raises(InputError, match='lease .*use letters'):
        Leases(place, 'worker', SECONDS).acquire('../name')


def test_the_server_heeds_preconditions(place):
    """Without which the tests above would say nothing."""
    store = pair(place)[0]._store
    version = store.take('name', None, 'ours', 'ours')
    assert version is not None and store._write('name', 0, 'theirs') is None
    assert store._write('name', version + 1, 'theirs') is None
    store.release('name', version + 1, 'ours')
    assert store.read('name') == (version, 'ours')
    with pytest.raises(LeaseLost):
        lease = Leases(place, 'first', SECONDS).acquire('other')
        store.release('other', lease._version, 'any')
        lease.renew()
