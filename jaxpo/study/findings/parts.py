"""What several sections of a report are made of."""

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
