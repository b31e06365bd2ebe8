"""Two real processes of 4 devices are one run of 8: the same losses, table, samples and checkpoint; and they end alike.

The two are told to stop on the way, by a SIGTERM to the second, and then go on to the end: as two, and as one.
"""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import tiny_processes
from test_train import logged, saved_state

from jaxpo import run, tabulate, train
from jaxpo.config import Mesh

pytestmark = pytest.mark.usefixtures('compiled_quickly')
ATOL = 1e-4  # of parameters after all steps: sums over processes are added up in another order


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('two')


def elsewhere(folder, name, **changes):
    """The experiment in `folder`, which writes to `name`."""
    experiment = tiny_processes.experiment(folder, **changes)
    return dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, output=str(folder / name)))


@pytest.fixture(scope='module')
def alone(folder, compiled_quickly):
    """One process, never interrupted, with a table of its own."""
    experiment = elsewhere(folder, 'alone', tables=str(folder / 'own_tables'))
    train.train(experiment)
    return experiment


@pytest.fixture(scope='module')
def stopped(folder):
    """Two processes, the second of which is sent SIGTERM; and a copy of what they leave."""
    tiny_processes.experiment(folder)
    ended = tiny_processes.train_together(folder, troubles=({}, {'TROUBLE': 'sigterm:2'}))
    shutil.copytree(folder / 'run', folder / 'copy')
    return ended


@pytest.fixture(scope='module')
def finished(folder, stopped):
    """The same two processes, started once more."""
    ended = tiny_processes.train_together(folder)
    assert [one.code for one in ended] == [0, 0], ended[0].error + ended[1].error
    return tiny_processes.experiment(folder)


def assert_same_log(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=2e-5), (one['step'], name)


def assert_same_state(ours, theirs):
    assert ours[0] == theirs[0] == tiny_processes.STEPS
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=ATOL), ours[1], theirs[1])


def test_sigterm_to_one_stops_both_after_the_same_step(stopped, folder):
    assert [one.code for one in stopped] == [75, 75], stopped[0].error + stopped[1].error
    (first, second) = (one.error.split('Stopped after step ')[1].split(';')[0] for one in stopped)
    assert first == second
    steps = [int(path.name) for path in (folder / 'copy' / 'checkpoints').iterdir() if path.name.isdigit()]
    assert steps == [int(first)] and 2 <= int(first) < tiny_processes.STEPS


def test_two_processes_are_one(finished, alone):
    assert_same_log(logged(finished), logged(alone))
    assert_same_state(saved_state(finished), saved_state(alone))


def test_samples_are_those_of_one_process(finished, alone):
    for name in ('samples_000000.jsonl', f'samples_{tiny_processes.STEPS:06d}.jsonl', 'greedy_000000.jsonl'):
        ours, theirs = (
            [json.loads(line) for line in (pathlib.Path(one.config.output) / name).read_text().splitlines()]
            for one in (finished, alone)
        )
        assert [sample['completion'] for sample in ours] == [sample['completion'] for sample in theirs]
        for one, other in zip(ours, theirs):
            assert one['log_ratios'] == pytest.approx(other['log_ratios'], abs=1e-4)


def test_the_second_process_prints_and_logs_nothing(finished, stopped):
    assert 'Evaluated' in stopped[0].out
    # Gloo says to whom it is connected, from several threads at once: lines of it may be torn.
    words = [line for line in stopped[1].out.splitlines() if '[Gloo]' not in line and 'peer ranks' not in line]
    assert not ''.join(words).strip()
    steps = [line['step'] for line in logged(finished) if 'loss' in line]
    assert steps == list(range(1, tiny_processes.STEPS + 1))


def test_a_table_computed_by_two_is_that_of_one(finished, alone):
    def told(experiment):
        prepared = run.prepare(experiment)
        pairs, filled = tabulate.attach(prepared, run.read_pairs(prepared))
        assert [one.computed for one in filled] == [0]
        return [pair.table for pair in (*pairs.train, *pairs.validation, *pairs.evaluation)]

    for one, other in zip(told(finished), told(alone), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), one, other)


def test_one_process_goes_on_from_the_checkpoint_of_two(finished, alone, stopped, folder):
    experiment = elsewhere(folder, 'copy', mesh=Mesh(data=1, fsdp=8))
    train.train(experiment)
    assert_same_log(logged(experiment), logged(alone))
    assert_same_state(saved_state(experiment), saved_state(alone))


def test_a_disk_that_is_full_for_one_ends_both(finished, alone, folder):
    # Neither the log nor a checkpoint can be written: saving in the background, each waits for the other.
    words = [
        '--mesh.data',
        '1',
        '--mesh.fsdp',
        '8',
        '--evaluate.sample-prompts',
        '0',
        '--train.checkpoint-every',
        '1',
        '--output',
    ]
    words.append(folder / 'full')
    first, second = tiny_processes.train_together(folder, *words, troubles=({'TROUBLE': 'full disk:4'}, {}))
    assert (first.code, second.code) == (1, 1), first.error + second.error
    assert 'OSError' in first.error and 'File too large' in first.error
    assert 'jaxpo: process 0: OSError' in second.error
    assert abs(second.seconds - first.seconds) < tiny_processes.HEARTBEAT
    # Until then, parameters and rows were split over devices of both.
    ours = [line for line in logged(elsewhere(folder, 'full')) if 'loss' in line]
    theirs = [line for line in logged(alone) if 'loss' in line]
    assert len(ours) in (2, 3)
    assert_same_log(ours, theirs[: len(ours)])
