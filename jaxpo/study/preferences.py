"""Two ways a preference can mislead: stated with the wrong confidence, or following the completions' lengths."""

import dataclasses

import numpy as np
from scipy import stats

from jaxpo.errors import InputError
from jaxpo.study.measures import accuracy, correlation


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Stated confidence against how often it was right, in bins of equal width over confidences of 0.5 to 1."""

    error: float
    """Expected calibration error, 0 to 0.5: the mean of |share correct - mean confidence| over pairs, by bin. Binning
    few pairs makes it too high: a calibrated model does not score 0."""
    confidence: np.ndarray
    """`[bins]`: mean of the bin's pairs; NaN where there are none."""
    correct: np.ndarray
    """`[bins]`: share of the bin's pairs whose chosen completion was preferred; NaN where there are none."""
    count: np.ndarray
    """`[bins]`: pairs."""


def expected_calibration_error(probabilities: np.ndarray, bins: int = 10) -> Calibration:
    """Calibration of the probabilities `[n]` that the chosen completion is preferred.

    The label is always `chosen`, so both sides are folded: the confidence is max(p, 1 - p), correct is p > 0.5, and
    p = 0.5 is correct by one half. Guo et al. 2017, arXiv:1706.04599, with this change. InputError for numbers outside
    of 0 to 1, or none.
    """
    probabilities = np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 1 or not probabilities.size or not np.all((probabilities >= 0) & (probabilities <= 1)):
        raise InputError('probabilities: expected one a pair, each between 0 and 1.')
    if bins < 1:
        raise InputError(f'bins: must be at least 1, not {bins}.')
    confidence = np.maximum(probabilities, 1 - probabilities)
    correct = (np.sign(probabilities - 0.5) + 1) / 2
    place = np.minimum((2 * bins * (confidence - 0.5)).astype(int), bins - 1)
    count, of_confidence, of_correct = (
        np.bincount(place, weights, minlength=bins) for weights in (None, confidence, correct)
    )
    error = np.abs(of_correct - of_confidence).sum() / len(probabilities)
    of_none = np.where(count > 0, count, np.nan)
    return Calibration(float(error), of_confidence / of_none, of_correct / of_none, count)


@dataclasses.dataclass(frozen=True)
class LengthControl:
    """How far margins of preference follow the difference in length."""

    accuracy: float
    """Share of pairs with a positive margin; a tie counts one half."""
    controlled: float
    """The same once the part of each margin that its difference in length explains is taken away."""
    slope: float
    """Margin per unit of length, by least squares; 0 where lengths do not vary."""
    correlation: float
    """Pearson's, of margin and difference in length; 0 where either does not vary."""


def length_controlled_accuracy(margins: np.ndarray, length_differences: np.ndarray) -> LengthControl:
    """Accuracy of margins `[n]` (chosen minus rejected) without what follows length differences `[n]` (likewise).

    An adaptation, not the length-controlled win rate itself: that fits a logistic model of a judge's verdicts and sets
    its length term to 0 (Dubois et al. 2024, arXiv:2404.04475). Here nobody judges, so a line `margin = a + b * length
    difference` is fitted by least squares and `b * length difference` is subtracted; `a` stays, as it is the preference
    at equal length. What is left may still depend on length otherwise than in a line, and if longer completions are
    truly better, some of what is taken away was earned.

    Raises:
      InputError: arrays of unequal length, of none, or that are not finite.
    """
    margins, lengths = (np.asarray(values, dtype=np.float64) for values in (margins, length_differences))
    if margins.ndim != 1 or margins.shape != lengths.shape or not margins.size:
        raise InputError(
            f'length control: margins and length differences are one each a pair, not of shapes {margins.shape} and '
            f'{lengths.shape}.'
        )
    if not np.all(np.isfinite(margins) & np.isfinite(lengths)):
        raise InputError('length control: margins and length differences must be finite.')
    slope = float(stats.linregress(lengths, margins).slope) if np.ptp(lengths) else 0.0
    explained = slope * lengths
    rest = margins - explained
    # What is left by rounding alone is a tie, on every machine.
    rest = np.where(np.abs(rest) <= 1e-12 * (np.abs(margins) + np.abs(explained)), 0.0, rest)
    return LengthControl(accuracy(margins), accuracy(rest), slope, correlation(margins, lengths))
