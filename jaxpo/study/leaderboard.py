"""The leaderboard: methods at their chosen settings against the baseline, on the report split, and the A/A check."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpo.study import statistics
from jaxpo.study.comparisons import gains, judge, judge_alone
from jaxpo.study.evidence import REPORT, Evidence, Found, finite, mean, same_pairs, there
from jaxpo.study.findings import AgainstItself, ByPrompt, Comparison, Leaderboard, LeaderboardRow
from jaxpo.study.measures import correct
from jaxpo.study.selection import Choice
from jaxpo.study.statistics import BETTER, NO_CLAIM, WORSE
from jaxpo.study.wording import counted, figure, listed, share, signed


def leaderboard(evidence: Evidence, choices: Mapping[str, Choice]) -> Leaderboard:
    """`choices`: arm -> its setting. Rows are sorted by the mean, best first; without a mean last."""
    design = evidence.design
    baseline = choices[design['baseline']]
    others = [arm.name for arm in evidence.methods if arm.name != design['baseline']]
    results = [_gains(evidence, choices[name], baseline) for name in others]
    judged = dict(zip(others, judge(results, evidence.sign, design['confidence'])))
    rows = [_row(evidence, choices[arm.name], baseline, judged.get(arm.name)) for arm in evidence.methods]
    best_first = sorted(rows, key=lambda row: (row.mean is None, -evidence.sign * (row.mean or 0.0)))
    ranked = [dataclasses.replace(row, rank=_rank(row, best_first, evidence.sign)) for row in best_first]
    return Leaderboard(tuple(ranked), REPORT, _headline(evidence, ranked), _caption(evidence, ranked))


def against_itself(evidence: Evidence, choices: Mapping[str, Choice]) -> AgainstItself:
    """The baseline's second arm against it: at the chosen settings, and setting by setting."""
    design = evidence.design
    baseline, again = choices[design['baseline']], choices[evidence.second.name]
    comparison = judge_alone(_gains(evidence, again, baseline), evidence.sign, design['confidence'])
    row = _row(evidence, again, baseline, comparison)
    settings = [
        gains(evidence.values(one), evidence.values(other), evidence.sign, design['confidence'])
        for one, other in zip(evidence.second.trials, evidence.baseline.trials)
    ]
    tested = [result for result in settings if finite(result.p_value) is not None]
    excluding = sum(result.claim != NO_CLAIM for result in tested)
    expected = (1 - design['confidence']) * len(tested)
    caption = _again_caption(evidence, row, len(tested), excluding, expected)
    return AgainstItself(row, len(tested), excluding, expected, caption)


def _values(evidence: Evidence, choice: Choice) -> list[float | None]:
    return [] if choice.trial is None else evidence.values(choice.trial)


def _gains(evidence: Evidence, mine: Choice, theirs: Choice) -> statistics.Paired:
    return gains(_values(evidence, mine), _values(evidence, theirs), evidence.sign, evidence.design['confidence'])


def _row(evidence: Evidence, choice: Choice, baseline: Choice, comparison: Comparison | None) -> LeaderboardRow:
    values = _values(evidence, choice)
    numbers = there(values)
    cells = () if choice.trial is None else choice.trial.cells
    return LeaderboardRow(
        rank=None,
        method=choice.arm.name,
        is_baseline=choice is baseline,
        setting='' if choice.trial is None else choice.trial.words,
        n=len(numbers),
        mean=mean(numbers),
        sd=float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None,
        values=tuple(values),
        selection_mean=choice.selection_mean,
        against_baseline=comparison,
        by_prompt=None if choice is baseline else _by_prompt(evidence, choice, baseline),
        failed=len(cells) - len(numbers),
        cells=tuple(cell.id for cell, value in zip(cells, values) if value is not None),
        note=_note(choice, len(numbers), comparison),
    )


def _rank(row: LeaderboardRow, rows: Sequence[LeaderboardRow], sign: int) -> int | None:
    """1 and how many are better: equal means share a rank."""
    if row.mean is None:
        return None
    return 1 + sum(sign * other.mean > sign * row.mean for other in rows if other.mean is not None)


def _note(choice: Choice, n: int, comparison: Comparison | None) -> str:
    if choice.trial is None:
        return 'no setting has a number on the selection split'
    parts, planned = [], len(choice.trial.cells)
    if choice.forced:
        parts.append('every setting has a failed or missing cell')
    if n < planned:
        parts.append(f'{planned - n} of {planned} seeds have no number: what is said holds for the others alone')
    if comparison is not None and comparison.n > 1 and comparison.low == comparison.high:
        parts.append('all seeds differ from the baseline by the same number: the interval is a point')
    return '; '.join(parts)


def _by_prompt(evidence: Evidence, mine: Choice, theirs: Choice) -> ByPrompt | None:
    """None where a seed has pairs of its own: there are no prompts then that all seeds were tried on."""
    if mine.trial is None or theirs.trial is None:
        return None
    couples = [
        (one, other)
        for one, other in zip(mine.trial.cells, theirs.trial.cells)
        if one.pairs is not None and other.pairs is not None
    ]
    if not couples or not same_pairs([cell for couple in couples for cell in couple]):
        return None
    values = np.array([_correct(one) - _correct(other) for one, other in couples])
    prompts = couples[0][0].pairs.prompt
    found = statistics.two_way_bootstrap(values, prompts, confidence=evidence.design['confidence'])
    return ByPrompt(found.seeds, found.clusters, found.mean, finite(found.low), finite(found.high))


def _correct(cell: Found) -> np.ndarray:
    return correct(cell.pairs.chosen_reward - cell.pairs.rejected_reward)


def claimed(rows: Sequence[LeaderboardRow], verdict: str) -> list[LeaderboardRow]:
    """The rows of a verdict."""
    return [row for row in rows if row.against_baseline is not None and row.against_baseline.verdict == verdict]


def _headline(evidence: Evidence, rows: Sequence[LeaderboardRow]) -> str:
    design = evidence.design
    unfinished = sum(cell.record is None for cell in evidence.cells)
    start = f'Unfinished, {counted(unfinished, "cell")} of {len(evidence.cells):,} to come. ' if unfinished else ''
    others = [row for row in rows if not row.is_baseline]
    if not others:
        return f'{start}{design["baseline"]} alone was studied: there is nothing to compare it with.'
    if not any(row.against_baseline.p is not None for row in others):
        return f'{start}No method can be compared with {design["baseline"]}: that takes two finished seeds of both.'
    said = []
    for verdict in (BETTER, WORSE):
        found = claimed(rows, verdict)
        named = listed([f'{row.method} ({signed(row.against_baseline.difference)})' for row in found])
        verb = 'are' if len(found) > 1 else 'is'
        said.append(f'{len(found) or "none"} {verb} {verdict}' + (f': {named}' if found else ''))
    without = len(claimed(rows, NO_CLAIM))
    compared = f'{start}Of {counted(len(others), "method")} against {design["baseline"]} by {design["metric"]}, '
    if without == len(others):
        return f'{compared}none is shown to be better or worse.'
    said += [f'of {without} no claim is made'] if without else []
    return f'{compared}{"; ".join(said)}.'


def _caption(evidence: Evidence, rows: Sequence[LeaderboardRow]) -> str:
    design = evidence.design
    smallest = sorted(there(row.against_baseline.detectable for row in rows if row.against_baseline is not None))
    direction = 'higher' if design['higher_is_better'] else 'lower'
    text = (
        f'Difference of {design["metric"]} from {design["baseline"]}, {direction} is better: mean and paired t '
        f'interval at {share(design["confidence"])} over seeds, each method at the setting chosen for it on the '
        'selection split. A claim needs an interval without zero and a Holm-adjusted p below '
        f'{figure(1 - design["confidence"])}; no claim is no proof of equality.'
    )
    if smallest:
        text += (
            f' The median method had to differ by {figure(smallest[len(smallest) // 2])} to be found with '
            'probability 0.8.'
        )
    return text


def _again_caption(evidence: Evidence, row: LeaderboardRow, tested: int, excluding: int, expected: float) -> str:
    name, comparison = evidence.design['baseline'], row.against_baseline
    if comparison.p is None:
        text = f'{name} cannot be compared with itself: that takes two finished seeds of both arms.'
    else:
        claim = comparison.verdict != NO_CLAIM
        text = (
            f'{name} against itself with other seeds: {signed(comparison.difference)} '
            f'[{signed(comparison.low)}, {signed(comparison.high)}], '
            + (
                f'which excludes zero. By chance this happens in {share(1 - evidence.design["confidence"])} of '
                'studies; read claims of like size with suspicion.'
                if claim
                else 'no claim, as it should be.'
            )
            + ' Other seeds share no data order, so pairs cancel less here than between methods: the interval is wider.'
        )
    if tested:
        text += (
            f' At {counted(tested, "setting")} of its grid, {excluding or "none"} of the intervals '
            f'{"exclude" if excluding > 1 else "excludes"} zero; {figure(expected)} would by chance (settings share '
            'seeds, so they do so together).'
        )
    return text
