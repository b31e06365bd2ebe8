"""Adapters through the whole loop: what is held and saved, what is learned, and what is exported and read again."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import optax
import pytest
import tiny_checkpoints
import tiny_runs
from flax.traverse_util import flatten_dict
from test_averages import assert_equal, differ
from test_train import logged, saved_state, stop_after

from jaxpo import commands, loading, run, scoring, step, train
from jaxpo.config import Evaluate, Export, Lora, Mesh, Model, Optimizer, Reference, Rows, Train
from jaxpo.errors import InputError, Interrupted
from jaxpo.models import lora, peft

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LORA = Lora(rank=4, alpha=6.0)
SETTINGS = {
    'lora': LORA,
    'train': Train(batch_pairs=6, steps=8),
    'optimizer': Optimizer(learning_rate=0.1),
    'export': Export(dtype='float32'),
}


def experiment(folder, **changes):
    return tiny_runs.experiment(folder, **SETTINGS | changes)


def train_keeping(made, monkeypatch):
    """Trains, and returns the state that the loop ends with."""
    ends, loop = [], train._loop
    monkeypatch.setattr(train, '_loop', lambda *arguments: ends.append(loop(*arguments)) or ends[0])
    train.train(made)
    return ends[0]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """An experiment that was trained, and the state at its end."""
    made = experiment(tmp_path_factory.mktemp('lora'))
    with pytest.MonkeyPatch.context() as patched:
        return made, train_keeping(made, patched)


@pytest.fixture(scope='module')
def exported(finished):
    """Directories of the merged model and of the adapter."""
    made, _ = finished
    folder = pathlib.Path(made.config.output).parent
    for form in ('model', 'adapter'):
        commands.export(experiment(folder, export=Export(str(folder / f'{form}_export'), form, dtype='float32')))
    return folder / 'model_export', folder / 'adapter_export'


def log_probabilities(made, state):
    """Of the held-out pairs under a policy, by token: chosen, then rejected."""
    prepared = run.prepare(made)
    batch = run.make_batch(prepared, run.read_pairs(prepared).evaluation)
    batch = jax.tree.map(lambda leaf: leaf[0], batch)
    score = jax.jit(lambda params, frozen: scoring.log_probabilities(prepared.models, (), params, frozen, batch))
    return np.stack([side.policy_logps for side in score(state.params, state.frozen)])


def test_only_the_adapter_is_trained_and_has_moments(finished):
    made, state = finished
    start = jax.device_get(loading.load_state(run.prepare(made)))
    shapes = lora.abstract_adapter(run.prepare(made).pretrained.architecture, run.prepare(made).lora)
    assert jax.tree.map(np.shape, state.params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert all(np.any(a != b) for a, b in zip(jax.tree.leaves(start.params), jax.tree.leaves(state.params)))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == 2 * size  # two of Adam's for each factor, and none for what is beneath
    assert_equal(state.base_params, start.base_params)
    _, saved = saved_state(made)
    assert not saved.base_params and differ(saved.params, start.params)


def test_a_policy_is_its_own_reference_and_holds_no_copy(finished):
    made, state = finished
    prepared = run.prepare(made)
    assert prepared.models.frozen['initial'].weights == 'base'
    assert state.reference_params == {} == loading.load_state(prepared).reference_params
    assert flatten_dict(state.base_params).keys().isdisjoint(flatten_dict(state.params))


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_log_ratios_are_exactly_zero_at_the_start(tmp_path, dtype):
    model = Model(str(tmp_path / 'model'), dtype=dtype, remat='none')
    prepared = [run.prepare(experiment(tmp_path, model=model, lora=Lora(rank=4, zero=zero))) for zero in 'ab']
    score_step = jax.jit(step.make_score_step(prepared[0].models, ('initial',)))
    batch = run.make_batch(prepared[0], run.read_pairs(prepared[0]).train)
    for start in map(loading.load_start, prepared):
        assert differ(start.params, jax.tree.map(np.zeros_like, start.params))
        ratios = jax.device_get(score_step(start.params, start.frozen, batch))
        assert not np.any(ratios['chosen']) and not np.any(ratios['rejected'])
        louder = jax.tree.map(lambda leaf: leaf + 0.1, start.params)
        ratios = jax.device_get(score_step(louder, start.frozen, batch))
        assert np.abs(ratios['chosen']).max() > 0.1


def test_it_learns(finished):
    made, _ = finished
    lines = logged(made)
    assert lines[0]['eval/rewards/accuracies'] == 0.5 and lines[0]['eval/rewards/margins'] == 0
    assert lines[1]['rewards/margins'] == 0 and lines[1]['grad_norm'] > 0
    assert lines[-1]['eval/rewards/accuracies'] > 0.8 and lines[-1]['eval/loss'] < lines[0]['eval/loss']


def test_resumed_equals_uninterrupted_bit_for_bit(finished, tmp_path, monkeypatch):
    made = experiment(tmp_path)
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Interrupted, match='after step 3'):
            train.train(made)
    state = train_keeping(made, monkeypatch)
    assert_equal(saved_state(made), saved_state(finished[0]))
    assert_equal(state.base_params, finished[1].base_params)
    assert logged(made) == logged(finished[0])


def one_step(folder, mesh, microbatch):
    """Metrics and the gradient of a loud adapter: a step of plain gradient descent at rate 1 shows it."""
    rows = Rows(layout='padded', lengths=(64,), microbatch=microbatch)
    made = run.prepare(experiment(folder, mesh=mesh, rows=rows))
    prepared = dataclasses.replace(made, optimizer=optax.identity())
    start = loading.load_state(prepared)
    random = np.random.default_rng(4)
    loud = jax.tree.map(lambda leaf: random.normal(0, 0.2, leaf.shape).astype(np.float32), start.params)
    start = start.replace(params=jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), loud, start.params))
    batch = run.make_batch(prepared, run.read_pairs(prepared).train[:16])
    train_step = jax.jit(step.make_train_step(prepared.models, prepared.objective, prepared.optimizer))
    rates = {'learning_rate': 1.0, 'method_learning_rate': 1.0}
    after, metrics = train_step(start, batch, prepared.traced | rates)
    gradient = jax.tree.map(lambda old, new: old - np.asarray(new), loud, after.params)
    return batch.tokens.shape[0], jax.device_get(metrics), gradient


def test_microbatches_and_meshes_give_the_same_step(tmp_path):
    count, metrics, gradient = one_step(tmp_path, Mesh(data=8), 16)
    assert count == 1 and abs(metrics['rewards/margins']) > 0.01
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient))
    for mesh, microbatch, expected in ((Mesh(data=8), 8, 2), (Mesh(data=4, fsdp=2), 16, 1)):
        count, others, other = one_step(tmp_path, mesh, microbatch)
        assert count == expected
        for name, value in metrics.items():
            np.testing.assert_allclose(others[name], value, rtol=1e-5, atol=1e-5, err_msg=name)
        for ours, theirs in zip(jax.tree.leaves(other), jax.tree.leaves(gradient)):
            np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, rtol=0)


def test_the_merged_export_is_the_policy(finished, exported):
    made, state = finished
    live = log_probabilities(made, state)
    plain = experiment(pathlib.Path(made.config.output).parent, lora=Lora(), model=Model(str(exported[0])))
    np.testing.assert_allclose(log_probabilities(plain, loading.load_start(run.prepare(plain))), live, atol=1e-5)
    start = log_probabilities(made, loading.load_start(run.prepare(made)))
    assert np.abs(live - start).max() > 0.1


def test_the_exported_adapter_is_read_back_and_starts_another_run(finished, exported):
    made, state = finished
    prepared = run.prepare(made)
    settings, tree = peft.read_adapter(exported[1], prepared.pretrained.architecture)
    assert (settings.rank, settings.scale, settings.targets) == (4, 1.5, prepared.lora.targets)
    assert_equal(tree, jax.device_get(state.params))
    model = dataclasses.replace(made.config.model, adapter=str(exported[1]))
    folder = pathlib.Path(made.config.output).parent
    live = log_probabilities(made, state)
    for again in (Lora(), Lora(rank=2)):
        fresh = experiment(folder, model=model, lora=again)
        start = loading.load_start(run.prepare(fresh))
        np.testing.assert_allclose(log_probabilities(fresh, start), live, atol=1e-5)
        (initial,) = [start.base_params] if again.rank else start.reference_params.values()
        merged = lora.merged(lora.combined(jax.device_get(state.base_params), tree), settings)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(initial), merged)


def sampled(made):
    commands.sample(made)
    lines = (pathlib.Path(made.config.output) / made.config.sample.output).read_text().splitlines()
    return [json.loads(line)['completion'] for line in lines]


def test_samples_come_from_the_adapted_policy(finished, exported, tmp_path):
    made, _ = finished
    folder, sample = pathlib.Path(made.config.output).parent, made.config.sample
    ours = sampled(made)
    initial = dataclasses.replace(sample, policy='initial', output='initial.jsonl')
    assert len(ours) == 6 and ours != sampled(experiment(folder, sample=initial))
    plain = experiment(folder, lora=Lora(), model=Model(str(exported[0])), output=str(tmp_path / 'plain'))
    assert sampled(plain) == ours


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'lora': Lora(alpha=8.0)}, 'lora.alpha has no effect: lora.rank is 0'),
        ({'lora': Lora(targets=('query',))}, 'lora.targets has no effect: lora.rank is 0'),
        ({'lora': Lora(zero='b')}, 'lora.zero has no effect: lora.rank is 0'),
        ({'lora': Lora(rank=-1)}, 'lora.rank'),
        ({'lora': Lora(), 'export': Export(form='adapter')}, 'export.form adapter: lora.rank is 0'),
        (
            {'export': Export(form='adapter', dtype='float32'), 'model': Model('model', adapter='adapter')},
            'export.form adapter: .* model.adapter merged in',
        ),
    ],
)
def test_contradictory_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run.prepare(experiment(tmp_path, **changes))


def test_four_references_of_four_kinds_train_and_are_evaluated(tmp_path):
    tiny_runs.experiment(tmp_path)
    for seed, name in enumerate(('live', 'tabled'), 5):
        tensors = tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG, seed=seed)
        tiny_checkpoints.write_directory(tmp_path / name, tiny_runs.CONFIG, tensors)
    references = {
        'off': Reference(),
        'tabled': Reference(str(tmp_path / 'tabled'), table=True),
        'live': Reference(str(tmp_path / 'live')),
        'moving': Reference(update_every=2, update_rate=1.0),
    }
    made = experiment(
        tmp_path,
        references=references,
        objective={'mixture': {'mix': 'geometric'}, 'dpo': {}},
        tables=str(tmp_path / 'tables'),
        train=Train(batch_pairs=6, steps=4),
        evaluate=Evaluate(sample_prompts=4),
    )
    prepared = run.prepare(made)
    kinds = {name: model.weights for name, model in prepared.models.frozen.items()}
    assert kinds == {'off': 'base', 'tabled': 'table', 'live': 'own', 'moving': 'adapter'}
    start = loading.load_start(prepared)
    assert set(start.reference_params) == {'live'} and set(start.average_params) == {'moving'}
    train.train(made)
    lines = logged(made)
    before, after = lines[0], lines[-1]
    assert after['eval/rewards/margins'] > before['eval/rewards/margins']
    for name in references:
        assert f'eval/references/{name}/accuracies' in after
    # Updated after the last step, the average is the policy; the adapter off is the policy at the start.
    assert before['eval/kl'] == before['eval/kl/off'] == before['eval/kl/moving'] == 0
    assert after['eval/kl/moving'] == 0 and after['eval/kl'] == after['eval/kl/off'] != 0
    assert before['eval/kl/live'] > 0 and 'eval/kl/tabled' not in after
    text = (tmp_path / 'run' / 'samples_000004.jsonl').read_text()
    ratios = [json.loads(line)['log_ratios'] for line in text.splitlines()]
    assert {frozenset(one) for one in ratios} == {frozenset(('off', 'live', 'moving'))}
    for name in ('off', 'live'):
        assert after[f'eval/kl/{name}'] == pytest.approx(np.mean([one[name] for one in ratios]), rel=1e-5)

    commands.evaluate(made)
    found = json.loads((tmp_path / 'run' / 'evaluation_000004.json').read_text())
    for name in ('eval/loss', 'eval/kl/off', 'eval/kl/live', 'eval/references/tabled/accuracies'):
        assert found[name] == pytest.approx(after[name], rel=1e-5)
