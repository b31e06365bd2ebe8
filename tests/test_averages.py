"""References that follow the policy (TR-DPO), through the whole loop: copies, averages, their state, their limits."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_checkpoints
import tiny_runs
from test_step import CONFIG, PADDED, PAIRS, parameters, traced
from test_train import logged, saved_state, stop_after

from jaxpo import checkpoint, loading, objective, run, scoring, state, step, train
from jaxpo.config import Lora, Mesh, Model, Reference, Train
from jaxpo.data.rows import fill_rows
from jaxpo.errors import InputError, Interrupted
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures('compiled_quickly')

STEPS = 6
SAVED = Train(batch_pairs=6, steps=STEPS, checkpoint_every=1, keep_checkpoints=STEPS)
UPDATES = {'hard': (2, 1.0), 'soft': (3, 0.6), 'elsewhere': (4, 0.25)}


def experiment(folder, **changes):
    """Three references that follow the policy, each in its own way; the third starts from another checkpoint."""
    tiny_runs.experiment(folder)
    other = folder / 'other'
    if not other.exists():
        tensors = tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG, seed=7)
        tiny_checkpoints.write_directory(other, tiny_runs.CONFIG, tensors)
    references = {name: Reference('policy', update_every=n, update_rate=rate) for name, (n, rate) in UPDATES.items()}
    references['elsewhere'] = dataclasses.replace(references['elsewhere'], source=str(other))
    settings = {'references': references, 'objective': {'mixture': {'mix': 'geometric'}, 'dpo': {}}, 'train': SAVED}
    return tiny_runs.experiment(folder, **settings | changes)


def states(experiment):
    """The state after each step, on the host, from 0."""
    prepared = run.prepare(experiment)
    shapes, _ = loading.abstract_state(prepared)
    found = [jax.device_get(loading.load_start(prepared))]
    with checkpoint.open_checkpoints(prepared.directory / 'checkpoints', STEPS) as checkpoints:
        for number in range(1, checkpoints.latest() + 1):
            unsaved = {'reference_params': {}, 'base_params': {}}
            found.append(jax.device_get(checkpoints.restore_without_optimizer(number, shapes, unsaved)))
    return found


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    made = experiment(tmp_path_factory.mktemp('averages'))
    train.train(made)
    return made


@pytest.fixture(scope='module')
def trajectory(finished):
    return states(finished)


def assert_recursion(trajectory, name, every, rate):
    """The average of every step is what its recursion makes of the policies that were saved."""
    expected = trajectory[0].average_params[name]
    for number, now in enumerate(trajectory[1:], 1):
        if number % every == 0:
            expected = jax.tree.map(lambda old, new: (1 - rate) * old + rate * new, expected, now.params)
        jax.tree.map(
            lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7),
            now.average_params[name],
            expected,
        )


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def differ(ours, theirs):
    return any(np.any(a != b) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def test_a_hard_update_is_the_policy_of_its_step(trajectory):
    for number, now in enumerate(trajectory):
        assert_equal(now.average_params['hard'], trajectory[number - number % 2].params)
        assert not number or differ(now.params, trajectory[number - 1].params)


@pytest.mark.parametrize('name', ['soft', 'elsewhere'])
def test_soft_updates_follow_their_recursion(trajectory, name):
    assert_recursion(trajectory, name, *UPDATES[name])
    every = UPDATES[name][0]
    assert differ(trajectory[every].average_params[name], trajectory[0].average_params[name])
    assert_equal(trajectory[every - 1].average_params[name], trajectory[0].average_params[name])


def test_an_average_starts_where_its_source_is(trajectory, finished):
    start, prepared = trajectory[0], run.prepare(finished)
    assert_equal(start.average_params['hard'], start.params)
    _, shardings = loading.abstract_state(prepared)
    other = loading.load_params(prepared.references['elsewhere'], shardings.params)
    assert_equal(start.average_params['elsewhere'], jax.device_get(other))
    assert differ(other, start.params)
    assert start.reference_params == {}


@pytest.fixture(scope='module')
def halved(tmp_path_factory):
    """A folder with a run that was interrupted between updates of all three averages, which `go_on` takes up."""
    folder = tmp_path_factory.mktemp('halved')
    with pytest.MonkeyPatch.context() as patched:
        stop_after(5, patched)
        with pytest.raises(Interrupted, match='after step 5'):
            train.train(experiment(folder))
    (folder / 'run').rename(folder / 'halved')
    return folder


def go_on(folder, **changes):
    shutil.rmtree(folder / 'run', ignore_errors=True)
    shutil.copytree(folder / 'halved', folder / 'run')
    made = experiment(folder, **changes)
    train.train(made)
    return made


def test_averages_are_saved_and_resumed_bit_for_bit(finished, halved):
    made = go_on(halved)
    (ours, theirs) = saved_state(made), saved_state(finished)
    assert ours[0] == theirs[0] == STEPS and set(ours[1].average_params) == set(UPDATES)
    assert_equal(ours[1], theirs[1])
    assert logged(made) == logged(finished)


def test_another_mesh_takes_averages_over(trajectory, halved):
    made = go_on(halved, mesh=Mesh(data=2, fsdp=4))
    ours, theirs = (jax.tree.leaves(one.average_params) for one in (saved_state(made)[1], trajectory[-1]))
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, atol=1e-4)
    embedding = loading.abstract_state(run.prepare(made))[0].average_params['soft']['embedding']
    assert embedding.sharding.spec[1] == 'fsdp'


def test_averages_are_float32_where_the_step_computes_in_bfloat16(tmp_path):
    model = Model(str(tmp_path / 'model'), dtype='bfloat16', remat='none')
    made = experiment(tmp_path, model=model, train=dataclasses.replace(SAVED, steps=4))
    train.train(made)
    trajectory = states(made)
    for now in (trajectory[0], trajectory[-1]):
        assert {leaf.dtype for leaf in jax.tree.leaves(now.average_params)} == {np.dtype('float32')}
    # Copies and averages keep bits that bfloat16 has not.
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf, jnp.bfloat16), trajectory[-1].average_params['hard'])
    assert differ(rounded, trajectory[-1].average_params['hard'])
    for name, update in UPDATES.items():
        assert_recursion(trajectory, name, *update)


def test_under_an_adapter_the_average_is_of_the_adapter_alone(tmp_path):
    references = {'moving': Reference(update_every=2, update_rate=0.5)}
    changes = {'references': references, 'objective': {'dpo': {}}, 'lora': Lora(rank=2)}
    made = experiment(tmp_path, **changes)
    train.train(made)
    trajectory = states(made)
    start = trajectory[0]
    assert jax.tree.structure(start.average_params['moving']) == jax.tree.structure(start.params)
    assert_equal(start.average_params['moving'], start.params)
    assert_recursion(trajectory, 'moving', 2, 0.5)
    assert differ(trajectory[-1].average_params['moving'], start.params)
    lines = logged(made)
    assert lines[1]['rewards/margins'] == 0 and lines[2]['rewards/margins'] != 0


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'update_rate': 0.5}, 'update_rate has no effect: references.moving.update_every is not set'),
        ({'update_every': 0}, 'references.moving.update_every must be positive, not 0'),
        ({'update_every': -2}, 'references.moving.update_every must be positive, not -2'),
        ({'update_every': 2, 'update_rate': 0.0}, 'update_rate must be above 0 and at most 1, not 0.0'),
        ({'update_every': 2, 'update_rate': 1.5}, 'update_rate must be above 0 and at most 1, not 1.5'),
        ({'update_every': 2, 'update_rate': float('nan')}, 'update_rate must be above 0 and at most 1, not nan'),
        ({'update_every': 2, 'table': True}, 'table cannot be set with references.moving.update_every'),
        ({'update_every': 2, 'dtype': 'bfloat16'}, 'dtype cannot be set with references.moving.update_every'),
        ({'update_every': 2, 'memory': 'pinned_host'}, 'memory cannot be set with references.moving.update_every'),
    ],
)
def test_contradictory_settings_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run.prepare(tiny_runs.experiment(tmp_path, references={'moving': Reference(**changes)}))


def test_a_model_of_another_architecture_cannot_follow(tmp_path):
    config = tiny_runs.CONFIG | {'num_hidden_layers': 3}
    tensors = tiny_checkpoints.hugging_face_tensors(config)
    tiny_checkpoints.write_directory(tmp_path / 'deeper', config, tensors)
    references = {'deeper': Reference(str(tmp_path / 'deeper'), update_every=2)}
    with pytest.raises(InputError, match='deeper: it cannot follow the policy .* another architecture'):
        run.prepare(tiny_runs.experiment(tmp_path, references=references))


def test_where_an_adapter_is_trained_only_a_copy_of_it_can_follow(tmp_path):
    tiny_runs.experiment(tmp_path)
    references = {'moving': Reference(str(tmp_path / 'model'), update_every=2)}
    with pytest.raises(InputError, match='references.moving: where an adapter is trained, only a copy'):
        run.prepare(tiny_runs.experiment(tmp_path, references=references, lora=Lora(rank=2)))


def one_average(every, rate):
    """A step of plain gradient descent, an average of its own start, and what the step reads."""
    decoder = Decoder(from_hugging_face(CONFIG))
    models = scoring.Models(decoder, {'moving': scoring.FrozenModel(decoder, 'own')}, None)
    made = objective.make({'dpo': {'beta': 0.5}}, ('moving',))
    train_step = jax.jit(step.make_train_step(models, made, optax.identity(), {'moving': step.Average(every, rate)}))
    start = state.create(parameters(), {}, optax.identity(), average_params={'moving': parameters(seed=1)})
    return models, made, train_step, start


def test_the_next_step_is_measured_against_what_an_update_left():
    _, made, train_step, current = one_average(every=2, rate=1.0)
    margins = []
    for _ in range(5):
        current, metrics = train_step(current, fill_rows(PAIRS, PADDED), traced(made, 1e-2))
        margins.append(float(metrics['rewards/margins']))
    assert margins[0] and margins[1] and margins[3]
    assert margins[2] == margins[4] == 0


def test_a_step_that_is_not_finite_moves_no_average():
    _, made, train_step, start = one_average(every=1, rate=0.6)
    params = start.params | {'final_norm': start.params['final_norm'] * jnp.nan}
    after, metrics = train_step(start.replace(params=params), fill_rows(PAIRS, PADDED), traced(made, 1e-2))
    assert not metrics['finite'] and after.step == 1
    assert_equal(after.average_params, start.average_params)
    # Nor one where the policy stays finite.
    broken = jax.tree.map(lambda number: float('inf'), made.hyperparameters)
    after, metrics = train_step(start, fill_rows(PAIRS, PADDED), traced(made, 1e-2, objective=broken))
    assert not metrics['finite']
    assert_equal(after.average_params, start.average_params)
    after, metrics = train_step(start, fill_rows(PAIRS, PADDED), traced(made, 1e-2))
    assert metrics['finite'] and differ(after.average_params, start.average_params)


def test_an_average_is_not_differentiated():
    models, made, _, start = one_average(every=1, rate=0.6)
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), fill_rows(PAIRS, PADDED))
    counts = objective.counts_of(batch.chosen.weights, batch.rejected.weights)

    def loss(policy, averages):
        now = start.replace(params=policy, average_params=averages)
        pairs = scoring.sides(models, made, now.trained, now.frozen, batch)
        weight = batch.pair_weight.reshape(-1)
        return objective.evaluate(made, made.hyperparameters, *pairs, weight, counts)[0]

    by_policy, by_average = jax.jit(jax.grad(loss, argnums=(0, 1)))(start.params, start.average_params)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(by_policy))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_average))
