"""Two arms compared by pairs of equal repeats, in the metric's own units and direction."""

from collections.abc import Sequence

import numpy as np

from jaxpo.study import statistics
from jaxpo.study.evidence import finite
from jaxpo.study.findings import Comparison

Values = Sequence[float | None]


def gains(mine: Values, theirs: Values, sign: int, confidence: float) -> statistics.Paired:
    """How much better mine are than theirs, where both have a number; `sign` is -1 where less is better."""
    pairs = [(one, other) for one, other in zip(mine, theirs) if one is not None and other is not None]
    return statistics.paired(np.array([sign * (one - other) for one, other in pairs]), confidence)


def judge(results: Sequence[statistics.Paired], sign: int, confidence: float) -> list[Comparison]:
    """One planned family of comparisons: one that has no p-value yet counts, as if nothing were found in it."""
    p_values = np.array([1.0 if np.isnan(result.p_value) else result.p_value for result in results])
    return [
        _comparison(result, sign, float(adjusted), statistics.verdict(result, float(adjusted), 1 - confidence))
        for result, adjusted in zip(results, statistics.holm(p_values))
    ]


def judge_alone(result: statistics.Paired, sign: int, confidence: float) -> Comparison:
    """One comparison by itself, uncorrected: of the A/A arm, whose false claims are to be counted."""
    return _comparison(result, sign, None, statistics.verdict(result, result.p_value, 1 - confidence))


def _comparison(result: statistics.Paired, sign: int, adjusted: float | None, verdict: str) -> Comparison:
    ends = (result.low, result.high) if sign > 0 else (result.high, result.low)
    has_test = finite(result.p_value) is not None
    return Comparison(
        result.n,
        *(_signed(value, sign) for value in (result.mean, *ends)),
        finite(result.p_value),
        adjusted if has_test else None,
        finite(result.probability_better),
        finite(result.minimum_detectable_effect),
        verdict,
    )


def _signed(value: float, sign: int) -> float | None:
    return finite(sign * value)
