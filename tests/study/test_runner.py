"""Killed, stopped, failing, shared: a study ends complete, no finished cell is run twice, and none is dropped."""

import json
import os
import pathlib
import shutil
import signal

import pytest
import tiny_studies
import tiny_workers

from jaxpo import cli, storage
from jaxpo.study import records, runner
from jaxpo.study.bundles import Bundle, single
from jaxpo.study.design import expand
from jaxpo.study.leases import Leases
from jaxpo.study.runner import Training


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('uninterrupted')
    assert cli.main(['study', str(tiny_workers.write_module(folder))]) == 0
    assert sorted(tiny_workers.ran(folder)) == sorted(tiny_workers.ids(folder))
    return folder


def test_three_kills_leave_nothing_out_and_run_nothing_twice(uninterrupted, tmp_path):
    """In training, between a cell's files and its mark, and with a lease in hand; then once more, to the end."""
    path, before = tiny_workers.write_module(tmp_path), {}
    for trouble, done in (('training:6', 5), ('files:5', 9), ('lease:2', 16)):
        code, said = tiny_workers.end(tiny_workers.start(path, TROUBLE=trouble))
        assert code == -signal.SIGKILL, said
        after = tiny_workers.kept(tmp_path)
        assert len(records.states(storage.path(tmp_path / 'study'))) == done
        assert before.items() <= after.items()
        before = after
    assert cli.main(['study', str(path)]) == 0
    assert before.items() <= tiny_workers.kept(tmp_path).items()
    assert tiny_workers.results(tmp_path) == tiny_workers.results(uninterrupted)
    # One was in training when the process was killed, and had left no line; one had all its files but no mark.
    ran = tiny_workers.ran(tmp_path)
    assert len(ran) == 25 and sorted({*ran}) == sorted(tiny_workers.ids(tmp_path))
    for name in ('findings.json', 'report.html'):
        assert (tmp_path / 'study' / 'report' / name).exists()


def test_the_same_command_again_runs_nothing(uninterrupted, capsys):
    before, ran = tiny_workers.kept(uninterrupted), tiny_workers.ran(uninterrupted)
    assert cli.main(['study', str(uninterrupted / 'experiment.py')]) == 0
    assert tiny_workers.kept(uninterrupted) == before and tiny_workers.ran(uninterrupted) == ran
    assert '24 cells: 24 finished' in capsys.readouterr().out


def test_two_workers_share_a_study(uninterrupted, tmp_path):
    path = tiny_workers.write_module(tmp_path)
    (tmp_path / 'slow').touch()
    workers = [tiny_workers.start(path, '--shard', f'{number}/2', LEASE_SECONDS='9') for number in (1, 2)]
    ended = [tiny_workers.end(worker) for worker in workers]
    assert [code for code, _ in ended] == [0, 0], ended
    assert sorted(tiny_workers.ran(tmp_path)) == sorted(tiny_workers.ids(tmp_path))
    assert len({line.split()[1] for line in (tmp_path / 'ran').read_text().splitlines()}) == 2
    assert tiny_workers.results(tmp_path) == tiny_workers.results(uninterrupted)


def test_a_cell_that_fails_is_counted_and_stops_no_other(uninterrupted, tmp_path, capsys):
    path, ids = tiny_workers.write_module(tmp_path), tiny_workers.ids(tmp_path)
    broken = ids[2]
    (tmp_path / 'broken').write_text(broken)
    assert cli.main(['study', str(path)]) == 1
    said = capsys.readouterr().out
    assert '23 finished, 1 error' in said and broken in said and 'dog' in said
    states = records.states(storage.path(tmp_path / 'study'))
    assert states == {cell: 'error' if cell == broken else 'finished' for cell in ids}
    run = json.loads((tmp_path / 'study' / 'cells' / broken / 'run.json').read_text())
    assert run['state'] == 'error' and run['error'] == 'RuntimeError: the dog ate it'

    # It is not run again unasked, and still counts.
    before, ran = tiny_workers.kept(tmp_path), tiny_workers.ran(tmp_path)
    assert cli.main(['study', str(path)]) == 1
    assert tiny_workers.ran(tmp_path) == ran
    # Asked for, it is run once, and its failure is told again.
    assert cli.main(['study', str(path), '--retry']) == 1
    assert tiny_workers.ran(tmp_path)[len(ran) :] == [broken] * 2  # with the others of its program first, then alone
    (tmp_path / 'broken').unlink()
    assert cli.main(['study', str(path), '--retry']) == 0
    assert {name for name, held in tiny_workers.kept(tmp_path).items() if before.get(name) != held} == {
        name for name in tiny_workers.kept(tmp_path) if broken in name
    }
    assert tiny_workers.results(tmp_path) == tiny_workers.results(uninterrupted)


def test_sigterm_frees_the_leases_and_is_told_apart(tmp_path, monkeypatch, capsys):
    path, plain = tiny_workers.write_module(tmp_path), tiny_workers.outcome

    def stopped(cell):
        if len(tiny_workers.ran(tmp_path)) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(cell)

    monkeypatch.setattr(tiny_workers, 'outcome', stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(['study', str(path)]) == 75
    assert 'the same command' in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    root = tmp_path / 'study'
    assert len(records.states(storage.path(root))) == 3
    # This process lives, so that its leases are free only if it gave them back.
    leases = Leases(root / 'leases', 'another', 60)
    held = [name.name for name in (root / 'leases').iterdir()]
    assert held and all(leases.acquire(name) is not None for name in held)


def run_with(folder, train, monkeypatch, bundles=None):
    """Exit code of a run of the tiny study by `train`."""
    study = tiny_workers.study(folder)
    cells = expand(study)
    bundle = Bundle('all', tuple(cells), len(cells), 'all', tuple(cells))
    training = Training(lambda bundles: None, train)
    return runner.run(storage.path(study.base.output), study, cells, [bundle], training, (1, 1), 'me', False)


def test_where_a_program_fails_its_cells_are_run_one_by_one(uninterrupted, tmp_path, monkeypatch):
    sizes = []

    def train(bundle):
        sizes.append((len(bundle.cells), bundle.at_once))
        if len(bundle.cells) > 1:
            yield bundle.cells[0], tiny_workers.outcome(bundle.cells[0])
            raise MemoryError('too many at once')
        yield bundle.cells[0], tiny_workers.outcome(bundle.cells[0])

    assert run_with(tmp_path, train, monkeypatch) == 0
    assert sizes == [(24, 24)] + [(1, 1)] * 23
    assert tiny_workers.results(tmp_path) == tiny_workers.results(uninterrupted)


def test_a_cell_that_is_passed_over_is_an_error(tmp_path, monkeypatch):
    def train(bundle):
        for cell in bundle.cells:
            if cell.repeat:
                yield cell, tiny_workers.outcome(cell)

    assert run_with(tmp_path, train, monkeypatch) == 1
    states = records.states(storage.path(tmp_path / 'study'))
    assert sorted(states.values()) == ['error'] * 6 + ['finished'] * 18


def test_one_by_one_is_another_program_each():
    cells = tuple(expand(tiny_workers.study(pathlib.Path('here'))))
    ones = single(Bundle('all', cells, 24, '0-24', cells))
    assert [one.cells for one in ones] == [(cell,) for cell in cells]
    assert len({one.name for one in ones}) == 24 and {(one.at_once, one.kind) for one in ones} == {(1, '0-24-1')}


LANGUAGE_MODELS = """\
import pathlib
import tiny_studies, tiny_workers
from jaxpo.study import language_model
def get_study():
    return tiny_studies.small(pathlib.Path(__file__).parent)
tiny_workers.make_trouble()
tiny_workers._after(language_model, '_batch', 'training')
"""


def test_language_models_killed_in_training_go_on(tmp_path, compiled_quickly, capsys):
    """On the mesh of all devices, one after the other; and a dry run says what they then take."""
    folders = [tmp_path / name for name in ('killed', 'whole')]
    tiny_studies.small(folders[0])
    (folders[0] / 'experiment.py').write_text(LANGUAGE_MODELS)
    shutil.copytree(*folders)
    path, files = folders[0] / 'experiment.py', sorted(folders[0].rglob('*'))
    capsys.readouterr()
    assert cli.main(['study', str(path), '--dry-run']) == 0
    planned = capsys.readouterr().out
    assert [file for file in sorted(folders[0].rglob('*')) if '__pycache__' not in str(file)] == files
    code, said = tiny_workers.end(tiny_workers.start(path, TROUBLE='training:5'))
    assert code == -signal.SIGKILL, said
    before = tiny_workers.kept(folders[0])
    root = storage.path(folders[0] / 'study')
    assert len(records.states(root)) == 1
    for folder in folders:
        # Both read the same files, for a cell is named by what it reads.
        assert cli.main(['study', str(path), '--output', str(folder / 'study')]) == 0
    assert before.items() <= tiny_workers.kept(folders[0]).items()
    assert tiny_workers.results(folders[0]) == tiny_workers.results(folders[1])
    found = records.read(root)
    assert [record.state for record in found] == ['finished'] * 3
    for record in found:
        assert f'{record.compute.tokens:,}' in planned
        assert record.lines[-1]['step'] == 3 and {*record.pairs} == {'selection', 'report', 'train'}
