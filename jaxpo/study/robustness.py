"""How much a method depends on its setting and on how long it was tuned.

Scores are one number a run or a setting, higher is better; negate a loss. A run that diverged has no score but counts:
give it -inf, the worst there is. NaN is refused, so that nothing is dropped by accident.
"""

import dataclasses
import math

import numpy as np
from scipy import stats

from jaxpo.errors import InputError
from jaxpo.study.statistics import check_confidence, clustered_standard_error, t_quantile


def interquartile_mean(scores: np.ndarray) -> float:
    """Mean of scores `[n]` without the lowest and the highest quarter (n // 4 each), -inf if more diverged than that.

    Agarwal et al. 2021, arXiv:2108.13264.
    """
    return float(stats.trim_mean(_scores(scores), 0.25))


def worst_quartile(scores: np.ndarray) -> float:
    """Mean of the lowest quarter of scores `[n]`: the lowest ceil(n / 4)."""
    scores = np.sort(_scores(scores))
    return float(scores[: math.ceil(len(scores) / 4)].mean())


def share_above(scores: np.ndarray, baseline: float | np.ndarray) -> float:
    """Share, 0 to 1, of scores `[n]` above the baseline's (one, or `[n]`); a tie counts one half."""
    scores, baseline = _scores(scores), np.asarray(baseline, dtype=np.float64)
    if np.isnan(baseline).any():
        raise InputError('baseline: is NaN.')
    return float(((scores > baseline) + 0.5 * (scores == baseline)).mean())


@dataclasses.dataclass(frozen=True)
class Profile:
    """Shares, 0 to 1, of runs above each threshold, with a band for new seeds at each threshold apart."""

    thresholds: np.ndarray
    share: np.ndarray
    low: np.ndarray
    """NaN where there is one seed."""
    high: np.ndarray


def performance_profile(
    scores: np.ndarray, seeds: np.ndarray, thresholds: np.ndarray, confidence: float = 0.95
) -> Profile:
    """Share of runs whose score is above each of `thresholds` `[t]`; `scores` and `seeds` are `[runs]`.

    The settings stay as they are and seeds are drawn anew, all runs of a seed together, as they share their data order
    and prompts. The standard error of that bootstrap has a closed form, which is used, so the band is t by seeds, cut
    off at 0 and 1. After Agarwal et al. 2021, arXiv:2108.13264, Section 4.3.
    """
    scores, thresholds = _scores(scores), np.asarray(thresholds, dtype=np.float64)
    check_confidence(confidence)
    above = (scores > thresholds[:, None]).astype(np.float64)
    share, error = above.mean(axis=-1), clustered_standard_error(above, seeds)
    count = len(np.unique(seeds))
    half = t_quantile(confidence, count - 1) * error if count > 1 else np.full_like(share, np.nan)
    return Profile(thresholds, share, np.clip(share - half, 0, 1), np.clip(share + half, 0, 1))


def expected_best_of_k(scores: np.ndarray, k: int) -> float:
    """Expected maximum of k of the scores `[n]`, drawn without replacement: what tuning with a budget of k finds.

    Exact: the i-th smallest (from 1) is the largest of C(i - 1, k - 1) of the C(n, k) subsets. Dodge et al. 2019,
    arXiv:1909.03004, draw with replacement; a grid is not tried twice. This chooses by the number it reports, which
    flatters; `expected_selected_of_k` does not. InputError unless 1 <= k <= n.
    """
    return expected_selected_of_k(scores, scores, k)


def expected_selected_of_k(selection_scores: np.ndarray, report_scores: np.ndarray, k: int) -> float:
    """Expected report score of the setting with the best selection score among k drawn without replacement.

    Both `[n]`, of the same settings in the same order. Settings with equal selection scores are equally likely to be
    chosen. InputError unless 1 <= k <= n.
    """
    selection, report = _scores(selection_scores), _scores(report_scores)
    n = len(selection)
    if len(report) != n:
        raise InputError(f'report_scores: {len(report)} settings, but {n} selection scores.')
    if not 1 <= k <= n:
        raise InputError(f'k: must be from 1 to {n}, the number of settings, not {k}.')
    _, place, sizes = np.unique(selection, return_inverse=True, return_counts=True)
    # Share of subsets that reach no further than each distinct score: C(c, k) / C(n, k) for the c no better than it,
    # as a product, which does not overflow. Less that of the score before, it is the chance that this one is chosen.
    drawn = np.arange(k)
    within = np.prod((np.cumsum(sizes)[:, None] - drawn) / (n - drawn), axis=1)
    chosen = (np.diff(within, prepend=0.0) / sizes)[place]
    possible = chosen > 0  # 0 times -inf is no number
    return float((chosen[possible] * report[possible]).sum())


def _scores(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 1 or not scores.size:
        raise InputError(f'scores: expected one a run, not an array of shape {scores.shape}.')
    if np.isnan(scores).any():
        raise InputError(f'scores: {np.isnan(scores).sum()} of {scores.size} are NaN. A diverged run counts as -inf.')
    return scores
