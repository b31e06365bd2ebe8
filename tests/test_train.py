"""A whole run: it learns, resumes bit for bit, moves to another mesh, stops cleanly, and never mixes two runs."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from jaxpo import checkpoint, loading, run, storage, train
from jaxpo.config import Evaluate, Mesh, Optimizer, Reference, Train
from jaxpo.errors import InputError, Interrupted, TrainingError
from jaxpo.metrics import read_metrics

pytestmark = pytest.mark.usefixtures('compiled_quickly')

TIMES = ('seconds', 'tokens_per_second', 'eval/seconds')


def saved_state(experiment):
    """Everything in the newest checkpoint, on the host."""
    prepared = run.prepare(experiment)
    shapes, _ = loading.abstract_state(prepared)
    with checkpoint.open_checkpoints(prepared.directory / 'checkpoints', 2) as checkpoints:
        step = checkpoints.latest()
        return step, jax.device_get(checkpoints.restore(step, shapes, {'reference_params': {}}))


def logged(experiment):
    """The log without its timings."""
    lines = read_metrics(pathlib.Path(experiment.config.output))
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def stop_after(step, monkeypatch):
    """The next run is interrupted, as by a signal, while it takes `step`."""
    rates = train.learning_rates

    def schedule(*arguments):
        rate = rates(*arguments)

        def watched(number):
            if number == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return rate(number)

        return watched

    monkeypatch.setattr(train, 'learning_rates', schedule)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, compiled_quickly):
    experiment = tiny_runs.experiment(tmp_path_factory.mktemp('finished'))
    train.train(experiment)
    return experiment


def test_it_learns_and_says_so(finished):
    lines = logged(finished)
    assert [line['step'] for line in lines] == [0, 1, 2, 3, 4, 5, 6, 6]
    before, after = lines[0], lines[-1]
    assert before['eval/rewards/accuracies'] == 0.5
    assert after['eval/rewards/accuracies'] > 0.8 and after['eval/rewards/margins'] > 0
    assert lines[1]['loss'] == pytest.approx(np.log(2), rel=1e-6) and lines[6]['loss'] < lines[1]['loss']
    assert lines[6]['num_tokens'] > lines[1]['num_tokens'] > 0


def test_it_writes_down_what_it_was(finished):
    directory = pathlib.Path(finished.config.output)
    assert json.loads((directory / 'config.json').read_text()) == json.loads(
        json.dumps(dataclasses.asdict(finished.config))
    )
    assert json.loads((directory / 'versions.json').read_text())['jax'] == jax.__version__
    assert json.loads((directory / 'data_report.json').read_text())['train']['kept'] == 24
    assert list((directory / 'tensorboard').glob('events*'))


def test_a_finished_run_is_not_repeated(finished, capsys):
    before = logged(finished)
    train.train(finished)
    assert logged(finished) == before


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch):
    experiment = tiny_runs.experiment(tmp_path)
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Interrupted, match='after step 3'):
            train.train(experiment)
    assert saved_state(experiment)[0] == 3
    train.train(experiment)
    (ours, theirs) = saved_state(experiment), saved_state(finished)
    assert ours[0] == theirs[0] == 6
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    assert logged(experiment) == logged(finished)


def test_another_mesh_takes_the_run_over(finished, tmp_path, monkeypatch):
    experiment = tiny_runs.experiment(tmp_path)
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Interrupted):
            train.train(experiment)
    elsewhere = tiny_runs.experiment(tmp_path, mesh=Mesh(data=2, fsdp=4))
    train.train(elsewhere)
    for ours, theirs in zip(jax.tree.leaves(saved_state(elsewhere)[1]), jax.tree.leaves(saved_state(finished)[1])):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for ours, theirs in zip(logged(elsewhere), logged(finished)):
        assert ours['step'] == theirs['step']
        if 'loss' in ours:
            assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-5)


def test_a_killed_run_goes_on_from_its_last_commit(finished, tmp_path):
    folder = tmp_path / 'killed'
    folder.mkdir()
    path = tiny_runs.write_module(folder)
    environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parent), 'JAX_NUM_CPU_DEVICES': '8'}
    environment |= {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'True'}
    command = [sys.executable, '-m', 'jaxpo', 'train', str(path)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, deadline = folder / 'run' / 'metrics.jsonl', time.monotonic() + 300
    while not log.exists() or '"step": 3' not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    experiment = tiny_runs.experiment(folder)
    step, state = saved_state(experiment)
    assert step == 6
    jax.tree.map(np.testing.assert_array_equal, state, saved_state(finished)[1])


@pytest.mark.parametrize('adapter', [(), ('--lora.rank', '4')], ids=['whole', 'adapter'])
def test_compiled_as_for_users_it_learns_too(finished, tmp_path, adapter):
    """Tests compile otherwise, to save time: here the step and its evaluation are optimised, by XLA's own choices."""
    path = tiny_runs.write_module(tmp_path)
    environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parent)}
    environment |= {'JAX_NUM_CPU_DEVICES': '1', 'XLA_FLAGS': ''}
    command = [sys.executable, '-m', 'jaxpo', 'train', str(path), '--mesh.data', '1', *adapter]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = logged(tiny_runs.experiment(tmp_path))
    assert lines[0]['eval/rewards/margins'] == 0 and lines[0]['eval/rewards/accuracies'] == 0.5
    assert lines[-1]['eval/rewards/margins'] > 0
    if not adapter:
        for ours, theirs in zip(lines, logged(finished), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    experiment = tiny_runs.experiment(tmp_path, optimizer=Optimizer(learning_rate=1e30))
    with pytest.raises(TrainingError, match='Step 2: the loss'):
        train.train(experiment)
    (broken,) = pathlib.Path(experiment.config.output).glob('not_finite_*.json')
    assert len(json.loads(broken.read_text())['pairs']) == 6


def test_a_directory_never_mixes_two_runs(finished):
    folder = pathlib.Path(finished.config.output).parent
    other = tiny_runs.experiment(folder, objective={'dpo': {'beta': 0.3}})
    with pytest.raises(InputError, match=r'objective.dpo.beta \(0.1 there, 0.3 now\)'):
        train.train(other)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    experiment = tiny_runs.experiment(tmp_path)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'thesis.txt').write_text('all of it')
    with pytest.raises(InputError, match='not empty'):
        train.train(experiment)


def test_no_room_on_the_disk_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.shutil, 'disk_usage', lambda path: type('Usage', (), {'free': 1000}))
    with pytest.raises(InputError, match='No room on the disk'):
        train.train(tiny_runs.experiment(tmp_path))
    assert not (tmp_path / 'run').exists()


def test_evaluation_samples_rewards_and_measures_the_kl(tmp_path):
    experiment = tiny_runs.experiment(
        tmp_path,
        reward=lambda prompt, completion: float(len(completion.split())),
        train=Train(batch_pairs=6, steps=4, evaluate_every=2),
        evaluate=Evaluate(sample_prompts=4),
    )
    train.train(experiment)
    lines = [line for line in logged(experiment) if 'eval/kl' in line]
    assert [line['step'] for line in lines] == [0, 2, 4]
    assert lines[0]['eval/kl'] == 0 and lines[-1]['eval/kl'] > 0
    samples = [json.loads(line) for line in (tmp_path / 'run' / 'samples_000004.jsonl').read_text().splitlines()]
    assert len(samples) == 8
    assert lines[-1]['eval/reward'] == pytest.approx(np.mean([len(s['completion'].split()) for s in samples]))
    assert lines[-1]['eval/kl'] == pytest.approx(np.mean([s['log_ratios']['initial'] for s in samples]))


def test_another_model_can_be_the_reference(tmp_path):
    experiment = tiny_runs.experiment(tmp_path)
    tiny_runs.tiny_checkpoints.write_directory(
        tmp_path / 'other',
        tiny_runs.CONFIG | {'num_hidden_layers': 3},
        tiny_runs.tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG | {'num_hidden_layers': 3}, seed=5),
    )
    references = {'other': Reference(str(tmp_path / 'other'))}
    experiment = tiny_runs.experiment(tmp_path, references=references, train=Train(batch_pairs=6, steps=1))
    train.train(experiment)
    assert abs(logged(experiment)[0]['eval/rewards/margins']) > 0


def test_reference_free_runs_hold_no_reference(tmp_path):
    experiment = tiny_runs.experiment(
        tmp_path, objective={'simpo': {}}, references={}, train=Train(batch_pairs=6, steps=2)
    )
    prepared = run.prepare(experiment)
    assert loading.load_state(prepared).reference_params == {}
    train.train(experiment)


def test_bfloat16_computes_with_float32_masters(tmp_path):
    experiment = tiny_runs.experiment(tmp_path, train=Train(batch_pairs=6, steps=3))
    model = dataclasses.replace(experiment.config.model, dtype='bfloat16')
    experiment = dataclasses.replace(experiment, config=dataclasses.replace(experiment.config, model=model))
    state = loading.load_state(run.prepare(experiment))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype('float32')}
    assert state.reference_params['initial']['layers']['mlp']['up'].dtype == jnp.bfloat16
    train.train(experiment)
    assert logged(experiment)[1]['rewards/margins'] == 0
