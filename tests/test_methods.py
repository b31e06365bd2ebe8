"""Every method through the whole step: it trains; layouts, accumulation and meshes agree on whatever it needs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_decoders
import tiny_meshes
from jax.sharding import NamedSharding

from jaxpo import losses, objective, scoring, sharding, state, step
from jaxpo.config import Rows
from jaxpo.data.rows import fill_rows
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import Decoder
from jaxpo.run import wanted_of
from jaxpo.types import Pair, Sequence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CONFIG = tiny_decoders.CONFIGS['llama'] | {'num_hidden_layers': 2}
PADDED = Rows(layout='padded', lengths=(96,), microbatch=64)
# Between them these need every statistic, column, role, companion and part that there is.
TOGETHER = {
    'tdpo2': {},
    'tis_dpo': {'weights': 'models'},
    'token_weighted_dpo': {},
    'sparse_po': {'reward_sparsity': 0.01, 'kl_sparsity': 0.02},
    'mapo': {},
    'wpo': {},
    'rainbow_po': {},
    'odpo': {'alpha': 0.2},
    'hpo': {},
    'mdpo': {},
    'modpo': {},
    'spo': {},
    'sdpo': {},
}
COUPLED = {'kto': {}, 'bco': {}, 'aot': {}, 'alpha_dpo': {}, 'beta_dpo': {'rho': 0.0}, 'hpo': {}, 'sparse_po': {}}


def made_of(spec):
    """The objective, with references for all its roles."""
    roles = [role for name, given in spec.items() for role in losses.find(name).needs_of(given).models]
    return objective.make(spec, ('initial', *dict.fromkeys(roles)))


def pairs_for(made, seed=0, count=6):
    random, wanted = np.random.default_rng(seed), wanted_of(made)

    def tokens(low, high):
        return random.integers(3, 61, random.integers(low, high)).astype(np.int32)

    def pair(index):
        sides = {'chosen': tokens(1, 12), 'rejected': tokens(1, 12)}
        prompt = tokens(2, 9)
        columns = {name: float(random.uniform(0.1, 0.4)) for name in wanted.numbers}
        columns |= {name: value + 0.3 for name, value in columns.items() if name.startswith('chosen_')}
        columns |= {
            name: random.uniform(0.5, 1.5, sides[name.partition('_')[0]].size).astype(np.float32)
            for name in wanted.tokens
        }
        companions = {name: Sequence(tokens(2, 9), tokens(1, 9)) for name in wanted.companions}
        return Pair(prompt, sides['chosen'], sides['rejected'], index, columns, companions)

    return [pair(index) for index in range(count)]


@functools.cache
def parameters(seed):
    return jax.tree.map(jnp.asarray, tiny_decoders.loud_params(CONFIG, seed))


def models(made, mesh=None):
    rows = None if mesh is None else NamedSharding(mesh, sharding.ROWS)
    decoder = Decoder(from_hugging_face(CONFIG), rows=rows)
    return scoring.Models(
        decoder, dict.fromkeys((*made.references, *made.models), scoring.FrozenModel(decoder, 'own')), mesh
    )


def first_state(made, optimizer, apart=True):
    """A policy, its reference (another model where `apart`), and one more for each role."""
    references = {
        name: parameters(seed) for seed, name in enumerate((*made.references, *made.models), 1 if apart else 0)
    }
    architecture = from_hugging_face(CONFIG)
    method_params = objective.init_params(made, jax.random.key(5), architecture.layers, architecture.width)
    return state.create(parameters(0), references, optimizer, objective.init_state(made), method_params)


def traced(made, rate):
    rates = {'learning_rate': rate, 'method_learning_rate': rate}
    return {**rates, 'seed': 0, 'objective': made.hyperparameters}


def one_step(spec, rows=PADDED, mesh=None):
    """Metrics, gradients of policy and parts (plain gradient descent at rate 1 shows them), and the method's state."""
    made, optimizer = made_of(spec), optax.identity()
    start = first_state(made, optimizer)
    start = start if mesh is None else jax.device_put(start, sharding.parameter_shardings(start, mesh))
    batch = fill_rows(pairs_for(made), rows, row_multiple=8 if mesh else 1)
    batch = batch if mesh is None else sharding.put(batch, mesh, sharding.MICROBATCHES)
    train_step = jax.jit(step.make_train_step(models(made, mesh), made, optimizer))
    after, metrics = train_step(start, batch, traced(made, 1.0))
    gradient = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start.trained, after.trained)
    return jax.device_get((metrics, gradient, after.method_state))


@functools.cache
def whole(which):
    return one_step(which_spec(which))


def which_spec(which):
    return {'together': TOGETHER, 'coupled': COUPLED}[which]


def assert_same(ours, theirs):
    for name, value in theirs[0].items():
        np.testing.assert_allclose(ours[0][name], value, rtol=2e-5, atol=2e-5, err_msg=name)
    for part in ('policy', 'method'):
        scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs[1][part]))
        for a, b in zip(jax.tree.leaves(ours[1][part]), jax.tree.leaves(theirs[1][part])):
            np.testing.assert_allclose(a, b, atol=2e-5 * scale, rtol=0)
    for a, b in zip(jax.tree.leaves(ours[2]), jax.tree.leaves(theirs[2])):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_specs_need_everything_there_is():
    needs = made_of(TOGETHER | COUPLED).needs
    assert set(needs.statistics) | {'entropy'} == set(losses.registry.STATISTICS)
    assert needs.completion_columns and needs.token_columns and needs.models
    assert set(needs.companions) == {'corrupted', 'mismatched'}
    assert {name for name in losses.LOSSES if losses.find(name).couples_batch} - {'aot_unpaired'} <= set(COUPLED)


@pytest.mark.parametrize('which', ['together', 'coupled'])
def test_the_fixture_has_something_to_say(which):
    metrics, gradient, method_state = whole(which)
    assert metrics['finite'] and metrics['grad_norm'] > 0.1
    for name in which_spec(which):
        assert np.isfinite(metrics[f'loss/{name}']), name
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient['policy']))
    assert all(np.abs(jax.tree.leaves(part)[0]).max() > 0 for part in gradient['method'].values())
    assert bool(method_state) == (which == 'coupled')


@pytest.mark.parametrize('which', ['together', 'coupled'])
@pytest.mark.parametrize('layout, microbatch', [('shared', 64), ('padded', 2)])
def test_packed_and_accumulated_equal_whole(which, layout, microbatch):
    rows = Rows(layout=layout, lengths=(96,), microbatch=microbatch, pairs_per_row=4)
    assert_same(one_step(which_spec(which), rows), whole(which))


@pytest.mark.parametrize('which', ['together', 'coupled'])
def test_sharded_equals_whole(which):
    mesh = tiny_meshes.mesh(2, 4)
    assert_same(one_step(which_spec(which), Rows(layout='padded', lengths=(96,), microbatch=8), mesh), whole(which))


@functools.cache
def scored_for_all():
    """A start, and compiled once for all methods: its pairs with all that any of them needs, and their derivative."""
    made = made_of(TOGETHER | COUPLED)
    start = first_state(made, optax.identity(), apart=False)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), fill_rows(pairs_for(made, count=4), PADDED))

    def score(trained):
        return scoring.sides(models(made), made, trained, start.frozen, batch)

    pull_back = jax.jit(lambda trained, by_pairs: jax.vjp(score, trained)[1](by_pairs)[0])
    return start.trained, batch, jax.jit(score), pull_back


@pytest.mark.parametrize('name', sorted(losses.LOSSES))
def test_every_method_trains(name):
    """Its loss falls from where the policy is the reference, with finite numbers all the way."""
    made, key = made_of({name: {}}), jax.random.key(0)
    trained, batch, score, pull_back = scored_for_all()
    counts = objective.counts_of(batch.chosen.weights, batch.rejected.weights)

    @jax.jit
    def differentiate(pairs, parts, method_state):
        method_state = objective.update_state(made, made.hyperparameters, method_state, *pairs)

        def loss(pairs, parts):
            given = {'state': method_state, 'params': parts, 'key': key}
            return objective.evaluate(made, made.hyperparameters, *pairs, batch.pair_weight[:, 0], counts, **given)

        return *jax.grad(loss, argnums=(0, 1), has_aux=True)(pairs, parts), method_state

    method_state, found = objective.init_state(made), []
    # Moments that start at 0 take some steps to settle, and the loss with them.
    for _ in range(24 if method_state else 6):
        (by_pairs, by_parts), metrics, method_state = differentiate(score(trained), trained['method'], method_state)
        gradient = pull_back(trained, by_pairs)
        gradient['method'] = jax.tree.map(jnp.add, gradient['method'], by_parts)
        norm = optax.tree.norm(gradient)
        assert jnp.isfinite(metrics['loss']) and jnp.isfinite(norm) and norm > 0
        # WPO's weight is not differentiated, and grows with the chosen completion's probability: its margin tells.
        found.append(float(-metrics['rewards/margins'] if name == 'wpo' else metrics['loss']))
        trained = jax.tree.map(lambda p, g, norm=norm: p - 0.1 * g / norm, trained, gradient)
    assert found[-1] < found[0], found
