"""`jaxpo study` as a user meets it: help, changes by the command line, and bad input before anything is written."""

import pathlib

import pytest
import tiny_workers

from jaxpo import cli
from jaxpo.study import command

BROKEN = """\
import dataclasses, pathlib
import tiny_workers
from jaxpo.config import Config, Model
from jaxpo.study.design import Method, Study
FOLDER = pathlib.Path(__file__).parent
def get_study():
    return {study}
def run_cells(cells):
    raise AssertionError('it was not to run')
"""
OWN = 'tiny_workers.study(FOLDER)'
LANGUAGE_MODEL = "Study(Config(str(FOLDER / 'study'), Model('nowhere')), {'dpo': Method({'dpo': {}})})"


def module(folder, study=OWN, more='', run_cells=True):
    path = folder / 'experiment.py'
    text = BROKEN.replace('{study}', study)
    path.write_text((text if run_cells else text.split('def run_cells')[0]) + more)
    return path


def plan_of(path, *words):
    known, overrides = command._parser().parse_known_args([str(path), *words])
    return command.load(known.experiment, overrides, known)


def refused(capsys, *words):
    """What is said where the exit code is 2."""
    try:
        code = cli.main(['study', *map(str, words)])
    except SystemExit as stopped:
        code = stopped.code
    said = capsys.readouterr()
    assert code == 2 and 'Traceback' not in said.err
    return ' '.join((said.err + said.out).split())


def test_help_needs_no_study(capsys, tmp_path):
    assert cli.main(['study', '--help']) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ('--dry-run', '--shard', '--seeds', '--retry', '--cells-per-program'))
    assert cli.main(['study']) == 2
    with pytest.raises(SystemExit) as stopped:
        cli.main(['study', str(module(tmp_path)), '--help'])
    assert stopped.value.code == 0 and '--optimizer.learning-rate' in capsys.readouterr().out


def test_fields_of_the_base_are_changed_for_all_cells(tmp_path):
    plain, changed = plan_of(module(tmp_path)), plan_of(module(tmp_path), '--optimizer.learning-rate', '0.25')
    assert {cell.config.optimizer.learning_rate for cell in changed.cells} == {0.25}
    assert not {cell.id for cell in plain.cells} & {cell.id for cell in changed.cells}
    elsewhere = plan_of(module(tmp_path), '--output', str(tmp_path / 'elsewhere'))
    assert [cell.id for cell in plain.cells] == [cell.id for cell in elsewhere.cells]
    assert elsewhere.cells[0].config.output == str(tmp_path / 'elsewhere' / 'cells' / plain.cells[0].id)
    assert str(elsewhere.root) == str(tmp_path / 'elsewhere')


def test_seeds_and_programs_are_changed_by_words_of_their_own(tmp_path):
    plan = plan_of(module(tmp_path), '--seeds', '3, 7', '--cells-per-program', '4', '--lanes', '2')
    assert plan.study.seeds == (3, 7) and len(plan.cells) == 12
    assert {cell.seed for cell in plan.cells} == {3, 7, 8, 12}
    assert (plan.study.cells_per_program, plan.study.lanes) == (4, 2)


def test_own_cells_are_bundled_by_method(tmp_path):
    found = plan_of(module(tmp_path)).bundles()
    assert [[cell.method for cell in bundle.cells] for bundle in found] == [
        [name] * 8 for name in ('dpo', 'ipo', 'dpo (A/A)')
    ]


@pytest.mark.parametrize(
    'words, message',
    [
        (['--optimizer.lerning-rate', '1'], 'optimizer.learning-rate'),
        (['--optimizer.learning-rate', 'fast'], 'fast'),
        (['--train.seed', '3'], '--seeds'),
        (['--shard', '0/2'], '--shard: I/N'),
        (['--shard', '3/2'], '--shard: I/N'),
        (['--shard', '1'], '--shard: I/N'),
        (['--shard', 'a/b'], '--shard: I/N'),
        (['--seeds', '1,x'], '--seeds: whole numbers'),
        (['--seeds', '1,1'], 'each once'),
        (['--seeds', ''], '--seeds'),
        (['--cells-per-program', '0'], 'whole number above 0'),
        (['--lanes', '-1'], 'whole number above 0'),
        (['--worker', '../me'], 'worker'),
    ],
)
def test_bad_words_are_refused_before_anything_is_written(words, message, tmp_path, capsys):
    path = module(tmp_path)
    assert message in refused(capsys, path, *words)
    assert not (tmp_path / 'study').exists()


METHODS = "tiny_workers.dataclasses.replace(tiny_workers.study(FOLDER), methods={'dpo': Method(%s)})"


@pytest.mark.parametrize(
    'study, message',
    [
        (METHODS % "{'dppo': {}}", "Unknown loss 'dppo'. Did you mean 'dpo'"),
        (METHODS % "{'dpo': {'betta': 1.0}}", "'betta'. Did you mean 'beta'"),
        (METHODS % "{'dpo': {}}, {'objective.dpo.beta': (0.1, -0.1)}", 'beta is above 0'),
        (METHODS % "{'dpo': {}}, {'objective.dpo.bta': (0.1,)}", "'bta'. Did you mean 'beta'"),
        (METHODS % "{'dpo': {}}, settings={'trian.steps': 3}", "'trian'. Did you mean 'train'"),
        ("'dpo'", 'get_study() returned str'),
    ],
)
def test_a_bad_study_is_refused_before_anything_is_written(study, message, tmp_path, capsys):
    assert message in refused(capsys, module(tmp_path, study))
    assert not (tmp_path / 'study').exists()


@pytest.mark.parametrize('dry', [[], ['--dry-run']])
def test_a_language_model_that_cannot_be_is_refused_before_anything_is_written(dry, tmp_path, capsys):
    path = module(tmp_path, LANGUAGE_MODEL, run_cells=False)
    assert 'nowhere' in refused(capsys, path, *dry)
    assert 'learning_rate must be positive' in refused(capsys, path, '--optimizer.learning-rate', '-1', *dry)
    assert not (tmp_path / 'study').exists()


def test_a_module_without_a_study_is_told_what_is_missing(tmp_path, capsys):
    path = tmp_path / 'experiment.py'
    path.write_text('')
    assert 'defines no get_study()' in refused(capsys, path)
    assert 'experiment.py' in refused(capsys, tmp_path / 'experimnt.py')
    bare = module(tmp_path, run_cells=False)
    assert 'defines no run_cells()' in refused(capsys, bare)


def test_another_design_is_refused_and_a_larger_one_recorded(tmp_path, capsys):
    path = tiny_workers.write_module(tmp_path)
    assert cli.main(['study', str(path), '--seeds', '0,1']) == 0
    ran = tiny_workers.ran(tmp_path)
    said = refused(capsys, path, '--seeds', '0,1', '--optimizer.learning-rate', '0.25')
    assert 'another design: 12 of its cells' in said
    assert 'of another design' in refused(capsys, path, '--seeds', '5,6')
    assert tiny_workers.ran(tmp_path) == ran
    # With more seeds all cells stay; the baseline's second arm moves on to seeds that nobody has.
    assert cli.main(['study', str(path)]) == 0
    assert sorted(tiny_workers.ran(tmp_path)) == sorted(tiny_workers.ids(tmp_path))
    held = (tmp_path / 'study' / 'study.json').read_text()
    assert '"cells_done_before": 12' in held
    assert pathlib.Path(tmp_path / 'study' / 'report' / 'report.html').exists()


def test_an_objective_that_is_not_read_cannot_be_changed(tmp_path, capsys):
    more = "tiny_workers.dataclasses.replace(%s, base=tiny_workers.Base(str(FOLDER / 'study'), {'dpo': {'beta': 0.5}}))"
    said = refused(capsys, module(tmp_path, more % OWN), '--objective.dpo.beta', '0.2')
    assert '--objective has no effect' in said
