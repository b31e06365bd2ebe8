"""Reward against KL: all settings and steps of every method as points, compared where methods went equally far."""

import math
from collections.abc import Mapping, Sequence

from jaxpo.study.comparisons import Values, gains, judge, judge_alone
from jaxpo.study.evidence import REPORT, Arm, Evidence, finite, mean, there
from jaxpo.study.findings import (
    Comparison,
    Frontier,
    FrontierPoint,
    FrontPoint,
    MatchedKL,
    MatchedRow,
    MethodFrontier,
)
from jaxpo.study.frontier import area_under_frontier, at_matched_kl, pareto_front
from jaxpo.study.statistics import NO_CLAIM
from jaxpo.study.wording import counted, figure, listed

REWARD, KL = 'reward', 'kl'
HIGHER_IS_BETTER = 1
Runs = Mapping[str, Mapping[int, list[FrontierPoint]]]  # arm -> repeat -> points of all its settings and steps


def frontier(evidence: Evidence) -> Frontier | None:
    """None where no cell has both `reward` and `kl` on the report split."""
    points = {arm.name: _points(arm) for arm in evidence.arms}
    runs = {name: _by_repeat(found) for name, found in points.items() if found}
    if not runs:
        return None
    start, end = _common(runs)
    values = {
        (kl, why): {arm.name: _rewards(evidence, runs, arm, kl) for arm in evidence.arms}
        for kl, why in _kls(evidence, runs, start, end)
    }
    matched = tuple(
        MatchedKL(kl, why, tuple(_row(name, found, compared[name]) for name, found in rewards.items()))
        for ((kl, why), rewards), compared in zip(values.items(), _compared(evidence, [*values.values()]))
    )
    means = {arm.name: _means(evidence, runs, arm, start, end) for arm in evidence.arms}
    of_areas = _compared(evidence, [means])[0]
    methods = tuple(
        MethodFrontier(name, tuple(found), _front(found), mean(means[name]), of_areas[name])
        for name, found in points.items()
    )
    ends = (start, end) if start < end else (None, None)
    return Frontier(methods, matched, *ends, _caption(evidence, matched))


def _points(arm: Arm) -> list[FrontierPoint]:
    found = []
    for trial in arm.trials:
        for cell in trial.cells:
            for step, line in cell.evaluations.get(REPORT, {}).items():
                kl, reward = finite(line.get(KL)), finite(line.get(REWARD))
                if kl is not None and reward is not None:
                    found.append(FrontierPoint(trial.words, cell.repeat, step, kl, reward, cell.id))
    return found


def _by_repeat(points: Sequence[FrontierPoint]) -> dict[int, list[FrontierPoint]]:
    return {
        repeat: [point for point in points if point.repeat == repeat]
        for repeat in sorted({point.repeat for point in points})
    }


def _reached(runs: Mapping[int, list[FrontierPoint]]) -> float:
    """The largest KL that every seed of an arm reached."""
    return min(max(point.kl for point in points) for points in runs.values())


def _common(runs: Runs) -> tuple[float, float]:
    """The range of KL that every seed of every arm has evaluations around.

    The reference itself, at step 0, is not one of them: up to the first evaluation of a policy in training the front is
    a chord, which lies further below the truth the later that evaluation was.
    """
    trained = [[p.kl for p in points if p.step] for by_repeat in runs.values() for points in by_repeat.values()]
    smallest = max((min(kls) for kls in trained if kls), default=math.inf)
    return smallest, min(_reached(by_repeat) for by_repeat in runs.values())


def _kls(evidence: Evidence, runs: Runs, start: float, end: float) -> list[tuple[float, str]]:
    """Where methods are compared, by rule and not by eye."""
    name = evidence.design['baseline']
    most = 'the largest KL that every method reached with every seed'
    kls = [(end / 4, f'a quarter of {most}'), (end / 2, f'half of {most}'), (end, most)]
    if name in runs and _reached(runs[name]) > end:
        kls.append((_reached(runs[name]), f'the largest KL that {name} reached with every seed'))
    return [(kl, why) for kl, why in kls if kl >= start]


def _rewards(evidence: Evidence, runs: Runs, arm: Arm, kl: float) -> list[float | None]:
    """By repeat: the arm's reward at this KL, on the front of all its settings and steps."""
    found = []
    for repeat in range(len(evidence.design['seeds'])):
        points = runs.get(arm.name, {}).get(repeat)
        found.append(at_matched_kl(*_arrays(points), kl) if points else None)
    return found


def _means(evidence: Evidence, runs: Runs, arm: Arm, start: float, end: float) -> list[float | None]:
    """By repeat: the mean reward along the arm's front from `start` to `end`."""
    found = []
    for repeat in range(len(evidence.design['seeds'])):
        points = runs.get(arm.name, {}).get(repeat)
        area = area_under_frontier(*_arrays(points), end, start) if points and start < end else None
        found.append(None if area is None else area / (end - start))
    return found


def _arrays(points: Sequence[FrontierPoint]) -> tuple[list[float], list[float]]:
    return [point.kl for point in points], [point.reward for point in points]


def _compared(evidence: Evidence, tables: Sequence[Mapping[str, Values]]) -> list[dict[str, Comparison | None]]:
    """Every arm of every table against the baseline there: one family, the A/A arm by itself."""
    confidence, name, again = evidence.design['confidence'], evidence.design['baseline'], evidence.second.name
    results = [
        {arm: gains(values, table[name], HIGHER_IS_BETTER, confidence) for arm, values in table.items() if arm != name}
        for table in tables
    ]
    family = [(place, arm) for place, table in enumerate(results) for arm in table if arm != again]
    judged = judge([results[place][arm] for place, arm in family], HIGHER_IS_BETTER, confidence)
    found = [{name: None, again: judge_alone(table[again], HIGHER_IS_BETTER, confidence)} for table in results]
    for (place, arm), comparison in zip(family, judged):
        found[place][arm] = comparison
    return found


def _row(name: str, values: Values, comparison: Comparison | None) -> MatchedRow:
    reached = len(there(values))
    note = '' if reached == len(values) else f'reached by {reached} of {counted(len(values), "seed")}'
    return MatchedRow(name, reached, mean(values), comparison, note if reached else 'not reached')


def means_over_seeds(points: Sequence[FrontierPoint]) -> list[tuple[float, float]]:
    """KL and reward of each setting after each number of steps."""
    together: dict[tuple[str, int], list[FrontierPoint]] = {}
    for point in points:
        together.setdefault((point.setting, point.step), []).append(point)
    return [(mean(p.kl for p in group), mean(p.reward for p in group)) for group in together.values()]


def _front(points: Sequence[FrontierPoint]) -> tuple[FrontPoint, ...]:
    if not points:
        return ()
    front = pareto_front(*zip(*means_over_seeds(points)))
    return tuple(FrontPoint(float(kl), float(reward)) for kl, reward in zip(*front))


def _caption(evidence: Evidence, matched: Sequence[MatchedKL]) -> str:
    text = (
        'Reward against KL from the reference, every setting and step a point, the mean over its seeds; lines join the '
        'best reward up to each KL. Rewards at unequal KL do not compare: methods are compared where '
        'they went equally far, by interpolation between points of one seed, never beyond them and never between the '
        'reference and the first of them. A front is a maximum '
        'over points, on the report split itself: where they are noisy it is too high, for all methods alike, as they '
        'have equally many settings.'
    )
    if not matched:
        return f'{text} No KL lies between points of all methods, so none are compared.'
    claims = [
        f'{row.method} {row.against_baseline.verdict} at KL {figure(at.kl)}'
        for at in matched
        for row in at.rows
        if row.against_baseline is not None
        and row.against_baseline.verdict != NO_CLAIM
        and row.method != evidence.second.name
    ]
    name = evidence.design['baseline']
    kls = listed([figure(at.kl) for at in matched])
    said = f'claims against {name}: {listed(claims)}' if claims else f'no claim is made against {name}'
    return f'{text} At KL {kls} nats (Holm over all of them together), {said}.'
