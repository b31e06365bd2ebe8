"""Calibration and length control, by hand and on data made to have a known answer."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxpo.errors import InputError
from jaxpo.study.preferences import expected_calibration_error, length_controlled_accuracy


def test_calibration_by_hand():
    """Five bins: .5 (a tie) and .58 in the first; .8, .8 and .2 folded to .8 in the fourth; 1 and 0 in the last."""
    found = expected_calibration_error([0.5, 0.8, 0.2, 0.58, 0.8, 1.0, 0.0], bins=5)
    np.testing.assert_array_equal(found.count, [2, 0, 0, 3, 2])
    np.testing.assert_allclose(found.confidence, [0.54, math.nan, math.nan, 0.8, 1.0])
    np.testing.assert_allclose(found.correct, [0.75, math.nan, math.nan, 2 / 3, 0.5])
    assert found.error == pytest.approx((2 * (0.75 - 0.54) + 3 * (0.8 - 2 / 3) + 2 * 0.5) / 7)


def test_a_calibrated_model_has_little_error_and_an_overconfident_one_what_it_overstates():
    generator = np.random.default_rng(0)
    confidence = generator.uniform(0.5, 1.0, 200_000)
    correct = generator.uniform(size=200_000) < confidence
    assert expected_calibration_error(np.where(correct, confidence, 1 - confidence)).error < 0.006
    correct = generator.uniform(size=200_000) < confidence - 0.2 * (confidence > 0.7)
    found = expected_calibration_error(np.where(correct, confidence, 1 - confidence))
    assert found.error == pytest.approx(0.2 * 0.6, abs=0.006)


def test_calibration_of_one_bin_is_accuracy_against_mean_confidence():
    found = expected_calibration_error([0.9, 0.4, 0.7], bins=1)
    assert found.error == pytest.approx(abs(2 / 3 - (0.9 + 0.6 + 0.7) / 3))


@pytest.mark.parametrize('probabilities', [[], [0.5, 1.1], [-0.1], [math.nan], [[0.5]]])
def test_numbers_that_are_no_probabilities_are_refused(probabilities):
    with pytest.raises(InputError, match='probabilities'):
        expected_calibration_error(probabilities)
    with pytest.raises(InputError, match='bins'):
        expected_calibration_error([0.5], bins=0)


def test_length_control_by_hand():
    """margin = 1 + 2 x length exactly, so what is left once 2 x length is gone is 1 for every pair."""
    lengths = np.array([-2.0, -1.0, 0.0, 3.0])
    found = length_controlled_accuracy(1 + 2 * lengths, lengths)
    assert (found.accuracy, found.controlled) == (0.5, 1.0)
    assert found.slope == pytest.approx(2.0) and found.correlation == pytest.approx(1.0)


def test_a_preference_for_length_alone_is_worth_half_once_controlled():
    lengths = np.array([3.0, 5.0, 11.0, -2.0, 7.0])
    found = length_controlled_accuracy(0.1 * lengths, lengths)
    assert (found.accuracy, found.controlled) == (0.8, 0.5)


def test_a_preference_that_does_not_follow_length_is_left_alone():
    generator = np.random.default_rng(0)
    quality, lengths = generator.normal(0.5, 1.0, 20_000), generator.normal(3.0, 10.0, 20_000)
    honest = length_controlled_accuracy(quality, lengths)
    assert honest.controlled == pytest.approx(honest.accuracy, abs=0.003)
    inflated = length_controlled_accuracy(quality + 0.3 * lengths, lengths)
    assert inflated.slope == pytest.approx(stats.linregress(lengths, quality).slope + 0.3)
    assert inflated.controlled == pytest.approx(honest.controlled)
    assert inflated.correlation > 0.9 and abs(honest.correlation) < 0.02


def test_equal_lengths_control_nothing():
    found = length_controlled_accuracy([1.0, -1.0, 0.0, 2.0], [4, 4, 4, 4])
    assert (found.accuracy, found.controlled, found.slope, found.correlation) == (0.625, 0.625, 0.0, 0.0)


@pytest.mark.parametrize(
    'margins, lengths', [([], []), ([1, 2], [1]), ([1, math.nan], [1, 2]), ([1, 2], [1, math.inf])]
)
def test_pairs_that_are_none_are_refused(margins, lengths):
    with pytest.raises(InputError, match='length control'):
        length_controlled_accuracy(margins, lengths)
