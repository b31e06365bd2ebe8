"""Robustness over the grid, against hand-worked numbers and enumeration of all subsets."""

import itertools
import math

import numpy as np
import pytest

from jaxpo.errors import InputError
from jaxpo.study.robustness import (
    expected_best_of_k,
    expected_selected_of_k,
    interquartile_mean,
    performance_profile,
    share_above,
    worst_quartile,
)
from jaxpo.study.statistics import paired

DIVERGED = -math.inf


def test_interquartile_mean_by_hand():
    assert interquartile_mean([100, 1, 2, 3, 4, 5, 6, -50]) == (2 + 3 + 4 + 5) / 4
    assert interquartile_mean([7, 1, 3]) == (7 + 1 + 3) / 3  # a quarter of three is no run
    assert interquartile_mean([DIVERGED, DIVERGED, 1, 2, 3, 4, 5, 6]) == (1 + 2 + 3 + 4) / 4
    assert interquartile_mean([DIVERGED, DIVERGED, DIVERGED, 2, 3, 4, 5, 6]) == DIVERGED


def test_worst_quartile_by_hand():
    assert worst_quartile([4, 1, 3, 2, 9, 9, 9, 9]) == 1.5
    assert worst_quartile([4, 1, 3, 2, 9]) == 1.5  # a quarter of five is two runs
    assert worst_quartile([3]) == 3
    assert worst_quartile([1, 2, DIVERGED, 3]) == DIVERGED


def test_share_above_counts_ties_half_and_the_diverged_as_below():
    assert share_above([1, 2, 3, DIVERGED], 2) == (1 + 0.5) / 4
    assert share_above([1, 2, 3], [0, 2, 4]) == (1 + 0.5) / 3
    with pytest.raises(InputError, match='NaN'):
        share_above([1, 2], math.nan)


def test_profile_by_hand():
    found = performance_profile([1, 2, 3, DIVERGED], ['a', 'a', 'b', 'b'], [-9, 1, 2.5, 3])
    np.testing.assert_array_equal(found.share, [0.75, 0.5, 0.25, 0.0])
    np.testing.assert_array_equal(found.thresholds, [-9, 1, 2.5, 3])


def test_profile_band_is_the_t_interval_of_the_seeds_shares_whose_error_is_that_of_resampled_seeds():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(6, 5)) + generator.normal(size=5)
    seeds = np.broadcast_to(np.arange(5), (6, 5))
    found = performance_profile(scores.ravel(), seeds.ravel(), [0.2])
    by_seed = (scores > 0.2).mean(axis=0)
    oracle = paired(by_seed)
    assert found.share[0] == pytest.approx(oracle.mean)
    np.testing.assert_allclose([found.low[0], found.high[0]], [max(0, oracle.low), min(1, oracle.high)])
    resampled = by_seed[generator.integers(0, 5, (100_000, 4))].mean(axis=1)
    assert resampled.std() == pytest.approx(oracle.standard_error, rel=0.01)


def test_profile_lies_within_zero_and_one_and_has_no_band_of_one_seed():
    found = performance_profile([1, 2, 9, 9], [0, 0, 1, 1], np.linspace(0, 10, 11))
    assert found.low.min() >= 0 and found.high.max() <= 1 and (found.low <= found.high).all()
    assert (np.diff(found.share) <= 0).all() and found.share[0] == 1 and found.share[-1] == 0
    alone = performance_profile([1, 2], [0, 0], [0, 1.5])
    assert list(alone.share) == [1, 0.5] and np.isnan(alone.low).all() and np.isnan(alone.high).all()


@pytest.mark.parametrize('n', [1, 4, 7])
def test_expected_best_of_k_is_the_mean_over_all_subsets(n):
    scores = np.random.default_rng(n).integers(0, 5, n) / 4  # with ties
    for k in range(1, n + 1):
        oracle = np.mean([max(subset) for subset in itertools.combinations(scores, k)])
        assert expected_best_of_k(scores, k) == pytest.approx(oracle, rel=1e-12)


@pytest.mark.parametrize('distinct', [3, 1000])
def test_expected_selected_of_k_is_the_mean_over_all_subsets_and_ties(distinct):
    generator = np.random.default_rng(0)
    selection, report = generator.integers(0, distinct, 7), generator.normal(size=7)
    for k in range(1, 8):
        chosen = []
        for subset in itertools.combinations(range(7), k):
            best = [place for place in subset if selection[place] == selection[list(subset)].max()]
            chosen.append(report[best].mean())
        assert expected_selected_of_k(selection, report, k) == pytest.approx(np.mean(chosen), rel=1e-12)


def test_one_draw_is_the_mean_all_draws_the_chosen_and_choosing_by_what_is_reported_flatters():
    generator = np.random.default_rng(0)
    quality = generator.normal(size=9)
    selection, report = (quality + generator.normal(size=9) for _ in range(2))
    assert expected_selected_of_k(selection, report, 1) == pytest.approx(report.mean())
    assert expected_selected_of_k(selection, report, 9) == pytest.approx(report[selection.argmax()])
    assert all(expected_best_of_k(report, k) >= expected_selected_of_k(selection, report, k) for k in range(1, 10))


def test_diverged_settings_hurt_as_long_as_they_can_be_chosen():
    scores = [DIVERGED, DIVERGED, 1, 2]
    assert expected_best_of_k(scores, 2) == DIVERGED
    assert expected_best_of_k(scores, 3) == (1 + 2 + 2 + 2) / 4
    assert expected_selected_of_k([1, 2, 3, 4], [1, 2, 3, DIVERGED], 1) == DIVERGED


def test_large_grids_do_not_overflow():
    scores = np.arange(3000.0)
    assert expected_best_of_k(scores, 1500) == pytest.approx(1500 / 1501 * 3001 - 1, rel=1e-12)


@pytest.mark.parametrize('k', [0, 4])
def test_a_budget_beyond_the_grid_is_refused(k):
    with pytest.raises(InputError, match='from 1 to 3'):
        expected_best_of_k([1, 2, 3], k)


@pytest.mark.parametrize('summary', [interquartile_mean, worst_quartile, lambda scores: share_above(scores, 0)])
@pytest.mark.parametrize('scores, message', [([1, math.nan], '1 of 2 are NaN'), ([], 'shape'), ([[1.0]], 'shape')])
def test_scores_that_are_none_are_refused(summary, scores, message):
    with pytest.raises(InputError, match=message):
        summary(scores)


def test_settings_must_match():
    with pytest.raises(InputError, match='2 settings, but 3'):
        expected_selected_of_k([1, 2, 3], [1, 2], 1)
