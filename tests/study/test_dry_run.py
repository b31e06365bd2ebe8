"""A dry run says what is left of a study, and writes nothing."""

import pytest
import tiny_studies
import tiny_workers

from jaxpo import cli
from jaxpo.experiment import import_module
from jaxpo.study import dry_run, runner
from jaxpo.study.bundles import bundles
from jaxpo.study.design import expand
from jaxpo.study.evidence import words_of
from jaxpo.study.workshop import Workshop

WORDS = """\
import pathlib
import tiny_studies
from jaxpo.study.design import Method, Study
def get_study():
    base = tiny_studies.base(pathlib.Path(__file__).parent)
    grid = {'optimizer.schedule': ('linear', 'cosine'), 'train.steps': (2, 3)}
    return Study(base, {'dpo': Method({'dpo': {}})}, grid, seeds=(0,), cells_per_program=8)
"""


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv('COLUMNS', '160')
    monkeypatch.setattr(dry_run, '_SIDE', 64)


def files(folder):
    return sorted(path for path in folder.rglob('*') if '__pycache__' not in str(path))


def rows_of(said):
    """Cells of the table's rows."""
    return [[word.strip() for word in line.split('│')[1:-1]] for line in said.splitlines() if line.startswith('│')]


def test_words_stand_in_the_table_and_nothing_is_written(tmp_path, capsys):
    tiny_studies.base(tmp_path)
    path = tmp_path / 'experiment.py'
    path.write_text(WORDS)
    before = files(tmp_path)
    assert cli.main(['study', str(path), '--dry-run']) == 0
    assert files(tmp_path) == before
    said = capsys.readouterr().out
    (header,) = [line for line in said.splitlines() if line.startswith('┃')]
    names = [name.strip() for name in header.split('┃')[1:-1]]
    assert names == ['method', 'setting', 'cells', 'ended', 'tokens each', 'seconds each', 'device hours']
    rows = rows_of(said)
    settings = [f'schedule {schedule}, steps {steps}' for schedule in ('cosine', 'linear') for steps in (2, 3)]
    assert sorted(row[:4] for row in rows if row[0] == 'dpo') == [['dpo', words, '1', '0'] for words in settings]
    assert '8 cells in 2 programs' in said
    study = import_module(str(path)).get_study()
    workshop = Workshop(study, path, None, lambda filled: None)
    for cell in expand(study):
        bundle = next(bundle for bundle in bundles(study, expand(study), 8) if cell in bundle.cells)
        (row,) = [row for row in rows if row[:2] == [cell.method, words_of(cell.setting)]]
        assert row[4] == f'{workshop.tokens(bundle, cell):,}' and row[5].startswith('at least')


def test_what_was_measured_is_what_is_foreseen(tmp_path, capsys, monkeypatch):
    path = tiny_workers.write_module(tmp_path)
    assert cli.main(['study', str(path), '--dry-run']) == 0
    said = capsys.readouterr().out
    assert {row[5] for row in rows_of(said)} == {'not known'} and not (tmp_path / 'study').exists()

    (tmp_path / 'broken').write_text(tiny_workers.ids(tmp_path)[0])
    monkeypatch.setattr(runner.reporting, 'report', lambda words: 0)
    assert cli.main(['study', str(path)]) == 1
    before = files(tmp_path)
    capsys.readouterr()
    assert cli.main(['study', str(path), '--dry-run']) == 0
    assert files(tmp_path) == before
    rows = rows_of(capsys.readouterr().out)
    assert [row[1:4] for row in rows[:2]] == [['beta 0.1', '4', '4'], ['beta 0.3', '4', '4']]
    assert {row[5] for row in rows} == {'0.5'}
