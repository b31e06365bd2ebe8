"""What methods do besides: over their grids, to lengths and log-probabilities, and on the way."""

import dataclasses

from jaxpo.study.findings.parts import Spread


@dataclasses.dataclass(frozen=True)
class HeatCell:
    """One setting of a method."""

    setting: str
    values: tuple[str, ...]  # of the method's grid fields, in their order
    selection_mean: float | None
    report_mean: float | None
    n: int  # seeds with a number on the report split
    failed: int
    chosen: bool


@dataclasses.dataclass(frozen=True)
class ProfilePoint:
    """How many runs are better than a threshold."""

    threshold: float  # of the metric
    share: float  # of all runs of the method, failed ones included
    low: float | None  # band by seeds
    high: float | None


@dataclasses.dataclass(frozen=True)
class RobustnessRow:
    """A method over its whole grid: all settings, all seeds, on the report split."""

    method: str
    runs: int  # with a number
    failed: int  # that ended without one: worse than every number
    interquartile_mean: float | None  # None where failed runs reach into the middle half
    worst_quartile: float | None  # mean of the worst quarter; None where a failed run is in it
    share_above_start: float | None
    share_above_baseline: float | None  # above the mean of the baseline at its chosen setting
    profile: tuple[ProfilePoint, ...]  # rising thresholds
    best_of: tuple[float | None, ...]
    """By k = 1, 2, ... settings drawn from the grid: expected value of the one chosen on the selection split. None for
    so small a k that only settings with failed runs may be drawn."""
    fields: tuple[str, ...]  # of the grid, as `HeatCell.values` has them
    grid: tuple[HeatCell, ...]


@dataclasses.dataclass(frozen=True)
class Robustness:
    rows: tuple[RobustnessRow, ...]
    start: float | None  # the metric before training
    caption: str


@dataclasses.dataclass(frozen=True)
class LengthRow:
    """What lengths have to do with a method's preferences, at its chosen setting, on the report split."""

    method: str
    correlation: Spread | None  # of the method's own reward margin with chosen minus rejected tokens
    accuracy: Spread | None  # of that margin
    controlled_accuracy: Spread | None  # once its linear part in the length difference is taken out
    log_ratio_correlation: Spread | None  # of log-ratio margins, that is, by DPO's reward
    sampled_before: Spread | None  # tokens of a sampled completion before training
    sampled_after: Spread | None


@dataclasses.dataclass(frozen=True)
class Length:
    rows: tuple[LengthRow, ...]
    pairs: int | None
    chosen_tokens: float | None  # mean over held-out pairs
    rejected_tokens: float | None
    share_chosen_longer: float | None
    caption: str


@dataclasses.dataclass(frozen=True)
class CalibrationBin:
    """Pairs of like confidence."""

    confidence: float  # mean, 0.5..1
    correct: float  # share
    count: int


@dataclasses.dataclass(frozen=True)
class HealthRow:
    """What training did to the policy, at the method's chosen setting. Changes are from the start; nats."""

    method: str
    chosen_change: Spread | None  # of a whole completion
    rejected_change: Spread | None
    chosen_change_per_token: Spread | None
    rejected_change_per_token: Spread | None
    chosen_falling: Spread | None  # share of pairs
    margin: Spread | None  # by the method's own reward
    accuracy_train: Spread | None
    accuracy_report: Spread | None
    accuracy_gap: Spread | None  # train minus report
    calibration_error: Spread | None  # expected calibration error, 0..0.5
    calibration: tuple[CalibrationBin, ...]  # pairs of all seeds together
    gradient_norm_median: Spread | None  # over training lines
    gradient_norm_largest: Spread | None
    finite_share: float | None  # of the method's ended cells, over its whole grid: those that did not diverge


@dataclasses.dataclass(frozen=True)
class Health:
    rows: tuple[HealthRow, ...]
    caption: str


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """All seeds at one step."""

    step: float
    mean: float
    lowest: float
    highest: float
    n: int


@dataclasses.dataclass(frozen=True)
class Curve:
    """One method at its chosen setting."""

    method: str
    metric: tuple[CurvePoint, ...]  # on the report split
    loss: tuple[CurvePoint, ...]  # training; means of stretches of steps where there are many


@dataclasses.dataclass(frozen=True)
class Learning:
    curves: tuple[Curve, ...]
    caption: str
