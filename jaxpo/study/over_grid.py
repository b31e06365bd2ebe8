"""Robustness: what a method does over its whole grid, not at the setting chosen for it."""

from collections.abc import Mapping, Sequence

import numpy as np

from jaxpo.study import robustness as measures
from jaxpo.study.evidence import MISSING, REPORT, SELECTION, Arm, Evidence, Found, Trial, finite, mean, there
from jaxpo.study.findings import HeatCell, ProfilePoint, Robustness, RobustnessRow
from jaxpo.study.selection import Choice
from jaxpo.study.wording import figure, share

THRESHOLDS = 41
WORST = -np.inf  # a failed run: worse than every number


def robustness(evidence: Evidence, choices: Mapping[str, Choice]) -> Robustness:
    """All methods over their grids, in the order of the design."""
    thresholds = _thresholds(evidence)
    bar = choices[evidence.design['baseline']].trial
    baseline = None if bar is None else mean(evidence.values(bar))
    rows = tuple(_row(evidence, arm, choices[arm.name], baseline, thresholds) for arm in evidence.methods)
    start = mean(cell.first(evidence.design['metric']) for cell in evidence.baseline.cells)
    return Robustness(rows, start, _caption(evidence, rows))


def _thresholds(evidence: Evidence) -> np.ndarray:
    """From just below the worst to the best run of all methods, rising: profiles go from 1 to 0 where none failed."""
    values = there(evidence.metric(cell) for arm in evidence.methods for cell in arm.cells)
    if not values:
        return np.array([])
    room = (max(values) - min(values)) / (2 * THRESHOLDS - 3)  # half a step: the worst run is at no threshold
    ends = (min(values) - room, max(values)) if evidence.sign > 0 else (min(values), max(values) + room)
    return np.unique(np.linspace(*ends, THRESHOLDS))


def _row(evidence: Evidence, arm: Arm, choice: Choice, baseline: float | None, thresholds: np.ndarray) -> RobustnessRow:
    sign = evidence.sign
    ended = [cell for cell in arm.cells if cell.state != MISSING]
    scores = np.array([_score(evidence.metric(cell), sign) for cell in ended])
    runs = int(np.isfinite(scores).sum())
    return RobustnessRow(
        method=arm.name,
        runs=runs,
        failed=len(ended) - runs,
        interquartile_mean=_number(measures.interquartile_mean(scores), sign) if runs else None,
        worst_quartile=_number(measures.worst_quartile(scores), sign) if runs else None,
        share_above_start=_above_start(evidence, ended, scores),
        share_above_baseline=None if baseline is None or not runs else measures.share_above(scores, sign * baseline),
        profile=_profile(evidence, ended, scores, thresholds) if runs else (),
        best_of=_best_of(evidence, arm),
        fields=tuple(arm.trials[0].setting),
        grid=tuple(_heat(evidence, trial, trial is choice.trial) for trial in arm.trials),
    )


def _score(value: float | None, sign: int) -> float:
    """Higher is better."""
    return WORST if value is None else sign * value


def _number(score: float, sign: int) -> float | None:
    """A score in the metric's own direction; None where failed runs have a say in it."""
    return finite(sign * score)


def _above_start(evidence: Evidence, ended: Sequence[Found], scores: np.ndarray) -> float | None:
    """Share of runs that are better than they were before training; a failed one is not."""
    starts = [cell.first(evidence.design['metric']) for cell in ended]
    known = [place for place, start in enumerate(starts) if start is not None or scores[place] == WORST]
    if not there(starts):
        return None
    before = np.array([evidence.sign * (starts[place] or 0.0) for place in known])
    return measures.share_above(scores[known], before)


def _profile(
    evidence: Evidence, ended: Sequence[Found], scores: np.ndarray, thresholds: np.ndarray
) -> tuple[ProfilePoint, ...]:
    repeats = np.array([cell.repeat for cell in ended])
    confidence = evidence.design['confidence']
    profile = measures.performance_profile(scores, repeats, evidence.sign * thresholds, confidence)
    bands = zip(thresholds, profile.share, profile.low, profile.high)
    return tuple(ProfilePoint(float(at), float(part), finite(low), finite(high)) for at, part, low, high in bands)


def _best_of(evidence: Evidence, arm: Arm) -> tuple[float | None, ...]:
    """Of settings whose cells have all ended. One with a failed cell is chosen last, and then has no value."""
    whole = [trial for trial in arm.trials if all(cell.state != MISSING for cell in trial.cells)]
    if not whole:
        return ()
    selection, report = (
        np.array([_whole_score(evidence, trial, split) for trial in whole]) for split in (SELECTION, REPORT)
    )
    ks = range(1, len(whole) + 1)
    return tuple(_number(measures.expected_selected_of_k(selection, report, k), evidence.sign) for k in ks)


def _whole_score(evidence: Evidence, trial: Trial, split: str) -> float:
    values = evidence.values(trial, split)
    return WORST if None in values else evidence.sign * mean(values)


def _heat(evidence: Evidence, trial: Trial, chosen: bool) -> HeatCell:
    report = evidence.values(trial)
    return HeatCell(
        setting=trial.words,
        values=tuple(str(value) for value in trial.setting.values()),
        selection_mean=mean(evidence.values(trial, SELECTION)),
        report_mean=mean(report),
        n=len(there(report)),
        failed=trial.failed,
        chosen=chosen,
    )


def _caption(evidence: Evidence, rows: Sequence[RobustnessRow]) -> str:
    metric, sign = evidence.design['metric'], evidence.sign
    text = (
        f'{metric} on the report split over all settings and seeds: what a method gives to someone who does not tune '
        'it, and what tuning adds. A failed run counts as worse than every number.'
    )
    measured = [row for row in rows if row.interquartile_mean is not None]
    if measured:
        best = max(measured, key=lambda row: sign * row.interquartile_mean)
        text += f' The best interquartile mean is that of {best.method}, {figure(best.interquartile_mean)}.'
    tried = [row for row in rows if row.share_above_baseline is not None]
    if tried:
        widest = max(tried, key=lambda row: row.share_above_baseline)
        text += (
            f' The largest share of runs beyond the mean of {evidence.design["baseline"]} at its chosen setting is '
            f'that of {widest.method}, {share(widest.share_above_baseline)}.'
        )
    return text + ' No claims are made from this section: no correction was planned for it.'
