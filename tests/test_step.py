"""The step as a whole: layouts, accumulation, meshes and dtypes agree; references stand still; NaN goes nowhere."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_decoders
import tiny_meshes
from jax.sharding import NamedSharding

from jaxpo import objective, scoring, sharding, state, step
from jaxpo.config import Optimizer, Rows
from jaxpo.data.rows import fill_rows
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import Decoder
from jaxpo.types import Pair

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CONFIG = tiny_decoders.CONFIGS['llama'] | {'num_hidden_layers': 2}
GEMMA = tiny_decoders.CONFIGS['gemma2'] | {'num_hidden_layers': 2}
SPEC = {'dpo': {'beta': 0.5}, 'sft': {'weight': 0.1}}
REFERENCES = ('initial',)
PADDED = Rows(layout='padded', lengths=(64,), microbatch=64)


def pairs_of(seed=0, count=6):
    random = np.random.default_rng(seed)

    def tokens(low, high):
        return random.integers(3, 61, random.integers(low, high)).astype(np.int32)

    return [Pair(tokens(2, 9), tokens(1, 12), tokens(1, 12), index) for index in range(count)]


PAIRS = pairs_of()


def models(config=CONFIG, mesh=None, dtype=jnp.float32, remat='none', reference=True):
    rows = None if mesh is None else NamedSharding(mesh, sharding.ROWS)
    decoder = Decoder(from_hugging_face(config), dtype=dtype, remat=remat, rows=rows)
    return scoring.Models(decoder, {'initial': scoring.FrozenModel(decoder, 'own')} if reference else {}, mesh)


def traced(made, rate=1.0, **numbers):
    rates = {'learning_rate': rate, 'method_learning_rate': rate}
    return {**rates, 'seed': 0, 'objective': made.hyperparameters, **numbers}


def parameters(config=CONFIG, seed=0):
    return jax.tree.map(jnp.asarray, tiny_decoders.loud_params(config, seed))


def first_state(config=CONFIG, reference_seed=1, optimizer=None, mesh=None):
    """A policy and another reference, so that no log-ratio is 0."""
    optimizer = optimizer or state.make_optimizer(Optimizer())
    made = state.create(parameters(config), {'initial': parameters(config, reference_seed)}, optimizer)
    return made if mesh is None else jax.device_put(made, sharding.parameter_shardings(made, mesh))


def one_step(rows=PADDED, config=CONFIG, start=None, **options):
    """Metrics and the gradients of the policy (a step of plain gradient descent at rate 1 shows them)."""
    made = objective.make(SPEC, REFERENCES)
    optimizer = optax.identity()
    train_step = jax.jit(step.make_train_step(models(config, **options), made, optimizer))
    start = start or first_state(config, optimizer=optimizer)
    after, metrics = train_step(start, fill_rows(PAIRS, rows), traced(made))
    gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start.params, after.params)
    return jax.device_get(metrics), gradient, after


@functools.cache
def padded(config_name='llama'):
    return one_step(config=CONFIG if config_name == 'llama' else GEMMA)


def assert_same(one, other, tolerance=1e-5):
    np.testing.assert_allclose(one[0]['loss'], other[0]['loss'], rtol=tolerance)
    for name, value in one[0].items():
        np.testing.assert_allclose(value, other[0][name], rtol=tolerance, atol=tolerance, err_msg=name)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(other[1]))
    for ours, theirs in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1])):
        np.testing.assert_allclose(ours, theirs, atol=tolerance * scale, rtol=0)


def test_the_fixture_has_something_to_say():
    metrics, gradient, _ = padded()
    assert abs(metrics['rewards/margins']) > 0.1 and metrics['grad_norm'] > 0.1
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize('config', ['llama', 'gemma2'])
@pytest.mark.parametrize('layout', ['packed', 'shared'])
def test_packed_and_shared_rows_equal_padded_ones(layout, config):
    rows = Rows(layout=layout, lengths=(64,), microbatch=64)
    assert fill_rows(PAIRS, rows).tokens.shape[1] < len(PAIRS)
    assert_same(one_step(rows, config=CONFIG if config == 'llama' else GEMMA), padded(config))


@pytest.mark.parametrize('layout, microbatch', [('padded', 4), ('padded', 1), ('shared', 1)])
def test_accumulated_equals_whole(layout, microbatch):
    rows = Rows(layout=layout, lengths=(64,), microbatch=microbatch, pairs_per_row=4)
    assert fill_rows(PAIRS, rows).tokens.shape[0] > 1
    assert_same(one_step(rows), padded())


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_nothing(remat):
    assert_same(one_step(remat=remat), padded(), 1e-6)


def test_tied_head_gets_both_of_its_gradients():
    config = CONFIG | {'tie_word_embeddings': True}
    decoder = Decoder(from_hugging_face(config))
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), fill_rows(PAIRS, PADDED))

    def through_logits(params):
        hidden = decoder.apply({'params': params}, batch.tokens, batch.positions, batch.segment, batch.branch)
        logps = jax.nn.log_softmax(hidden @ params['embedding'].T)
        rows = jnp.arange(len(PAIRS))[:, None]
        scored = logps[rows, batch.source, batch.target]
        weight = (
            jnp.zeros(batch.source.shape)
            .at[rows[..., None], batch.chosen.place[:, 0][:, None]]
            .max(batch.chosen.weights[:, 0][:, None])
        )
        return (scored * weight).sum()

    def through_step(params):
        chosen, _ = scoring.log_probabilities(models(config), (), params, {'base': {}}, batch)
        return (chosen.policy_logps * chosen.weights).sum()

    params = parameters(config)
    ours, theirs = jax.grad(through_step)(params), jax.grad(through_logits)(params)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max())


def test_policy_equal_to_reference_is_exactly_so():
    start = first_state(reference_seed=0, optimizer=optax.identity())
    rows = Rows(layout='shared', lengths=(64,), microbatch=8)
    metrics, gradient, _ = one_step(rows, start=start)
    assert metrics['rewards/margins'] == metrics['rewards/chosen'] == 0
    assert metrics['rewards/accuracies'] == 0.5
    np.testing.assert_allclose(metrics['loss/dpo'], np.log(2), rtol=1e-6)
    assert metrics['grad_norm'] > 0


def test_references_are_bit_identical_after_training_and_states_are_donated():
    made = objective.make(SPEC, REFERENCES)
    optimizer = state.make_optimizer(Optimizer(learning_rate=1e-2))
    train_step = jax.jit(step.make_train_step(models(), made, optimizer), donate_argnums=0)
    current = first_state(optimizer=optimizer)
    before = jax.tree.map(lambda x: np.array(x), current.reference_params)
    batch, losses = fill_rows(PAIRS, PADDED), []
    for _ in range(5):
        held = current.params['embedding']
        current, metrics = train_step(current, batch, traced(made, 1e-2))
        assert held.is_deleted()
        losses.append(float(metrics['loss']))
    jax.tree.map(np.testing.assert_array_equal, before, jax.device_get(current.reference_params))
    assert losses[-1] < losses[0] and current.step == 5
    assert train_step._cache_size() == 1


def test_a_new_beta_or_learning_rate_compiles_nothing():
    made = objective.make(SPEC, REFERENCES)
    train_step = jax.jit(step.make_train_step(models(), made, optax.identity()))
    start, batch = first_state(optimizer=optax.identity()), fill_rows(PAIRS, PADDED)
    for beta, rate in ((0.1, 1e-3), (0.7, 1e-2)):
        numbers = objective.make({'dpo': {'beta': beta}, 'sft': {}}, REFERENCES).hyperparameters
        train_step(start, batch, traced(made, np.float32(rate), objective=numbers))
    assert train_step._cache_size() == 1


def test_a_mesh_keeps_its_shardings_and_compiles_once():
    mesh = tiny_meshes.mesh(2, 4)
    made = objective.make(SPEC, REFERENCES)
    optimizer = state.make_optimizer(Optimizer())
    current = first_state(optimizer=optimizer, mesh=mesh)
    shardings = sharding.parameter_shardings(current, mesh)
    train_step = jax.jit(
        step.make_train_step(models(mesh=mesh), made, optimizer),
        donate_argnums=0,
        out_shardings=(shardings, sharding.replicated(mesh)),
    )
    batch = sharding.put(fill_rows(PAIRS, PADDED, row_multiple=8), mesh, sharding.MICROBATCHES)
    for _ in range(3):
        held = current.params['embedding']
        current, _ = train_step(current, batch, traced(made, 1e-3))
        assert held.is_deleted()
    assert train_step._cache_size() == 1
    assert current.params['embedding'].sharding.spec[1] == 'fsdp'
    moments = current.opt_state.inner_states['policy'].inner_state[1].mu['policy']
    up = moments['layers']['mlp']['up']
    assert up.addressable_shards[0].data.size * 4 == current.params['layers']['mlp']['up'].size


@pytest.mark.parametrize('where', ['params', 'reference_params'])
def test_nan_reaches_neither_parameters_nor_optimizer(where):
    optimizer = state.make_optimizer(Optimizer())
    made = objective.make(SPEC, REFERENCES)
    start = first_state(optimizer=optimizer)
    broken = jax.tree.map_with_path(
        lambda path, leaf: leaf * jnp.nan if 'final_norm' in str(path) else leaf, getattr(start, where)
    )
    start = start.replace(**{where: broken})
    train_step = jax.jit(step.make_train_step(models(), made, optimizer))
    settings = traced(made, 1e-3)
    after, metrics = train_step(start, fill_rows(PAIRS, PADDED), settings)
    assert not metrics['finite'] and not np.isfinite(metrics['loss'])
    jax.tree.map(np.testing.assert_array_equal, after.params, start.params)
    jax.tree.map(np.testing.assert_array_equal, after.opt_state, start.opt_state)


def test_compiled_step_holds_no_tokens_by_vocabulary():
    vocabulary = 12347
    config = CONFIG | {'vocab_size': vocabulary}
    made = objective.make(SPEC, REFERENCES)
    optimizer = state.make_optimizer(Optimizer())
    batch = fill_rows(PAIRS, Rows(layout='shared', lengths=(64,), microbatch=64))
    scored = batch.source.size
    train_step = jax.jit(step.make_train_step(models(config), made, optimizer), donate_argnums=0)
    settings = traced(made, 1e-3)
    text = train_step.lower(first_state(config, optimizer=optimizer), batch, settings).compile().as_text()
    shapes = {tuple(map(int, d.split(','))) for d in re.findall(r'\b(?:f32|bf16|f16|s32|pred)\[([\d,]+)\]', text)}
    assert any(vocabulary in shape for shape in shapes)
    by_vocabulary = [shape for shape in shapes if vocabulary in shape]
    assert max(int(np.prod(shape)) for shape in by_vocabulary) == vocabulary * config['hidden_size']
    assert scored > config['hidden_size']
