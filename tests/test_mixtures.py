"""Mixtures through whole training steps: layouts, accumulation and meshes agree over several steps, state included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_decoders
import tiny_meshes
from jax.sharding import NamedSharding

from jaxpo import objective, scoring, sharding, state, step
from jaxpo.config import Rows
from jaxpo.data.rows import fill_rows
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import Decoder
from jaxpo.references import mixing, weighting
from jaxpo.run import wanted_of
from jaxpo.types import Pair, Sequence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CONFIG = tiny_decoders.CONFIGS['llama'] | {'num_hidden_layers': 2}
THREE = ('initial', 'external', 'third')
PADDED = Rows(layout='padded', lengths=(96,), microbatch=64)
STEPS, RATE = 3, 0.2
SPECS = {
    'arwc': {'mixture': {'weights': 'arwc', 'clip': 'adaptive', 'primary': 'external'}, 'dpo': {}, 'multi_dpo': {}},
    'swcw': {'mixture': {'weights': 'swcw', 'window': 2, 'mix': 'geometric'}, 'dpo': {'beta': 0.3}},
    'learned': {'mixture': {'weights': 'learned', 'rate': 0.3, 'mix': 'arithmetic', 'primary': 'third'}, 'dpo': {}},
    'tsw': {'mixture': {'weights': 'tsw', 'prior': 0.5}, 'ipo': {}},
    'coupled': {'mixture': {'weights': 'learned', 'rate': 0.3}, 'kto': {}, 'bco': {}},
    'divergences': {'mixture': {'external': 3.0, 'third': 0.5}, 'tdpo2': {}, 'tis_dpo': {'weights': 'column'}},
}


def pairs_of(made, seed, count=20):
    random, wanted = np.random.default_rng(seed), wanted_of(made)

    def tokens(low, high):
        return random.integers(3, 61, random.integers(low, high)).astype(np.int32)

    def pair(index):
        prompt, sides = tokens(2, 9), {'chosen': tokens(1, 12), 'rejected': tokens(1, 12)}
        columns = {
            name: random.uniform(0.5, 1.5, sides[name.partition('_')[0]].size).astype(np.float32)
            for name in wanted.tokens
        }
        companions = {name: Sequence(tokens(2, 9), tokens(1, 9)) for name in wanted.companions}
        return Pair(prompt, *sides.values(), index, columns=columns, companions=companions)

    return [pair(index) for index in range(count)]


@functools.cache
def parameters(seed):
    return jax.tree.map(jnp.asarray, tiny_decoders.loud_params(CONFIG, seed))


def models(names, mesh=None):
    rows = None if mesh is None else NamedSharding(mesh, sharding.ROWS)
    decoder = Decoder(from_hugging_face(CONFIG), rows=rows)
    return scoring.Models(decoder, dict.fromkeys(names, scoring.FrozenModel(decoder, 'own')), mesh)


def batch_of(made, seed, rows=PADDED, mesh=None):
    batch = fill_rows(pairs_of(made, seed), rows, row_multiple=8 if mesh else 1)
    return batch if mesh is None else sharding.put(batch, mesh, sharding.MICROBATCHES)


def run(spec, references=None, rows=PADDED, mesh=None, steps=STEPS):
    """Metrics of each step, what the steps took from the parameters, and the method's state after each."""
    references = references or dict(zip(THREE, (1, 2, 3)))
    made, optimizer = objective.make(spec, tuple(references)), optax.clip_by_global_norm(1.0)
    held = {name: parameters(seed) for name, seed in references.items()}
    current = state.create(parameters(0), held, optimizer, objective.init_state(made))
    current = current if mesh is None else jax.device_put(current, sharding.parameter_shardings(current, mesh))
    train_step = jax.jit(step.make_train_step(models(references, mesh), made, optimizer))
    reward_step = jax.jit(step.make_reward_step(made)) if made.draws_arm else None
    settings = {'learning_rate': RATE, 'method_learning_rate': RATE, 'seed': 3, 'objective': made.hyperparameters}
    start, seen, states = current.params, [], []
    for number in range(steps):
        current, metrics = train_step(current, batch_of(made, number, rows, mesh), settings)
        if reward_step is not None:
            current = current.replace(method_state=reward_step(current, settings, jnp.float32(number != 1)))
        seen.append(jax.device_get(metrics))
        states.append(jax.device_get(current.method_state))
    taken = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), start, current.params)
    return seen, taken, states


def assert_same(ours, theirs, tolerance=3e-5):
    for mine, other in zip(ours[0], theirs[0], strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_allclose(mine[name], value, rtol=tolerance, atol=tolerance, err_msg=name)
    scale = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs[1]))
    for mine, other in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(mine, other, atol=tolerance * scale, rtol=0)
    for mine, other in zip(jax.tree.leaves(ours[2]), jax.tree.leaves(theirs[2]), strict=True):
        np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


@functools.cache
def whole(which):
    return run(SPECS[which])


@pytest.mark.parametrize('which', SPECS)
def test_the_fixture_has_something_to_say(which):
    seen, taken, states = whole(which)
    for metrics in seen:
        assert metrics['finite'] and metrics['grad_norm'] > 0.01
        np.testing.assert_allclose(sum(metrics[f'references/{name}/weight'] for name in THREE), 1, rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(taken))
    assert seen[0]['loss'] != seen[1]['loss'] != seen[2]['loss']
    if which in ('swcw', 'learned', 'tsw', 'coupled'):
        first, *_, last = (jax.tree.leaves(held['mixture']) for held in states)
        assert not all(np.allclose(*both) for both in zip(first, last))
    shares = [[metrics[f'references/{name}/weight'] for name in THREE] for metrics in seen]
    if which in ('swcw', 'learned', 'coupled'):
        np.testing.assert_allclose(shares[0], np.full(3, 1 / 3), rtol=1e-5)
        assert np.abs(np.subtract(shares[1], shares[2])).max() > 1e-3 < np.abs(np.subtract(shares[0], shares[1])).max()
    if which == 'divergences':
        np.testing.assert_allclose(shares, [[1 / 4.5, 3 / 4.5, 0.5 / 4.5]] * 3, rtol=1e-5)


@pytest.mark.parametrize('which', SPECS)
def test_packed_accumulated_and_sharded_equals_whole(which):
    mesh = tiny_meshes.mesh(2, 4)
    rows = Rows(layout='packed', lengths=(96,), microbatch=8, pairs_per_row=2)
    microbatches, count = batch_of(objective.make(SPECS[which], THREE), 0, rows, mesh).tokens.shape[:2]
    assert microbatches > 1 and count == 8
    assert_same(run(SPECS[which], rows=rows, mesh=mesh), whole(which))


@functools.cache
def against_one():
    return run({'dpo': {'beta': 0.3}, 'ipo': {}}, {'initial': 1}, steps=1)


def without_mixture(result):
    seen, taken, _ = result
    kept = [{name: v for name, v in metrics.items() if not name.startswith('references/')} for metrics in seen]
    return kept, taken, []


@pytest.mark.parametrize('names', [THREE[:1], THREE], ids=['alone', 'identical'])
def test_a_reference_alone_or_many_times_is_that_reference(names):
    spec = {'mixture': {'weights': 'arwc', 'clip': 'fixed', 'mix': 'harmonic'}, 'dpo': {'beta': 0.3}, 'ipo': {}}
    found = run(spec, dict.fromkeys(names, 1), steps=1)
    assert_same(without_mixture(found), without_mixture(against_one()), 1e-6)


def test_the_order_of_references_is_of_no_matter():
    moved = run(SPECS['arwc'], {'third': 3, 'initial': 1, 'external': 2})
    assert_same(moved, whole('arwc'))


BOTH = {'tdpo2': {}, 'tis_dpo': {'weights': 'column'}}
DIVERGENCES = ('forward_kl', 'reverse_kl')
SHARES = np.array([0.75, 0.25], np.float32)


@functools.cache
def scored(*names):
    """The objective, and the pairs of a step against these references, with both divergences."""
    mixture = {'mixture': {'external': 3.0}} if len(names) > 1 else {}
    made = objective.make(mixture | BOTH, names)
    held = {name: parameters(THREE.index(name) + 1) for name in names}
    batch = jax.tree.map(lambda x: x[0], batch_of(made, 0))
    current = state.create(parameters(0), held, optax.identity())
    sides = jax.jit(functools.partial(scoring.sides, models(names), made))
    return made, sides(current.trained, current.frozen, batch)


@pytest.mark.parametrize('divergence', DIVERGENCES)
def test_divergences_are_to_each_reference_and_of_the_mixture_their_weighted_mean(divergence):
    made, many = scored('external', 'third')
    alone = [scored(name)[1] for name in ('external', 'third')]
    found = objective.combine(made, made.hyperparameters, *many)
    for place, side in enumerate(many):
        each = [getattr(sides[place], divergence) for sides in alone]
        assert not np.allclose(each[0], each[1], atol=0.1)
        np.testing.assert_allclose(side.by_reference[divergence], each, rtol=1e-5, atol=1e-6)
        mean = sum(share * one for share, one in zip(SHARES, each))
        np.testing.assert_allclose(getattr(found[place], divergence), mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            side.reference_logps, [sides[place].reference_logps[0] for sides in alone], rtol=1e-5
        )


@pytest.mark.parametrize('mix', mixing.MIXES)
@pytest.mark.parametrize('weights', weighting.WEIGHTINGS)
def test_identical_references_are_one_in_float32(weights, mix):
    """Value, and what it is differentiated by: the policy's log-probabilities, from where the step goes on as ever."""
    sides = scored('initial')[1]
    many = [
        side.replace(
            reference_logps=jnp.repeat(side.reference_logps, 3, axis=0),
            by_reference={name: jnp.repeat(getattr(side, name)[None], 3, axis=0) for name in DIVERGENCES},
            **dict.fromkeys(DIVERGENCES),
        )
        for side in sides
    ]
    counts, weight = objective.counts_of(*(side.weights for side in sides)), jnp.ones(len(sides[0].weights))

    def value(policies, spec, names, given):
        made = objective.make(spec, names)
        both = [side.replace(policy_logps=policy) for side, policy in zip(given, policies)]
        parts = {'state': objective.init_state(made), 'key': jax.random.key(0)}
        return objective.evaluate(made, made.hyperparameters, *both, weight, counts, **parts)[0]

    policies = [side.policy_logps for side in sides]
    mixture = {'mix': mix, 'weights': weights, 'clip': 'adaptive'}
    ours = jax.value_and_grad(value)(policies, {'mixture': mixture, **BOTH}, THREE, many)
    theirs = jax.value_and_grad(value)(policies, BOTH, THREE[:1], sides)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6 * np.abs(other).max(), rtol=0)
