"""What must hold of every registered loss, tested over the whole registry: a new method is covered by being there."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import oracles

from jaxpo import losses
from jaxpo.losses import checks, contract
from jaxpo.types import Completion

NAMES = sorted(losses.LOSSES)
PAIRS, TOKENS = contract.PAIRS, contract.TOKENS
DIFFERENTIABLE = ('policy_logps', 'forward_kl', 'reverse_kl', 'entropy', 'log_sum_squares')


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


CASES = [(name, options) for name in NAMES for options in contract.settings(losses.find(name))]


def sides_of(sample):
    """The oracle's completions of an example: chosen and rejected, of each pair."""
    completions = jax.device_get((sample.chosen, sample.rejected))
    return [[oracles.side_of(side, index) for index in range(PAIRS)] for side in completions]


def oracle_of(name, sample, options):
    """The oracle of an example, `(sides, index) -> loss` of a pair; `-> losses` of all where the loss couples them."""
    frozen = sides_of(sample)
    oracle = oracles.COUPLED.get(name) or oracles.ORACLES[name]
    known = inspect.signature(oracle).parameters
    given = {'frozen': frozen, **sample.extra, **losses.find(name).hyperparameters(options)}
    given = {key: value for key, value in given.items() if key in known}
    if name in oracles.COUPLED:
        return lambda sides, index: np.asarray(oracle(*sides, **given))
    by_pair = [given | ({'frozen': pair} if 'frozen' in given else {}) for pair in zip(*frozen)]
    return lambda sides, index: np.asarray(oracle(sides[0][index], sides[1][index], **by_pair[index]))


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
    oracle, sides = oracle_of(name, sample, options), sides_of(sample)
    theirs = oracle(sides, 0) if name in oracles.COUPLED else [oracle(sides, index) for index in range(PAIRS)]
    np.testing.assert_allclose(values, theirs, rtol=1e-11, atol=1e-13)
    assert values.shape == rewards.chosen.shape == rewards.rejected.shape == (PAIRS,)


@pytest.mark.parametrize('name, options, value', oracles.GOLDEN)
def test_golden_value(double, name, options, value):
    def spread(policy, reference, tokens):
        share = jnp.full((1, tokens), 1.0 / tokens)
        return Completion(policy * share, (reference * share)[None], jnp.ones((1, tokens)))

    values, _ = losses.find(name)(spread(-12.0, -13.0, 6), spread(-15.0, -14.5, 9), **options)
    np.testing.assert_allclose(values, [value], rtol=1e-11)


def numbers_of(side, field):
    """The array [T] of an oracle's completion that a field of gradients is by."""
    if field == 'policy_logps':
        return side.policy
    return side.masks[field.removeprefix('masks/')] if field.startswith('masks/') else side.statistics[field]


def differentiable(gradient):
    """Gradients by field name, masks included."""
    found = {name: getattr(gradient, name) for name in DIFFERENTIABLE}
    found |= {f'masks/{name}': value for name, value in gradient.masks.items()}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize('name, options', CASES)
def test_gradient_equals_finite_differences_of_the_oracle(double, name, options):
    sample = contract.example(losses.find(name), options)
    gradients = jax.grad(total(name, options, sample), argnums=(0, 1))(sample.chosen, sample.rejected)
    oracle, sides, step = oracle_of(name, sample, options), sides_of(sample), 1e-6
    for which, gradient in enumerate(gradients):
        for field, found in differentiable(gradient).items():
            slopes = np.empty((PAIRS, TOKENS))
            for index, token in np.ndindex(PAIRS, TOKENS):
                numbers, ends = numbers_of(sides[which][index], field), []
                unmoved = numbers[token]
                for shift in (step, -step):
                    numbers[token] = unmoved + shift
                    ends.append(oracle(sides, index).sum())
                numbers[token] = unmoved
                slopes[index, token] = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(found, slopes, atol=1e-7, rtol=1e-6, err_msg=field)


@pytest.mark.parametrize('name', sorted(oracles.AT_REFERENCE))
def test_closed_form_at_the_reference_with_a_gradient(double, name):
    sample = contract.example(losses.find(name), {})
    policy, references = sample.chosen.policy_logps[None], sample.chosen.reference_logps
    alike = sample.chosen.replace(reference_logps=jnp.broadcast_to(policy, references.shape))
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


@pytest.mark.parametrize('check', checks.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize('name', NAMES)
def test_checks_hold(double, name, check):
    check(losses.find(name))
