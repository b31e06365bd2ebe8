import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo.data import sampler
from jaxpo.errors import InputError


def run(seed, count, batch_pairs, total):
    steps = -(-total // batch_pairs)
    return [sampler.pair_indices(seed, step, batch_pairs, count, total) for step in range(steps)]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 9), st.integers(1, 30), st.integers(1, 40), st.integers(1, 100))
def test_every_epoch_is_a_permutation_and_nothing_is_lost(seed, count, batch_pairs, total):
    stream = np.concatenate(run(seed, count, batch_pairs, total))
    assert len(stream) == total
    for start in range(0, total, count):
        epoch = stream[start : start + count]
        assert len(set(epoch)) == len(epoch) and set(epoch) <= set(range(count))


def test_a_step_needs_no_earlier_step():
    whole = run(seed=3, count=10, batch_pairs=4, total=25)
    sampler._permutation.cache_clear()
    assert sampler.pair_indices(3, 6, 4, 10, 25).tolist() == whole[6].tolist()
    assert [len(batch) for batch in whole] == [4, 4, 4, 4, 4, 4, 1]


def test_the_order_is_that_of_the_seed_and_the_epoch():
    first, second = (np.concatenate(run(seed, 50, 50, 100)) for seed in (0, 1))
    assert first[:50].tolist() != second[:50].tolist()
    assert first[:50].tolist() != first[50:].tolist()
    assert sampler.pair_indices(0, 0, 8, 8, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]  # pinned: runs must resume


def test_batch_size_does_not_change_the_stream():
    assert np.concatenate(run(5, 13, 4, 39)).tolist() == np.concatenate(run(5, 13, 7, 39)).tolist()


def test_past_the_end_is_nothing():
    assert sampler.pair_indices(0, 9, 4, 10, 20).size == 0


def test_positions_are_spread_evenly():
    firsts = np.bincount([sampler.pair_indices(seed, 0, 1, 4, 4)[0] for seed in range(800)], minlength=4)
    assert firsts.min() > 150 and firsts.max() < 250  # 200 expected, deviation 12


@pytest.mark.parametrize(
    'epochs, count, batch_pairs, steps', [(1, 10, 4, 3), (2, 10, 4, 5), (0.5, 10, 4, 2), (0.01, 10, 4, 1)]
)
def test_steps(epochs, count, batch_pairs, steps):
    assert sampler.steps_of(epochs, count, batch_pairs) == steps


@pytest.mark.parametrize('epochs, count, batch_pairs', [(0, 1, 1), (float('nan'), 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_runs_are_refused(epochs, count, batch_pairs):
    with pytest.raises(InputError):
        sampler.steps_of(epochs, count, batch_pairs)
