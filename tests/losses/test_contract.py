"""What must hold of every registered loss, tested over the whole registry: a new method is covered by being there."""

import dataclasses
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import oracles

from jaxpo import losses
from jaxpo.losses import contract
from jaxpo.types import Completion

NAMES = sorted(losses.LOSSES)
PAIRS, TOKENS = contract.PAIRS, contract.TOKENS
DIFFERENTIABLE = ('policy_logps', 'forward_kl', 'reverse_kl', 'entropy', 'log_sum_squares')


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def settings(name):
    """The defaults, then each hyperparameter changed in turn: numbers by half, words to every other choice."""
    entry = losses.find(name)
    hints = typing.get_type_hints(entry.function)
    yield {}
    for key, default in entry.defaults.items():
        words = tuple(entry.parts.get(key, ())) or typing.get_args(hints.get(key))
        for value in words or (default * 1.5 or 0.25,):
            if value != default:
                yield {key: value}


CASES = [(name, options) for name in NAMES for options in settings(name)]


def theirs(name, sample, options, sides=None):
    """The oracle's losses of an example; `sides` replace its completions, whose own are then the frozen ones."""
    entry = losses.find(name)
    frozen = [[oracles.side_of(side, index) for index in range(PAIRS)] for side in (sample.chosen, sample.rejected)]
    sides = sides or frozen
    oracle = oracles.COUPLED.get(name) or oracles.ORACLES[name]
    known = inspect.signature(oracle).parameters
    given = {'frozen': frozen, **sample.extra, **entry.hyperparameters(options)}
    given = {key: value for key, value in given.items() if key in known}
    if name in oracles.COUPLED:
        return np.asarray(oracle(*sides, **given))
    if 'frozen' in given:
        return np.array([oracle(*pair, **given | {'frozen': still}) for pair, still in zip(zip(*sides), zip(*frozen))])
    return np.array([oracle(*pair, **given) for pair in zip(*sides)])


def total(name, options, sample, weights=None):
    def scalar(chosen, rejected):
        values, _ = contract.losses_of(
            losses.find(name), dataclasses.replace(sample, chosen=chosen, rejected=rejected), options
        )
        return (values if weights is None else values * weights).sum()

    return scalar


def test_every_loss_has_an_oracle():
    assert not set(NAMES) - set(oracles.ORACLES) - set(oracles.COUPLED)
    assert not (set(oracles.ORACLES) | set(oracles.COUPLED)) - set(NAMES)
    assert {name for name in NAMES if losses.find(name).couples_batch} == set(oracles.COUPLED)


@pytest.mark.parametrize('name, options', CASES)
def test_value_equals_oracle(double, name, options):
    sample = contract.example(losses.find(name), options)
    values, rewards = contract.losses_of(losses.find(name), sample, options)
    np.testing.assert_allclose(values, theirs(name, sample, options), rtol=1e-11, atol=1e-13)
    assert values.shape == rewards.chosen.shape == rewards.rejected.shape == (PAIRS,)


@pytest.mark.parametrize('name, options, value', oracles.GOLDEN)
def test_golden_value(double, name, options, value):
    def spread(policy, reference, tokens):
        share = jnp.full((1, tokens), 1.0 / tokens)
        return Completion(policy * share, (reference * share)[None], jnp.ones((1, tokens)))

    values, _ = losses.find(name)(spread(-12.0, -13.0, 6), spread(-15.0, -14.5, 9), **options)
    np.testing.assert_allclose(values, [value], rtol=1e-11)


def nudged(sample, which, field, index, token, shift):
    """The oracle's sides of an example with one number of one completion moved."""
    sides = [[oracles.side_of(side, pair) for pair in range(PAIRS)] for side in (sample.chosen, sample.rejected)]
    side = sides[which][index]
    if field == 'policy_logps':
        side.policy = side.policy.copy()
        side.policy[token] += shift
    else:
        names = side.masks if field.startswith('masks/') else side.statistics
        field = field.removeprefix('masks/')
        names[field] = names[field].copy()
        names[field][token] += shift
    return sides


def differentiable(gradient):
    """Gradients by field name, masks included."""
    found = {name: getattr(gradient, name) for name in DIFFERENTIABLE}
    found |= {f'masks/{name}': value for name, value in gradient.masks.items()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize('name, options', CASES)
def test_gradient_equals_finite_differences_of_the_oracle(double, name, options):
    sample = contract.example(losses.find(name), options)
    gradients = jax.grad(total(name, options, sample), argnums=(0, 1))(sample.chosen, sample.rejected)
    step = 1e-6
    for which, gradient in enumerate(gradients):
        for field, slopes in differentiable(gradient).items():
            for index, token in np.ndindex(PAIRS, TOKENS):
                ends = [
                    theirs(name, sample, options, nudged(sample, which, field, index, token, shift)).sum()
                    for shift in (step, -step)
                ]
                slope = (ends[0] - ends[1]) / (2 * step)
                np.testing.assert_allclose(
                    slopes[index, token], slope, atol=1e-7, rtol=1e-6, err_msg=f'{field} {index} {token}'
                )


@pytest.mark.parametrize('name', NAMES)
def test_padding_has_no_say(double, name):
    sample = contract.example(losses.find(name), {})

    def noisy(side):
        def noise(values):
            if values is None or values.ndim < 2 or values.shape[-2:] != side.weights.shape:
                return values
            return jnp.where(side.weights.reshape((1,) * (values.ndim - 2) + side.weights.shape) > 0, values, -3e2)

        others = {key: noisy(other) for key, other in side.companions.items()}
        return jax.tree.map(noise, side.replace(companions={})).replace(weights=side.weights, companions=others)

    clean = total(name, {}, sample)(sample.chosen, sample.rejected)
    sides = [noisy(side) for side in (sample.chosen, sample.rejected)]
    value, gradients = jax.value_and_grad(total(name, {}, sample), argnums=(0, 1))(*sides)
    assert value == clean
    for side, gradient in zip(sides, gradients):
        for slopes in differentiable(gradient).values():
            assert not np.any(np.where(side.weights == 0, slopes, 0))


@pytest.mark.parametrize('name', NAMES)
def test_reads_the_reference_exactly_if_it_says_so(double, name):
    sample = contract.example(losses.find(name), {})
    other = sample.chosen.replace(reference_logps=sample.chosen.reference_logps - 0.5)
    scalar = total(name, {}, sample)
    changed = scalar(sample.chosen, sample.rejected) != scalar(other, sample.rejected)
    assert changed == losses.find(name).reads_reference


@pytest.mark.parametrize('name', NAMES)
def test_couples_the_batch_exactly_if_it_says_so(double, name):
    sample = contract.example(losses.find(name), {})
    scalar = total(name, {}, sample, jnp.eye(PAIRS)[1])

    def moved(side, shift):
        others = {key: moved(other, shift) for key, other in side.companions.items()}
        return side.replace(policy_logps=side.policy_logps.at[2].add(shift), companions=others)

    # One side alone, both ways: a mean of margins does not move with both sides, nor every rank one way.
    before = scalar(sample.chosen, sample.rejected)
    touched = any(scalar(moved(sample.chosen, shift), sample.rejected) != before for shift in (-4.0, 4.0))
    gradients = jax.grad(scalar, argnums=(0, 1))(sample.chosen, sample.rejected)
    touched |= any(np.abs(g.policy_logps[jnp.array([0, 2, 3])]).sum() > 0 for g in gradients)
    assert touched == losses.find(name).couples_batch


@pytest.mark.parametrize('name', NAMES)
def test_reads_what_it_needs_and_nothing_else(double, name):
    """A needed field that is changed changes the loss or its gradient; nothing else is there to be read."""
    entry = losses.find(name)
    sample = contract.example(entry, {})

    def everything(sides):
        value, gradients = jax.value_and_grad(total(name, {}, sample), argnums=(0, 1))(*sides)
        return np.concatenate([np.ravel(value), *(np.ravel(x) for x in jax.tree.leaves(gradients))])

    before = everything((sample.chosen, sample.rejected))
    needs = entry.needs_of({})
    fields = [*needs.statistics, *(['masks'] if entry.token_masks else [])]
    for field in fields:
        after = everything([_scaled(side, field) for side in (sample.chosen, sample.rejected)])
        assert not np.array_equal(before, after), field
    for group, names in {
        'columns': (*needs.pair_columns, *needs.completion_columns, *needs.token_columns),
        'model_logps': needs.models,
        'companions': needs.companions,
    }.items():
        for key in names:
            after = everything([_scaled_key(side, group, key) for side in (sample.chosen, sample.rejected)])
            assert not np.array_equal(before, after), key


def _bent(x):
    """Scaled and reversed along the last axis: another size and, for a column that only marks tokens, other places."""
    return x[..., ::-1] * jnp.linspace(1.1, 1.9, x.shape[-1]).reshape((1,) * (x.ndim - 1) + (-1,))


def _scaled(side, field):
    return side.replace(**{field: jax.tree.map(_bent, getattr(side, field))})


def _scaled_key(side, group, key):
    held = dict(getattr(side, group))
    if key not in held:
        return side
    held[key] = (
        held[key].replace(policy_logps=_bent(held[key].policy_logps)) if group == 'companions' else _bent(held[key])
    )
    return side.replace(**{group: held})


@pytest.mark.parametrize('name', sorted(oracles.AT_REFERENCE))
def test_closed_form_at_the_reference_with_a_gradient(double, name):
    sample = contract.example(losses.find(name), {})
    alike = sample.chosen.replace(reference_logps=sample.chosen.policy_logps[None])
    value, gradients = jax.value_and_grad(total(name, {}, sample), argnums=(0, 1))(alike, alike)
    np.testing.assert_allclose(value / PAIRS, oracles.AT_REFERENCE[name](), rtol=1e-12)
    for side, gradient in zip('+-', gradients):
        real = gradient.policy_logps[alike.weights > 0]
        assert jnp.isfinite(real).all() and (real < 0 if side == '+' else real > 0).all()


@pytest.mark.parametrize('name', sorted(oracles.LOGISTIC))
def test_swapping_the_pair_mirrors_the_loss(double, name):
    sample = contract.example(losses.find(name), {})
    swapped_sample = dataclasses.replace(sample, chosen=sample.rejected, rejected=sample.chosen)
    (forward, rewards), (backward, swapped) = (
        contract.losses_of(losses.find(name), each, {}) for each in (sample, swapped_sample)
    )
    np.testing.assert_allclose(forward - backward, -(rewards.chosen - rewards.rejected), rtol=1e-10)
    np.testing.assert_array_equal(rewards.chosen, swapped.rejected)


@pytest.mark.parametrize('name', NAMES)
def test_an_empty_slot_is_finite_and_has_no_say(double, name):
    """An empty slot is all zeros. The other pairs' losses and gradients are those without it."""
    entry = losses.find(name)
    sample = contract.example(entry, {})

    def padded(side):
        def append(x):
            axis = list(x.shape).index(PAIRS)
            return jnp.concatenate([x, jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))], axis=axis)

        return jax.tree.map(append, side)

    longer = [padded(side) for side in (sample.chosen, sample.rejected)]
    weights = jnp.arange(PAIRS + 1) < PAIRS
    scalar = total(name, {}, sample, weights.astype(jnp.float64))
    value, gradients = jax.value_and_grad(scalar, argnums=(0, 1))(*longer)
    np.testing.assert_allclose(value, total(name, {}, sample)(sample.chosen, sample.rejected), rtol=1e-12)
    assert all(jnp.isfinite(g.policy_logps).all() for g in gradients)
    assert all(not np.any(g.policy_logps[PAIRS]) for g in gradients)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('scale', [0.0, 1e4])
def test_extreme_log_probabilities_stay_finite(name, scale):
    sample = contract.example(losses.find(name), {}, dtype=jnp.float32)
    sides = [s.replace(policy_logps=s.policy_logps * scale) for s in (sample.chosen, sample.rejected)]
    value, gradients = jax.value_and_grad(total(name, {}, sample), argnums=(0, 1))(*sides)
    assert jnp.isfinite(value) and all(jnp.isfinite(g.policy_logps).all() for g in gradients)


@pytest.mark.parametrize('name, options', CASES)
def test_every_option_changes_something(double, name, options):
    """A changed option changes a loss or a gradient: one that scales only a stopped part shows in the value."""
    if options:
        entry = losses.find(name)
        before, after = (contract.losses_of(entry, contract.example(entry, given), given)[0] for given in ({}, options))
        assert not np.allclose(before, after, rtol=1e-9, atol=0)


@pytest.mark.parametrize('name', NAMES)
def test_vmapped_equals_looped_over_hyperparameters_and_compiles_once(name):
    entry = losses.find(name)
    sample = contract.example(entry, {}, dtype=jnp.float32)
    numbers = {k: v for k, v in entry.defaults.items() if not isinstance(v, str)}
    if not numbers:
        return
    stacked = {key: jnp.array([value, value * 1.1, value * 1.2]) for key, value in numbers.items()}
    compiled = jax.jit(lambda numbers: contract.losses_of(entry, sample, numbers)[0])
    together = jax.vmap(compiled)(stacked)
    singly = [compiled({key: values[i] for key, values in stacked.items()}) for i in range(3)]
    np.testing.assert_allclose(together, jnp.stack(singly), rtol=1e-5, atol=1e-6)
    assert compiled._cache_size() <= 2  # one for vmap's batched arguments, one for plain ones


@pytest.mark.parametrize('name', NAMES)
def test_is_documented(name):
    entry = losses.find(name)
    assert entry.summary.endswith('.') and entry.source and entry.formula
    documented = inspect.getdoc(entry.function)
    assert all(key in documented for key in entry.defaults)
