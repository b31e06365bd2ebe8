"""How methods compare with the baseline: at their chosen settings, and at matched KL."""

import dataclasses

from jaxpo.study.findings.parts import Comparison


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
    area_from: float | None  # nats: between what every method and seed had at its first evaluations, and reached
    area_up_to: float | None
    caption: str
