"""From made-up files to findings: planted answers are found, and nothing is claimed where nothing is."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
from scipy import stats
from study import made_up

from jaxpo.errors import InputError
from jaxpo.study import records
from jaxpo.study.analysis import analyse
from jaxpo.study.records import Compute

EFFECTS = {'dpo': 0.0, 'good': 0.5, 'bad': -0.5, 'same': 0.0}
SPLITS = ('selection', 'report', 'train')


def scores(cell, scale=1.0):
    """Effects of methods, a better second rate, seeds that all methods share, and noise of each split."""
    level = EFFECTS[cell.method.split()[0]] + 0.1 * (cell.config.rate > 0.15) + made_up.noise(cell.seed).normal() / 5
    return {split: scale * (level + made_up.noise(cell.id, split).normal() / 50) for split in SPLITS}


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
    """Four methods, two rates, four seeds."""
    return made_up.write(tmp_path_factory.mktemp('planted') / 'study', planted_study(), scores)


def planted_study(**changes):
    return made_up.study(tuple(EFFECTS), **{'seeds': (0, 1, 2, 3), **changes})


@pytest.fixture(scope='module')
def found(planted):
    return analyse(planted)


def rows_of(found):
    return {row.method: row for row in (*found.leaderboard.rows, found.against_itself.row)}


def rewritten(root, target, change):
    """A copy of a study whose evaluation lines are `change(run, line)`."""
    shutil.copytree(root, target)
    for folder in (target / 'cells').iterdir():
        run = json.loads((folder / 'run.json').read_text())
        file = folder / 'metrics.jsonl'
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [change(run, line) if 'split' in line else line for line in lines]
        file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return target


def values_by_hand(root, split, step=made_up.STEPS[-1]):
    """(method, rate) -> metric by repeat, read from the files without the package."""
    values = {}
    for cell in json.loads((root / 'study.json').read_text())['design']['cells']:
        lines = (root / 'cells' / cell['id'] / 'metrics.jsonl').read_text().splitlines()
        values.setdefault((cell['method'], cell['setting']['rate']), []).extend(
            line['score'] for line in map(json.loads, lines) if line.get('split') == split and line['step'] == step
        )
    return {name: np.array(numbers) for name, numbers in values.items()}


def test_a_planted_effect_is_found_and_equal_methods_give_no_claim(found):
    verdicts = {name: row.against_baseline and row.against_baseline.verdict for name, row in rows_of(found).items()}
    assert verdicts == {'good': 'better', 'same': 'no claim', 'dpo': None, 'bad': 'worse', 'dpo (A/A)': 'no claim'}
    assert [row.rank for row in found.leaderboard.rows] == [1, 2, 3, 4]
    assert found.leaderboard.rows[0].method == 'good' and found.leaderboard.rows[-1].method == 'bad'
    assert '1 is better: good (+' in found.leaderboard.headline and '1 is worse: bad (-' in found.leaderboard.headline


def test_conclusions_say_what_follows_and_what_does_not(planted, found, tmp_path):
    can, cannot = found.conclusions.can, found.conclusions.cannot
    for text, verdict, method in zip(can, ('better', 'worse'), ('good', 'bad')):
        difference = rows_of(found)[method].against_baseline.difference
        assert text.startswith(f'1 method is {verdict} than dpo in score') and f'{method} {difference:+.3g} [' in text
    smallest = min(row.against_baseline.detectable for row in found.leaderboard.rows if not row.is_baseline)
    assert any(f'{smallest:.3g} (where seeds differ least)' in text for text in can)
    for part in (
        'not shown to equal',
        'Seeds vary what',
        '2 settings',
        '4 seeds make',
        '12 held-out pairs of 8 prompts',
    ):
        assert any(part in text for text in cannot), part
    assert not any('implicit reward' in text for text in cannot)
    shutil.copytree(planted, tmp_path / 'study')
    file = tmp_path / 'study' / 'study.json'
    file.write_text(file.read_text().replace('"metric": "score"', '"metric": "rewards/accuracies"'))
    assert any('own implicit reward' in text for text in analyse(tmp_path / 'study').conclusions.cannot)


def test_the_leaderboard_is_what_numpy_and_scipy_say(planted, found):
    selection, report = (values_by_hand(planted, split) for split in ('selection', 'report'))
    chosen = {name: max((0.1, 0.2), key=lambda rate: selection[name, rate].mean()) for name in [*EFFECTS, 'dpo (A/A)']}
    base = report['dpo', chosen['dpo']]
    p_values = {name: stats.ttest_rel(report[name, chosen[name]], base).pvalue for name in ('good', 'bad', 'same')}
    by_p = sorted(p_values, key=p_values.get)
    adjusted, running = {}, 0.0
    for place, name in enumerate(by_p):
        running = max(running, min(1.0, (3 - place) * p_values[name]))
        adjusted[name] = running
    for name, row in rows_of(found).items():
        mine = report[name, chosen[name]]
        assert row.setting == f'rate {chosen[name]}'
        assert row.mean == pytest.approx(mine.mean(), rel=1e-12)
        assert row.sd == pytest.approx(mine.std(ddof=1), rel=1e-12)
        assert row.values == tuple(mine) and row.n == 4 and row.failed == 0
        assert row.selection_mean == pytest.approx(selection[name, chosen[name]].mean(), rel=1e-12)
        if name == 'dpo':
            continue
        difference, got = mine - base, row.against_baseline
        error = difference.std(ddof=1) / 2
        assert got.n == 4 and got.difference == pytest.approx(difference.mean(), rel=1e-12)
        ends = stats.t.interval(0.95, 3, difference.mean(), error)
        assert (got.low, got.high) == pytest.approx(ends, rel=1e-9)
        assert got.p == pytest.approx(stats.ttest_rel(mine, base).pvalue, rel=1e-9)
        assert got.adjusted_p == (pytest.approx(adjusted[name], rel=1e-9) if name in adjusted else None)
        assert got.probability_better == pytest.approx(stats.t.cdf(difference.mean() / error, 3), rel=1e-9)
        edge, shift = stats.t.ppf(0.975, 3), got.detectable / error
        power = stats.nct.sf(edge, 3, shift) + stats.nct.cdf(-edge, 3, shift)
        assert power == pytest.approx(0.8, abs=1e-6)


def test_the_report_split_has_no_say_in_the_choice(planted, found, tmp_path):
    def other(split):
        """The first rate becomes the best one on this split."""
        return lambda run, line: (
            line
            | ({'score': line['score'] + (1 if run['setting']['rate'] == 0.1 else 0)} if line['split'] == split else {})
        )

    before = rows_of(found)
    report = rows_of(analyse(rewritten(planted, tmp_path / 'report', other('report'))))
    assert {name: (row.setting, row.selection_mean) for name, row in report.items()} == {
        name: (row.setting, row.selection_mean) for name, row in before.items()
    }
    selection = rows_of(analyse(rewritten(planted, tmp_path / 'selection', other('selection'))))
    assert {row.setting for row in before.values()} == {'rate 0.2'}
    assert {row.setting for row in selection.values()} == {'rate 0.1'}


def test_equal_settings_are_settled_by_the_grid(planted, tmp_path):
    same = rewritten(planted, tmp_path / 'same', lambda run, line: line | {'score': 1.0})
    assert {row.setting for row in rows_of(analyse(same)).values()} == {'rate 0.1'}
    again = analyse(same).against_itself
    assert again.row.against_baseline.difference == 0 and again.row.against_baseline.verdict == 'no claim'


def test_lower_is_better_is_the_mirror_image(planted, found, tmp_path):
    mirrored = rewritten(planted, tmp_path / 'study', lambda run, line: line | {'score': -line['score']})
    held = json.loads((mirrored / 'study.json').read_text())
    held['design']['higher_is_better'] = False
    (mirrored / 'study.json').write_text(json.dumps(held))
    other = analyse(mirrored)
    for name, row in rows_of(found).items():
        mirror = rows_of(other)[name]
        assert (mirror.rank, mirror.setting, mirror.mean) == (row.rank, row.setting, -row.mean)
        if row.against_baseline is not None:
            one, two = row.against_baseline, mirror.against_baseline
            turned = dataclasses.replace(one, difference=-one.difference, low=-one.high, high=-one.low)
            assert turned == two
    for one, two in zip(found.robustness.rows, other.robustness.rows):
        assert (two.interquartile_mean, two.worst_quartile) == (-one.interquartile_mean, -one.worst_quartile)
        assert (two.share_above_start, two.share_above_baseline) == (one.share_above_start, one.share_above_baseline)
        assert two.best_of == tuple(-value for value in one.best_of)
        mirror = [dataclasses.replace(point, threshold=-point.threshold) for point in reversed(two.profile)]
        assert [point.share for point in mirror] == [point.share for point in one.profile]
        assert [point.threshold for point in mirror] == pytest.approx([point.threshold for point in one.profile])
    assert other.against_itself.excluding_zero == found.against_itself.excluding_zero


def test_the_baseline_is_held_against_itself_at_every_setting(planted, found):
    report = values_by_hand(planted, 'report')
    p_values = [stats.ttest_rel(report['dpo (A/A)', rate], report['dpo', rate]).pvalue for rate in (0.1, 0.2)]
    again = found.against_itself
    assert (again.settings_compared, again.excluding_zero) == (2, sum(p < 0.05 for p in p_values))
    assert again.expected == pytest.approx(0.1)
    assert again.row.method == 'dpo (A/A)' and again.row.against_baseline.adjusted_p is None


def failing(which):
    """Outcomes where `which(cell)` names a state other than finished, or None for a cell that has not ended."""

    def outcome(cell, found):
        state = which(cell)
        if state is None:
            return None
        return made_up.finished(cell, found) if state == 'finished' else made_up.ended(state)(cell)

    return outcome


@pytest.fixture(scope='module')
def with_failures(tmp_path_factory):
    """At its better rate `good` diverges once; `bad` has an error at every rate, two at the better one."""

    def which(cell):
        better = cell.setting['rate'] == 0.2
        if cell.method == 'good' and better and cell.repeat == 1:
            return 'diverged'
        if cell.method == 'bad' and cell.repeat in ((0, 2) if better else (0,)):
            return 'error'
        return 'finished'

    root = tmp_path_factory.mktemp('failures') / 'study'
    made = made_up.study(('dpo', 'good', 'bad'), seeds=(0, 1, 2))
    return analyse(made_up.write(root, made, scores, outcome=failing(which)))


def test_failed_cells_are_counted_and_their_settings_passed_over(with_failures):
    counts = {one.method: (one.finished, one.diverged, one.error) for one in with_failures.progress.methods}
    assert counts == {'dpo': (6, 0, 0), 'good': (5, 1, 0), 'bad': (3, 0, 3), 'dpo (A/A)': (6, 0, 0)}
    whole = with_failures.progress.all
    assert (whole.planned, whole.finished, whole.diverged, whole.error, whole.missing) == (24, 20, 1, 3, 0)
    assert '1 diverged (good 1)' in with_failures.progress.caption
    rows = rows_of(with_failures)
    assert rows['dpo'].setting == 'rate 0.2'
    assert (rows['good'].setting, rows['good'].n, rows['good'].failed, rows['good'].note) == ('rate 0.1', 3, 0, '')
    assert (rows['bad'].setting, rows['bad'].n, rows['bad'].failed) == ('rate 0.1', 2, 1)
    assert 'every setting has a failed' in rows['bad'].note and '1 of 3 seeds' in rows['bad'].note
    assert rows['bad'].values[0] is None and rows['bad'].against_baseline.n == 2 and len(rows['bad'].cells) == 2
    assert any('4 cells failed' in text for text in with_failures.conclusions.cannot)
    states = [cell.state for cell in with_failures.provenance.cells]
    assert (states.count('diverged'), states.count('error')) == (1, 3)
    assert [cell.error for cell in with_failures.provenance.cells if cell.state == 'diverged'] == ['diverged at step 5']


def test_failed_runs_are_worse_than_every_number(with_failures):
    rows = {row.method: row for row in with_failures.robustness.rows}
    good, bad = rows['good'], rows['bad']
    assert (good.runs, good.failed, bad.runs, bad.failed) == (5, 1, 3, 3)
    # Of 6 runs a quarter is one from either end for the middle, two for the worst: `good` loses but one there.
    report = sorted(cell.report for cell in with_failures.provenance.cells if cell.method == 'good' and cell.report)
    assert good.interquartile_mean == pytest.approx(np.mean(report[:4]), rel=1e-12)
    assert good.worst_quartile is None and bad.interquartile_mean is None and bad.worst_quartile is None
    assert good.share_above_start == pytest.approx(5 / 6) and good.profile[0].share == pytest.approx(5 / 6)
    assert good.best_of[0] is None and good.best_of[1] == pytest.approx(rows_of(with_failures)['good'].mean)
    assert bad.best_of == (None, None)
    assert [cell.failed for cell in bad.grid] == [1, 2] and [cell.chosen for cell in bad.grid] == [True, False]


def test_a_study_that_goes_on_is_reported_as_far_as_it_has_come(tmp_path):
    made = made_up.study(('dpo', 'good', 'bad', 'same'), seeds=(0, 1, 2), rates=(0.1,))

    def until(which):
        return failing(lambda cell: 'finished' if which(cell) else None)

    nothing = analyse(made_up.write(tmp_path / 'nothing', made, scores, outcome=until(lambda cell: False)))
    assert nothing.progress.all.missing == 15 and not nothing.progress.complete
    assert all(row.mean is None and row.rank is None for row in nothing.leaderboard.rows)
    assert nothing.frontier is None and nothing.length is None and nothing.health is None and nothing.learning is None
    assert 'No method can be compared' in nothing.leaderboard.headline and 'Unfinished' in nothing.leaderboard.headline

    part = analyse(
        made_up.write(
            tmp_path / 'part',
            made,
            scores,
            outcome=until(lambda cell: cell.method in ('dpo', 'good') or (cell.method, cell.repeat) == ('bad', 0)),
        )
    )
    rows = rows_of(part)
    good, bad = rows['good'].against_baseline, rows['bad'].against_baseline
    # Methods that are still to come count in the correction: three were planned.
    assert good.verdict == 'better' and good.adjusted_p == pytest.approx(3 * good.p, rel=1e-12)
    assert (bad.n, bad.low, bad.p, bad.adjusted_p, bad.verdict) == (1, None, None, None, 'no claim')
    assert bad.difference is not None
    assert rows['same'].against_baseline.n == 0 and rows['same'].mean is None
    assert part.against_itself.row.against_baseline.verdict == 'no claim'
    assert any('8 cells of 15 have not ended' in text for text in part.conclusions.cannot)


def test_what_was_added_to_a_design_is_shown(tmp_path):
    made = made_up.study(('dpo', 'good'), seeds=(0, 1), rates=(0.1,))
    root = made_up.write(tmp_path / 'study', made, scores)
    assert analyse(root).design.extensions == ()
    made_up.write(root, made_up.study(('dpo', 'good', 'bad'), seeds=(0, 1), rates=(0.1,)), scores)
    found = analyse(root)
    (extension,) = found.design.extensions
    assert (extension.cells_added, extension.methods, extension.cells_done_before) == (2, ('bad',), 6)
    assert any('added to 1 time' in text and '6 cells' in text for text in found.conclusions.cannot)


def test_the_design_is_what_was_said_before(found):
    design = found.design
    assert (design.question, design.baseline, design.again) == ('Which is best?', 'dpo', 'dpo (A/A)')
    assert (design.trials, design.cells, design.seeds, design.seeds_again) == (2, 40, (0, 1, 2, 3), (4, 5, 6, 7))
    assert [method.method for method in design.methods] == list(EFFECTS)
    assert {method.trials for method in design.methods} == {2}
    assert design.methods[1].grid[0].field == 'rate' and design.methods[1].grid[0].values == ('0.1', '0.2')
    assert design.methods[1].otherwise == (('label', 'good'),)
    assert ('rate', '0.1') in design.base and not any(field.startswith('objective') for field, _ in design.base)


def test_rewards_are_compared_at_the_kl_that_all_reached(tmp_path):
    """Reward is a line in KL whose slope is the score; `bad` goes less far than the others."""

    def outcome(cell, found):
        reach, kls = 0.8 if cell.method == 'bad' else 2.0, (0.0, 0.1, 0.5, 1.0)
        lines = [
            {'step': step, 'split': split, 'kl': part * reach, 'reward': part * reach * score, 'score': score}
            for split, score in found.items()
            for step, part in enumerate(kls)
        ]
        return dataclasses.replace(made_up.finished(cell, found), lines=lines, pairs={})

    def slopes(cell):
        slope = {'dpo': 1.0, 'good': 2.0, 'bad': 0.5}[cell.method.split()[0]] + 0.01 * cell.seed * (cell.seed % 3)
        return dict.fromkeys(SPLITS, slope)

    made = made_up.study(('dpo', 'good', 'bad'), seeds=(0, 1, 2), rates=(0.1,))
    root = made_up.write(tmp_path / 'study', made, slopes, outcome=outcome)
    frontier = analyse(root).frontier
    assert [at.kl for at in frontier.matched] == pytest.approx([0.2, 0.4, 0.8, 2.0])
    by_seed = np.array([0.0, 0.01, 0.04])
    for at in frontier.matched:
        rows = {row.method: row for row in at.rows}
        assert rows['dpo'].reward == pytest.approx(at.kl * (1.0 + by_seed.mean()), rel=1e-12)
        assert rows['good'].reward == pytest.approx(at.kl * (2.0 + by_seed.mean()), rel=1e-12)
        assert rows['good'].against_baseline.difference == pytest.approx(at.kl, rel=1e-9)
        if at.kl < 2:
            assert rows['bad'].against_baseline.difference == pytest.approx(-0.5 * at.kl, rel=1e-9)
        else:
            assert (rows['bad'].reward, rows['bad'].note, rows['bad'].n) == (None, 'not reached', 0)
    assert (frontier.area_from, frontier.area_up_to) == (0.2, 0.8)
    areas = {method.method: method.area for method in frontier.methods}
    assert areas['good'] == pytest.approx(0.5 * (2.0 + by_seed.mean()), rel=1e-12)
    front = next(method.front for method in frontier.methods if method.method == 'dpo')
    assert [point.kl for point in front] == pytest.approx([0.0, 0.2, 1.0, 2.0]) and len(frontier.methods) == 4
    assert len(frontier.methods[0].points) == 12


def test_rewards_are_not_compared_between_the_reference_and_what_was_first_evaluated(tmp_path):
    """All lie on one curve, `slow` with a point where the chord from the reference to the other's first is below it."""

    def outcome(cell, found):
        kls = (0.0, 0.2, 1.0) if cell.method == 'slow' else (0.0, 0.8, 1.0)
        lines = [
            {'step': step, 'split': split, 'kl': kl, 'reward': kl**0.5 + 0.001 * cell.seed, 'score': 1.0}
            for split in found
            for step, kl in enumerate(kls)
        ]
        return dataclasses.replace(made_up.finished(cell, found), lines=lines, pairs={})

    made = made_up.study(('dpo', 'slow'), seeds=(0, 1, 2), rates=(0.1,))
    root = made_up.write(tmp_path / 'study', made, lambda cell: dict.fromkeys(SPLITS, 1.0), outcome=outcome)
    frontier = analyse(root).frontier
    assert [at.kl for at in frontier.matched] == [1.0] and (frontier.area_from, frontier.area_up_to) == (0.8, 1.0)
    assert all(abs(row.reward - 1.0) < 0.01 for row in frontier.matched[0].rows)


def test_robustness_is_over_the_whole_grid(planted, found):
    report, selection = values_by_hand(planted, 'report'), values_by_hand(planted, 'selection')
    bar = report['dpo', 0.2].mean()
    for row in found.robustness.rows:
        runs = np.sort(np.concatenate([report[row.method, rate] for rate in (0.1, 0.2)]))
        assert row.interquartile_mean == pytest.approx(runs[2:6].mean(), rel=1e-12)
        assert row.worst_quartile == pytest.approx(runs[:2].mean(), rel=1e-12)
        assert row.share_above_baseline == np.mean(runs > bar) and row.share_above_start == np.mean(runs > 0)
        for point in row.profile:
            assert point.share == np.mean(runs > point.threshold)
        means = [(selection[row.method, rate].mean(), report[row.method, rate].mean()) for rate in (0.1, 0.2)]
        assert row.best_of == pytest.approx((np.mean([mean for _, mean in means]), max(means)[1]), rel=1e-12)
        assert [cell.report_mean for cell in row.grid] == pytest.approx([mean for _, mean in means], rel=1e-12)
    assert found.robustness.start == 0.0


def test_health_and_length_are_those_of_the_chosen_cells(planted, found):
    """By hand from pairs.jsonl."""
    for row, lengths in zip(found.health.rows, found.length.rows):
        chosen = {cell for board in found.leaderboard.rows if board.method == row.method for cell in board.cells}
        changes, falling, accuracies, correlations, margins = [], [], [], [], []
        for cell in sorted(chosen):
            lines = (planted / 'cells' / cell / 'pairs.jsonl').read_text().splitlines()
            held = next(line for line in map(json.loads, lines) if line['split'] == 'report')
            held = {name: np.array(values) for name, values in held.items() if name != 'split'}
            change = held['chosen_logps'] - held['chosen_start_logps']
            margin = held['chosen_reward'] - held['rejected_reward']
            changes.append(change.mean())
            falling.append(np.mean(change < 0))
            accuracies.append(np.mean(margin > 0))
            margins.append(margin.mean())
            correlations.append(np.corrcoef(margin, held['chosen_tokens'] - held['rejected_tokens'])[0, 1])
        assert row.chosen_change.mean == pytest.approx(np.mean(changes), rel=1e-12)
        assert (row.chosen_change.lowest, row.chosen_change.highest) == pytest.approx((min(changes), max(changes)))
        assert row.chosen_falling.mean == pytest.approx(np.mean(falling))
        assert row.accuracy_report.mean == pytest.approx(np.mean(accuracies)) == pytest.approx(lengths.accuracy.mean)
        assert row.margin.mean == pytest.approx(np.mean(margins))
        assert lengths.correlation.mean == pytest.approx(np.mean(correlations), rel=1e-9)
        assert row.accuracy_gap.mean == pytest.approx(row.accuracy_train.mean - row.accuracy_report.mean)
        assert sum(part.count for part in row.calibration) == 4 * made_up.PAIRS
        assert 1 <= row.gradient_norm_median.mean <= row.gradient_norm_largest.mean <= 2 and row.finite_share == 1
        assert (lengths.sampled_before.mean, lengths.sampled_after.mean) == (20, 30)
    assert found.length.pairs == made_up.PAIRS


def test_an_accuracy_is_compared_by_seeds_and_prompts_where_there_are_pairs(found):
    for row in found.leaderboard.rows:
        if row.is_baseline:
            assert row.by_prompt is None
            continue
        accuracies = {one.method: one.accuracy_report.mean for one in found.health.rows}
        assert (row.by_prompt.seeds, row.by_prompt.prompts) == (4, made_up.PROMPTS)
        assert row.by_prompt.difference == pytest.approx(accuracies[row.method] - accuracies['dpo'], abs=1e-12)
        assert row.by_prompt.low < row.by_prompt.difference < row.by_prompt.high


def test_curves_are_over_seeds(planted, found):
    half = values_by_hand(planted, 'report', step=5)
    for curve in found.learning.curves:
        assert [point.step for point in curve.metric] == list(made_up.STEPS)
        middle, mine = curve.metric[1], half[curve.method, 0.2]
        assert (middle.mean, middle.lowest, middle.highest, middle.n) == pytest.approx(
            (mine.mean(), mine.min(), mine.max(), 4)
        )
        assert [point.step for point in curve.loss] == list(range(1, 11)) and curve.loss[0].n == 4


def test_compute_counts_failed_cells_too(with_failures):
    rows = {row.method: row for row in with_failures.compute.rows}
    assert (rows['dpo'].cells, rows['dpo'].tokens, rows['dpo'].seconds, rows['dpo'].device_seconds) == (6, 6000, 15, 30)
    assert (rows['bad'].cells, rows['bad'].tokens, rows['bad'].device_seconds) == (6, 4500, 18)
    assert with_failures.compute.total.cells == 24 and with_failures.compute.total.tokens_per_second > 0


def test_cells_of_other_versions_are_said_to_be(planted, found, tmp_path):
    assert found.provenance.mixed == () and found.provenance.files == 3 * 40
    assert f'jaxpo report {found.design.name}' == found.provenance.command
    other = rewritten(planted, tmp_path / 'study', lambda run, line: line)
    run = next(iter(sorted((other / 'cells').iterdir()))) / 'run.json'
    run.write_text(run.read_text().replace('"commit": "c0ffee"', '"commit": "decaf (modified)"'))
    mixed = analyse(other)
    assert mixed.provenance.mixed == ('commit',) and mixed.provenance.cells_sha256 != found.provenance.cells_sha256
    assert mixed.provenance.design_sha256 == found.provenance.design_sha256
    assert '1 cell ran code that differed' in mixed.provenance.caption


def test_nothing_is_no_number(found):
    """None stands where there is none: NaN and infinity would not be JSON."""

    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list | tuple):
            return [number for part in value for number in numbers(part)]
        return [value] if isinstance(value, float) else []

    assert all(math.isfinite(number) for number in numbers(dataclasses.asdict(found)))


def test_values_that_are_not_finite_count_as_failed(planted, tmp_path):
    def change(run, line):
        broken = run['method'] == 'good' and run['setting']['rate'] == 0.2 and run['repeat'] == 0
        return line | ({'score': math.nan} if broken else {})

    found = analyse(rewritten(planted, tmp_path / 'study', change))
    assert found.progress.all.unmeasured == 1 and rows_of(found)['good'].setting == 'rate 0.1'


def test_what_cannot_be_reported_is_refused(planted, tmp_path):
    with pytest.raises(InputError, match='holds no study'):
        analyse(tmp_path)
    shutil.copytree(planted, tmp_path / 'study')
    file = tmp_path / 'study' / 'study.json'
    file.write_text(file.read_text().replace('"metric": "score"', '"metric": "scores"'))
    with pytest.raises(InputError, match="Did you mean 'score'"):
        analyse(tmp_path / 'study')


def test_a_program_shared_by_cells_is_counted_once(tmp_path):
    def outcome(cell, found):
        return dataclasses.replace(made_up.finished(cell, found), compute=Compute(0.5, 10, 100, 4, 8))

    made = made_up.study(('dpo',), seeds=(0,), rates=(0.1,))
    found = analyse(made_up.write(tmp_path / 'study', made, scores, outcome=outcome))
    assert (found.compute.total.seconds, found.compute.total.device_seconds) == (1.0, 4.0)
    assert found.compute.total.cells_at_once == 8 and 'up to 8 at once' in found.compute.caption
    assert 'nothing to compare' in found.leaderboard.headline and records.states(tmp_path / 'study')


def test_a_metric_of_samples_is_not_said_to_rest_on_pairs(tmp_path):
    def outcome(cell, found):
        told = made_up.finished(cell, found)
        return dataclasses.replace(told, lines=[{**line, 'score_standard_error': 0.1} for line in told.lines])

    made = made_up.study(('dpo', 'good'), seeds=(0, 1), rates=(0.1,))
    found = analyse(made_up.write(tmp_path / 'study', made, scores, outcome=outcome))
    assert any('score is of samples of held-out prompts' in text for text in found.conclusions.cannot)
    assert not any('held-out pairs' in text for text in found.conclusions.cannot)


def test_pairs_of_each_seed_are_not_crossed_with_seeds(tmp_path):
    """No prompts are common to the seeds then, and intervals over seeds are of other pairs too."""

    def outcome(cell, found):
        told = made_up.finished(cell, found)
        pairs = {
            split: dataclasses.replace(numbers, prompt=numbers.prompt[::-1] + cell.seed)
            for split, numbers in told.pairs.items()
        }
        return dataclasses.replace(told, pairs=pairs)

    made = made_up.study(('dpo', 'good'), seeds=(0, 1), rates=(0.1,))
    found = analyse(made_up.write(tmp_path / 'study', made, scores, outcome=outcome))
    assert [row.by_prompt for row in found.leaderboard.rows] == [None, None]
    assert any('Each seed has 12 held-out pairs of its own' in text for text in found.conclusions.cannot)
    assert not any('the same for all seeds' in text for text in found.conclusions.cannot)
