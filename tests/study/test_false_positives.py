"""How often the leaderboard claims what is not so: studies of identical methods, through the report's own functions.

A value of the metric is made of that of its setting (the same for all methods), of its seed (shared by all methods, not
by the A/A arm, which has other seeds), of its run (on both splits: what came out well did so), and noise of the split.
"""

import dataclasses
import pathlib
import types

import numpy as np
import pytest
from scipy import stats

from jaxpo.study.evidence import REPORT, SELECTION, Arm, Evidence, Found, Trial
from jaxpo.study.leaderboard import against_itself, leaderboard
from jaxpo.study.selection import choose
from jaxpo.study.statistics import BETTER, NO_CLAIM

STUDIES = 500
BASELINE, AGAIN = 'dpo', 'dpo (A/A)'
METHODS = (BASELINE, *(f'method {place}' for place in range(6)))
SETTINGS, SEEDS = 6, 5
OF_SETTING, OF_SEED, OF_RUN, OF_SPLIT = 1.0, 2.0, 1.0, 1.0  # standard deviations, in hundredths of accuracy
OF_DIFFERENCE = 0.01 * np.sqrt(2 * (OF_RUN**2 + OF_SPLIT**2))  # of a method from the baseline, with equal seeds
LIMIT = 0.07


def drawn(studies: int, seeds: int = SEEDS) -> np.ndarray:
    """Accuracies `[studies, arms, settings, seeds, splits]` of identical methods, the A/A arm last."""
    generator = np.random.default_rng(0)
    arms = len(METHODS) + 1
    of_seed = generator.normal(0, OF_SEED, (studies, 2, 1, seeds, 1))
    parts = (
        generator.normal(0, OF_SETTING, (studies, 1, SETTINGS, 1, 1)),
        np.concatenate([np.repeat(of_seed[:, :1], arms - 1, axis=1), of_seed[:, 1:]], axis=1),
        generator.normal(0, OF_RUN, (studies, arms, SETTINGS, seeds, 1)),
        generator.normal(0, OF_SPLIT, (studies, arms, SETTINGS, seeds, 2)),
    )
    return 0.65 + 0.01 * sum(parts)


def evidence_of(values: np.ndarray) -> Evidence:
    """A study whose cells found the values `[arms, settings, seeds, splits]`."""
    arms = [
        Arm(name, tuple(_trial(name, place, cells) for place, cells in enumerate(settings)))
        for name, settings in zip((*METHODS, AGAIN), values.tolist())
    ]
    design = {'baseline': BASELINE, 'metric': 'accuracy', 'higher_is_better': True, 'confidence': 0.95}
    return Evidence(pathlib.Path('study'), design, [], tuple(arms[:-1]), arms[-1])


def _trial(arm: str, place: int, cells: list[list[float]]) -> Trial:
    setting = {'beta': place}
    return Trial(arm, setting, tuple(_cell(arm, setting, repeat, *splits) for repeat, splits in enumerate(cells)))


def _cell(arm: str, setting: dict[str, int], repeat: int, selection: float, report: float) -> Found:
    lines = [
        {'step': 9, 'split': SELECTION, 'accuracy': selection},
        {'step': 9, 'split': REPORT, 'accuracy': report},
    ]
    record = types.SimpleNamespace(state='finished', lines=lines, pairs={})
    return Found(f'{arm}-{setting["beta"]}-{repeat}', arm, setting, repeat, repeat, record)


@dataclasses.dataclass(frozen=True)
class Told:
    """What the report of one study says of its methods and of the A/A arm."""

    verdicts: dict[str, str]
    excluding_zero: dict[str, bool]
    points: list[str]  # methods that differ from the baseline by the same number with every seed
    again: str


def told(evidence: Evidence) -> Told:
    choices = {arm.name: choose(evidence, arm) for arm in evidence.arms}
    rows = {row.method: row.against_baseline for row in leaderboard(evidence, choices).rows if not row.is_baseline}
    return Told(
        {name: row.verdict for name, row in rows.items()},
        {name: row.low > 0 or row.high < 0 for name, row in rows.items()},
        [name for name, row in rows.items() if row.low == row.high != 0],
        against_itself(evidence, choices).row.against_baseline.verdict,
    )


def any_claim(found: Told) -> bool:
    return any(verdict != NO_CLAIM for verdict in found.verdicts.values())


@pytest.fixture(scope='module')
def values():
    return drawn(STUDIES)


@pytest.fixture(scope='module')
def reports(values):
    return [told(evidence_of(study)) for study in values]


def share(reports: list[Told], is_so) -> float:
    return np.mean([is_so(found) for found in reports])


def test_identical_methods_are_claimed_to_differ_in_few_studies(reports):
    assert len(reports) == 500
    assert share(reports, any_claim) <= LIMIT


def test_the_a_a_arm_is_claimed_to_differ_about_as_often_as_the_level_says(reports):
    assert 0.02 <= share(reports, lambda found: found.again != NO_CLAIM) <= LIMIT


def test_without_holm_many_studies_would_make_a_claim(reports):
    """And single intervals exclude zero about as often as they should: the limits above are not kept by blindness."""
    assert share(reports, lambda found: any(found.excluding_zero.values())) > 0.15
    assert 0.03 <= np.mean([[*found.excluding_zero.values()] for found in reports]) <= LIMIT


@pytest.mark.parametrize('seeds, pairs, spread', [(3, 64, 1.0), (3, 128, 0.25)])
def test_coarse_metrics_of_few_seeds_are_no_exception(seeds, pairs, spread):
    """Accuracies are whole pairs: three seeds often differ by one and the same number, which t takes for certainty."""
    values = 0.65 + spread * (drawn(200, seeds) - 0.65)
    values = np.round(values * pairs) / pairs
    reports = [told(evidence_of(study)) for study in values]
    assert share(reports, any_claim) <= LIMIT
    assert share(reports, lambda found: bool(found.points)) > 1.2 * LIMIT


def test_a_real_effect_is_found_and_its_twins_are_not():
    """Three standard deviations of a difference, in one of six methods."""
    values = drawn(100)
    values[:, 1] += 3 * OF_DIFFERENCE
    reports = [told(evidence_of(study)) for study in values]
    assert share(reports, lambda found: found.verdicts['method 0'] == BETTER) >= 0.8
    assert share(reports, lambda found: any(found.verdicts[name] != NO_CLAIM for name in METHODS[2:])) <= LIMIT


def test_choosing_settings_by_what_is_reported_for_methods_alone_invents_winners(values):
    """What is often done: the best of a grid for every method, the default for the baseline, all on one split."""
    values = values[:120].copy()
    values[..., 0] = values[..., 1]
    reports = []
    for study in values:
        evidence = evidence_of(study)
        untuned = dataclasses.replace(evidence.methods[0], trials=evidence.methods[0].trials[:1])
        reports.append(told(dataclasses.replace(evidence, methods=(untuned, *evidence.methods[1:]))))
    assert share(reports, lambda found: BETTER in found.verdicts.values()) > 0.2
    assert share(reports, lambda found: any(found.excluding_zero.values())) > 0.4


@pytest.mark.parametrize('seeds, times', [(3, 3), (5, 2)])
def test_normal_intervals_of_few_seeds_reject_too_often(values, seeds, times):
    """1.96 standard errors in place of t, with one setting and no correction: a true mean of zero is left out."""
    differences = (values[:, 1:-1, 0, :seeds, 1] - values[:, :1, 0, :seeds, 1]).reshape(-1, seeds)
    rejected = np.abs(differences.mean(axis=1)) > 1.96 * stats.sem(differences, axis=1)
    assert rejected.mean() > 0.05 * times
