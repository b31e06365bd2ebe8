"""What must hold of every registered loss, tested over the whole registry: a new method is covered by being there."""

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import oracles

from jaxpo import losses
from jaxpo.types import Completion

NAMES = sorted(losses.LOSSES)
LENGTHS = {'chosen': (5, 2, 7, 1), 'rejected': (3, 6, 1, 7)}
PAIRS, TOKENS = 4, 7


def completion(side, seed, dtype):
    random = np.random.default_rng(seed)
    weights = np.array([[float(t < n) for t in range(TOKENS)] for n in LENGTHS[side]])
    policy, reference = -random.exponential(1.5, (2, PAIRS, TOKENS))
    return Completion(*(jnp.asarray(x, dtype) for x in (policy, reference[None], weights)))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def sides(seed=0, dtype=jnp.float64):
    return completion('chosen', seed, dtype), completion('rejected', seed + 1, dtype)


def pair(side, index):
    return tuple(np.asarray(x) for x in (side.policy_logps[index], side.reference_logps[0, index], side.weights[index]))


def settings(name):
    """The defaults, then each hyperparameter changed in turn: numbers by half, words to every other choice."""
    entry = losses.find(name)
    hints = typing.get_type_hints(entry.function)
    yield {}
    for key, default in entry.defaults.items():
        for value in typing.get_args(hints[key]) or (default * 1.5,):
            if value != default:
                yield {key: value}


CASES = [(name, options) for name in NAMES for options in settings(name)]


def total(name, options, weights=None):
    def scalar(chosen, rejected):
        values, _ = losses.find(name).function(chosen, rejected, **options)
        return (values if weights is None else values * weights).sum()

    return scalar


def test_every_loss_has_an_oracle_and_a_golden_value():
    assert set(oracles.ORACLES) == set(NAMES)
    assert {name for name, *_ in oracles.GOLDEN} | {'sft'} >= set(NAMES)


@pytest.mark.parametrize('name, options', CASES)
def test_value_equals_oracle(double, name, options):
    chosen, rejected = sides()
    values, rewards = losses.find(name).function(chosen, rejected, **options)
    theirs = [oracles.ORACLES[name](pair(chosen, i), pair(rejected, i), **options) for i in range(PAIRS)]
    np.testing.assert_allclose(values, theirs, rtol=1e-12)
    assert rewards.chosen.shape == rewards.rejected.shape == (PAIRS,)


@pytest.mark.parametrize('name, options, value', oracles.GOLDEN)
def test_golden_value(double, name, options, value):
    def spread(policy, reference, tokens):
        share = jnp.full((1, tokens), 1.0 / tokens)
        return Completion(policy * share, (reference * share)[None], jnp.ones((1, tokens)))

    values, _ = losses.find(name).function(spread(-12.0, -13.0, 6), spread(-15.0, -14.5, 9), **options)
    np.testing.assert_allclose(values, [value], rtol=1e-11)


@pytest.mark.parametrize('name, options', CASES)
def test_gradient_equals_finite_differences_of_the_oracle(double, name, options):
    chosen, rejected = sides()
    gradients = jax.grad(total(name, options), argnums=(0, 1))(chosen, rejected)
    step = 1e-6
    for which, gradient in enumerate(gradients):
        for index, token in np.ndindex(PAIRS, TOKENS):
            ends = []
            for shift in (step, -step):
                both = [list(pair(chosen, index)), list(pair(rejected, index))]
                both[which][0] = both[which][0].copy()
                both[which][0][token] += shift
                ends.append(oracles.ORACLES[name](*both, **options))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(gradient.policy_logps[index, token], slope, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize('name', NAMES)
def test_padding_has_no_say(double, name):
    sides_ = sides()
    noisy = [
        s.replace(
            policy_logps=jnp.where(s.weights > 0, s.policy_logps, -1e3),
            reference_logps=jnp.where(s.weights > 0, s.reference_logps, 7.0),
        )
        for s in sides_
    ]
    clean, (value, gradients) = (
        total(name, {})(*sides_),
        jax.value_and_grad(total(name, {}), argnums=(0, 1))(*noisy),
    )
    assert value == clean
    for side, gradient in zip(noisy, gradients):
        assert not np.any(np.where(side.weights == 0, gradient.policy_logps, 0))


@pytest.mark.parametrize('name', NAMES)
def test_reads_the_reference_exactly_if_it_says_so(double, name):
    chosen, rejected = sides()
    other = chosen.replace(reference_logps=chosen.reference_logps - 0.5)
    changed = total(name, {})(chosen, rejected) != total(name, {})(other, rejected)
    assert changed == losses.find(name).reads_reference


@pytest.mark.parametrize('name', NAMES)
def test_pairs_do_not_touch_each_other(double, name):
    chosen, rejected = sides()
    gradients = jax.grad(total(name, {}, jnp.eye(PAIRS)[1]), argnums=(0, 1))(chosen, rejected)
    for gradient in gradients:
        touched = np.abs(gradient.policy_logps).sum(axis=1) > 0
        assert not touched[[0, 2, 3]].any()


@pytest.mark.parametrize('name', sorted(oracles.AT_REFERENCE))
def test_closed_form_at_the_reference_with_a_gradient(double, name):
    chosen, _ = sides()
    alike = chosen.replace(reference_logps=chosen.policy_logps[None])
    value, gradients = jax.value_and_grad(total(name, {}), argnums=(0, 1))(alike, alike)
    np.testing.assert_allclose(value / PAIRS, oracles.AT_REFERENCE[name](), rtol=1e-12)
    for side, gradient in zip('+-', gradients):
        real = gradient.policy_logps[alike.weights > 0]
        assert jnp.isfinite(real).all() and (real < 0 if side == '+' else real > 0).all()


@pytest.mark.parametrize('name', sorted(oracles.LOGISTIC))
def test_swapping_the_pair_mirrors_the_loss(double, name):
    chosen, rejected = sides()
    function = losses.find(name).function
    (forward, rewards), (backward, swapped) = function(chosen, rejected), function(rejected, chosen)
    np.testing.assert_allclose(forward - backward, -(rewards.chosen - rewards.rejected), rtol=1e-10)
    np.testing.assert_array_equal(rewards.chosen, swapped.rejected)


@pytest.mark.parametrize('name', NAMES)
def test_empty_slots_are_finite_in_value_and_gradient(double, name):
    empty = Completion(jnp.zeros((1, 3)), jnp.zeros((1, 1, 3)), jnp.zeros((1, 3)))
    value, gradients = jax.value_and_grad(total(name, {}), argnums=(0, 1))(empty, empty)
    assert jnp.isfinite(value) and all(jnp.isfinite(g.policy_logps).all() for g in gradients)


@pytest.mark.parametrize('name', NAMES)
def test_extreme_log_probabilities_stay_finite(name):
    chosen, rejected = (s.replace(policy_logps=s.policy_logps * 1e4) for s in sides(dtype=jnp.float32))
    value, gradients = jax.value_and_grad(total(name, {}), argnums=(0, 1))(chosen, rejected)
    assert jnp.isfinite(value) and all(jnp.isfinite(g.policy_logps).all() for g in gradients)


@pytest.mark.parametrize('name, options', CASES)
def test_every_option_changes_something(double, name, options):
    if options:
        values, _ = losses.find(name).function(*sides())
        others, _ = losses.find(name).function(*sides(), **options)
        assert not np.allclose(values, others)


@pytest.mark.parametrize('name', NAMES)
def test_vmapped_equals_looped_over_hyperparameters_and_compiles_once(name):
    chosen, rejected = sides(dtype=jnp.float32)
    entry = losses.find(name)
    numbers = {k: v for k, v in entry.defaults.items() if not isinstance(v, str)}
    if not numbers:
        return
    stacked = {key: jnp.array([value, value * 1.5, value * 2.0]) for key, value in numbers.items()}
    compiled = jax.jit(lambda numbers: entry.function(chosen, rejected, **numbers)[0])
    together = jax.vmap(compiled)(stacked)
    singly = [compiled({key: values[i] for key, values in stacked.items()}) for i in range(3)]
    np.testing.assert_allclose(together, jnp.stack(singly), rtol=1e-6)
    assert compiled._cache_size() <= 2  # one for vmap's batched arguments, one for plain ones


@pytest.mark.parametrize('name', NAMES)
def test_is_documented(name):
    entry = losses.find(name)
    assert entry.summary.endswith('.') and entry.source
    assert all(key in inspect.getdoc(entry.function) for key in entry.defaults)
