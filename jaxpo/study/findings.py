"""Everything that a study's report says, as plain data: HTML, CSV, JSON and LaTeX print these numbers and no others.

None stands where there is no number: never NaN. Numbers of the metric are in its own units; `difference` is always
method minus baseline, whichever direction is better. Methods are in the order of the design where nothing else is
said. A section that a study has no data for is None, or an empty tuple.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spread:
    """One number of every seed."""

    mean: float | None
    lowest: float | None
    highest: float | None
    n: int  # seeds


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A method against the baseline, by differences between cells of equal repeat."""

    n: int  # pairs
    difference: float | None  # method minus baseline, mean over pairs
    low: float | None  # of the t interval
    high: float | None
    p: float | None  # two-sided paired t test
    adjusted_p: float | None  # by Holm, over all methods of the table; None where it is one comparison alone
    probability_better: float | None  # P(true mean difference in the better direction), 0..1
    detectable: float | None  # smallest true difference found with power 0.8 at this level, by what was seen
    verdict: str  # 'better', 'worse' or 'no claim'


@dataclasses.dataclass(frozen=True)
class GridField:
    """One field of a method's grid."""

    field: str  # dotted name
    values: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class MethodDesign:
    """One method as it was planned."""

    method: str
    objective: str  # JSON
    grid: tuple[GridField, ...]
    otherwise: tuple[tuple[str, str], ...]  # fields that are otherwise than in the base: name, value
    trials: int  # settings


@dataclasses.dataclass(frozen=True)
class Extension:
    """Cells that were added to the design after it was first written."""

    cells_added: int
    methods: tuple[str, ...]  # whose cells were added
    cells_done_before: int  # that had ended by then


@dataclasses.dataclass(frozen=True)
class Design:
    """What was said before anything was run."""

    name: str  # the directory that the design names
    question: str
    methods: tuple[MethodDesign, ...]
    seeds: tuple[int, ...]
    seeds_again: tuple[int, ...]  # of the baseline's second arm
    trials: int  # settings of each method: the equal budget
    cells: int
    baseline: str
    again: str  # name of the baseline's second arm
    metric: str
    higher_is_better: bool
    selection_share: float
    confidence: float
    rules: tuple[tuple[str, str], ...]  # name, rule in words: selection, comparison, family, failures, exclusions
    base: tuple[tuple[str, str], ...]  # the config that all cells share, flattened: field, value
    extensions: tuple[Extension, ...]


@dataclasses.dataclass(frozen=True)
class Counts:
    """How far the cells of one arm, or of all, have come."""

    method: str  # '' for all
    planned: int
    finished: int
    diverged: int
    error: int
    missing: int
    unmeasured: int  # finished, but without a finite value of the metric: counted among the finished too


@dataclasses.dataclass(frozen=True)
class Progress:
    """How much of the design the report rests on."""

    all: Counts
    methods: tuple[Counts, ...]  # the A/A arm last
    complete: bool  # every planned cell has ended
    caption: str


@dataclasses.dataclass(frozen=True)
class ByPrompt:
    """The difference in the accuracy of the methods' own rewards, uncertain by seeds and by prompts."""

    seeds: int
    prompts: int
    difference: float  # method minus baseline
    low: float | None  # two-way bootstrap, pairs of a prompt together
    high: float | None


@dataclasses.dataclass(frozen=True)
class LeaderboardRow:
    """One method at its chosen setting, on the report split after the last step."""

    rank: int | None  # 1 is best by the mean; None without any number
    method: str
    is_baseline: bool
    setting: str  # the chosen one, in words
    n: int  # seeds with a number
    mean: float | None
    sd: float | None  # over seeds, n - 1
    values: tuple[float | None, ...]  # by repeat
    selection_mean: float | None  # what it was chosen by
    against_baseline: Comparison | None  # None for the baseline
    by_prompt: ByPrompt | None  # where there are numbers by pair
    failed: int  # cells of the chosen setting that diverged, stopped with an error, or are not there
    cells: tuple[str, ...]  # ids of the chosen setting's cells that the numbers are from
    note: str  # '' or what a reader must know of this row


@dataclasses.dataclass(frozen=True)
class Leaderboard:
    """All methods, best mean first."""

    rows: tuple[LeaderboardRow, ...]
    split: str
    headline: str  # the study's answer in one sentence
    caption: str


@dataclasses.dataclass(frozen=True)
class AgainstItself:
    """The baseline against itself under another name, with other seeds, through the same choice of settings."""

    row: LeaderboardRow
    settings_compared: int  # the baseline and its second arm at the same setting
    excluding_zero: int  # of those, intervals that exclude zero
    expected: float  # how many would by chance
    caption: str


@dataclasses.dataclass(frozen=True)
class FrontierPoint:
    """One evaluation by samples."""

    setting: str
    repeat: int
    step: int
    kl: float  # nats of whole completions, policy from reference
    reward: float
    cell: str


@dataclasses.dataclass(frozen=True)
class FrontPoint:
    """A setting and step that no other beats at less KL."""

    kl: float
    reward: float


@dataclasses.dataclass(frozen=True)
class MethodFrontier:
    """All points of a method, and its best reward up to each KL."""

    method: str
    points: tuple[FrontierPoint, ...]
    front: tuple[FrontPoint, ...]  # of means over seeds, rising in both
    area: float | None  # mean over seeds of the mean reward along the front from `area_from` to `area_up_to`
    area_comparison: Comparison | None


@dataclasses.dataclass(frozen=True)
class MatchedRow:
    """A method's reward at one KL."""

    method: str
    n: int  # seeds that reached it
    reward: float | None  # mean over those seeds; None: not reached
    against_baseline: Comparison | None
    note: str  # 'not reached', 'reached by 3 of 5 seeds', or ''


@dataclasses.dataclass(frozen=True)
class MatchedKL:
    """All methods at one KL."""

    kl: float
    why: str  # the rule that picked it
    rows: tuple[MatchedRow, ...]


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Reward against KL, over all settings and steps, on the report split."""

    methods: tuple[MethodFrontier, ...]  # the A/A arm last
    matched: tuple[MatchedKL, ...]  # rising KL
    area_from: float | None  # nats: what every method and seed reached
    area_up_to: float | None
    caption: str


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


@dataclasses.dataclass(frozen=True)
class ComputeRow:
    """What the cells of one arm took, failed ones included."""

    method: str
    cells: int
    steps: int
    tokens: int  # trained on, padding left out
    seconds: float  # a cell's share of its program, summed; compilation and evaluation included
    device_seconds: float
    tokens_per_second: float | None
    cells_at_once: int  # most


@dataclasses.dataclass(frozen=True)
class Compute:
    rows: tuple[ComputeRow, ...]  # the A/A arm last
    total: ComputeRow
    caption: str


@dataclasses.dataclass(frozen=True)
class Version:
    """One value of what a cell was made with."""

    name: str
    value: str
    cells: int


@dataclasses.dataclass(frozen=True)
class CellLine:
    """One planned cell."""

    id: str
    method: str
    setting: str
    repeat: int
    seed: int
    state: str  # 'finished', 'diverged', 'error' or 'missing'
    error: str
    selection: float | None  # the metric after the last step
    report: float | None


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What every number is from."""

    versions: tuple[Version, ...]
    mixed: tuple[str, ...]  # names of which cells have seen more than one value
    cells: tuple[CellLine, ...]
    files: int  # read
    design_sha256: str
    cells_sha256: str  # over the names and contents of all files read, sorted by name
    command: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Conclusions:
    """What follows from the study and what does not, in sentences."""

    can: tuple[str, ...]
    cannot: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Findings:
    """The whole report."""

    design: Design
    progress: Progress
    leaderboard: Leaderboard
    against_itself: AgainstItself
    frontier: Frontier | None
    robustness: Robustness
    length: Length | None
    health: Health | None
    learning: Learning | None
    compute: Compute
    provenance: Provenance
    conclusions: Conclusions
