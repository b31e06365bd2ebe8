"""`jaxpo report`: all files, the same to the byte whoever asks, and a study that is none refused."""

import os
import subprocess
import sys

import pytest
from study import made_up

from jaxpo import cli
from jaxpo.errors import InputError
from jaxpo.study.reporting import report

COMMAND = 'import sys; from jaxpo.study.reporting import report; sys.exit(report(sys.argv[1:]))'


def scores(cell):
    level = {'good': 0.5}.get(cell.method, 0.0) + made_up.noise(cell.seed).normal() / 5
    return {split: level + made_up.noise(cell.id, split).normal() / 50 for split in ('selection', 'report', 'train')}


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    made = made_up.study(('dpo', 'good', 'same'), seeds=(0, 1, 2), rates=(0.1,))
    return made_up.write(tmp_path_factory.mktemp('report') / 'study', made, scores), made


def files(root):
    folder = root / 'report'
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_the_report_is_the_same_to_the_byte_however_it_is_made(study, tmp_path, capsys):
    root, made = study
    assert report([str(root)]) == 0
    first = files(root)
    assert {'report.html', 'findings.json', 'tables.tex', 'leaderboard.csv', 'figures/leaderboard.svg'} < set(first)
    said = capsys.readouterr().out
    assert 'good' in said and 'better' in said and 'report.html' in said.replace('\n', '')
    report([str(root)])
    assert files(root) == first
    subprocess.run(
        [sys.executable, '-c', COMMAND, str(root)],
        check=True,
        capture_output=True,
        env={**os.environ, 'PYTHONHASHSEED': '7', 'JAX_PLATFORMS': 'cpu'},
    )
    assert files(root) == first
    shuffled = made_up.write(tmp_path / 'elsewhere', made, scores, order=lambda cells: cells[::-1])
    report([str(shuffled)])
    assert files(shuffled) == first


def test_a_number_that_changes_changes_the_report(study, tmp_path):
    root, made = study
    report([str(root)])

    def others(cell):
        return {split: score + (0.001 if cell.seed == 1 else 0) for split, score in scores(cell).items()}

    other = made_up.write(tmp_path / 'study', made, others)
    report([str(other)])
    assert files(other)['findings.json'] != files(root)['findings.json']


def test_half_a_study_has_a_report_that_says_so(study, tmp_path, capsys):
    _, made = study

    def outcome(cell, found):
        return made_up.finished(cell, found) if cell.method == 'dpo' else None

    root = made_up.write(tmp_path / 'study', made, scores, outcome=outcome)
    assert report([str(root)]) == 0
    said = ' '.join(capsys.readouterr().out.split())
    assert '12 cells planned, 3 finished; 9 not ended yet (good 3, same 3, dpo (A/A) 3)' in said
    assert 'No method can be compared' in said
    assert b'not ended' in files(root)['report.html']


def test_what_is_no_study_is_refused(tmp_path, capsys):
    with pytest.raises(InputError, match='holds no study'):
        report([str(tmp_path / 'nowhere')])
    assert cli.main(['report', str(tmp_path)]) == 2
    assert 'holds no study' in capsys.readouterr().err and not (tmp_path / 'report').exists()


def test_help_needs_no_study(capsys):
    assert report(['--help']) == 0
    assert 'byte' in capsys.readouterr().out
