"""The reward-KL frontier, by hand and against a fine sum."""

import math

import numpy as np
import pytest

from jaxpo.errors import InputError
from jaxpo.study.frontier import area_under_frontier, at_matched_kl, pareto_front

# Rises to 4 at KL 3, is no better beyond, and has worse points below; in no order.
KL = np.array([5.0, 0.0, 3.0, 1.0, 2.0, 1.0, 3.0, 4.5])
REWARD = np.array([1.0, 0.0, 4.0, 2.0, 1.5, -1.0, 3.0, 4.0])


def test_the_front_holds_the_points_that_no_other_beats_at_less_kl():
    kl, reward = pareto_front(KL, REWARD)
    np.testing.assert_array_equal(kl, [0, 1, 3])
    np.testing.assert_array_equal(reward, [0, 2, 4])


@pytest.mark.parametrize('target, reward', [(0, 0), (0.5, 1), (1, 2), (2, 3), (3, 4), (4, 4), (5, 4)])
def test_between_points_it_is_linear_and_behind_the_best_level(target, reward):
    assert at_matched_kl(KL, REWARD, target) == reward


@pytest.mark.parametrize('target', [-0.1, 5.1])
def test_what_was_not_reached_is_not_extrapolated(target):
    assert at_matched_kl(KL, REWARD, target) is None
    assert area_under_frontier(KL, REWARD, *sorted((target, 1.0), reverse=True)) is None


def test_a_reference_worse_than_step_0_and_one_point_alone():
    assert at_matched_kl([2.0], [7.0], 2.0) == 7.0
    assert at_matched_kl([2.0, 3.0], [7.0, 1.0], 2.5) == 7.0
    assert at_matched_kl([2.0], [7.0], 1.0) is None


def test_area_by_hand_and_by_a_fine_sum():
    assert area_under_frontier(KL, REWARD, 5) == pytest.approx(1 + 6 + 8)
    assert area_under_frontier(KL, REWARD, 2, 0.5) == pytest.approx(0.75 + 2.5)
    generator = np.random.default_rng(0)
    kl, reward = generator.uniform(0, 9, 40), generator.normal(size=40)
    low, high = kl.min(), kl.max()
    grid = np.linspace(low, high, 20_001)
    oracle = np.mean([at_matched_kl(kl, reward, target) for target in (grid[1:] + grid[:-1]) / 2]) * (high - low)
    assert area_under_frontier(kl, reward, high, low) == pytest.approx(oracle, rel=1e-5)


def test_more_points_never_lower_the_front():
    generator = np.random.default_rng(1)
    kl, reward = np.append(0.0, generator.uniform(0, 9, 30)), generator.normal(size=31)
    tens = [at_matched_kl(kl[:10], reward[:10], target) for target in np.linspace(0, kl[:10].max(), 9)]
    alls = [at_matched_kl(kl, reward, target) for target in np.linspace(0, kl[:10].max(), 9)]
    assert np.mean(alls) > np.mean(tens)


@pytest.mark.parametrize(
    'kl, reward, message',
    [
        ([0, math.inf], [0, 1], '1 of 2 points'),
        ([0, 1], [0, math.nan], '1 of 2'),
        ([], [], 'shapes'),
        ([1], [1, 2], 's'),
    ],
)
def test_points_that_are_none_are_refused(kl, reward, message):
    with pytest.raises(InputError, match=message):
        at_matched_kl(kl, reward, 0.5)


def test_an_area_of_no_width_is_refused():
    with pytest.raises(InputError, match='must be the larger'):
        area_under_frontier(KL, REWARD, 0.0)
