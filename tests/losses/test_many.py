"""Losses that read many references: golden values, and what equals or bounds what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import losses
from jaxpo.losses import contract
from jaxpo.references import mixture as mixtures
from jaxpo.types import Completion

ENTRY = losses.find('multi_dpo')
ARWC = [0.2580645161290323, 0.7419354838709677]  # weights of the primary and the external reference


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def completion(policy, references, tokens, weights=None):
    """One completion whose log-probabilities are spread evenly over its tokens."""
    share = jnp.full((1, tokens), 1.0 / tokens)
    logps = jnp.stack([logp * share for logp in references])
    weights = None if weights is None else jnp.array(weights)[:, None]
    return Completion(policy * share, logps, jnp.ones((1, tokens)), mixing_weights=weights)


def value(name, pair, **hyperparameters):
    return losses.find(name)(*pair, **hyperparameters)[0]


@pytest.mark.parametrize(
    'external, weights, expected',
    [
        ((-35.0, -58.0), ARWC, 1.1617043386),
        ((-40.25189189189189, -52.91891891891892), ARWC, 0.6718186283),
        ((-35.0, -58.0), [1.0, 0.0], 0.5130152524),
        ((-35.0, -58.0), [0.0, 1.0], 1.3873353251),
        ((-35.0, -58.0), None, (0.5130152524 + 1.3873353251) / 2),
    ],
)
def test_golden(external, weights, expected):
    """Without and with the external reference clipped to a region around the primary; against either; uniform."""
    pair = completion(-40.0, (-42.0, external[0]), 5, weights), completion(-52.0, (-50.0, external[1]), 8, weights)
    np.testing.assert_allclose(value('multi_dpo', pair, beta=0.1), [expected], atol=1e-10)


@pytest.mark.parametrize('clip, expected', [('none', 1.1617043386), ('adaptive', 0.6718186283)])
def test_golden_behind_a_mixture(clip, expected):
    """A mixture in front gives the weights, and clips each reference, from the pair itself."""
    mixture, numbers = mixtures.make({'weights': 'arwc', 'clip': clip}, ('initial', 'external'))
    pair = completion(-40.0, (-42.0, -35.0), 5), completion(-52.0, (-50.0, -58.0), 8)
    found = mixtures.combine(mixture, numbers, *pair, state={}, key=None)
    np.testing.assert_allclose(
        value('multi_dpo', (found.many_chosen, found.many_rejected), beta=0.1), [expected], atol=1e-9
    )


def sample(seed=0):
    return contract.example(ENTRY, {}, seed)


def with_references(side, logps, weights=None):
    return side.replace(reference_logps=logps, mixing_weights=weights)


def together(name, sides):
    """Losses and all gradients by the policy."""

    def total(chosen, rejected):
        values, rewards = losses.find(name)(
            sides[0].replace(policy_logps=chosen), sides[1].replace(policy_logps=rejected)
        )
        return values.sum(), (values, rewards)

    gradients, (values, rewards) = jax.grad(total, argnums=(0, 1), has_aux=True)(*(x.policy_logps for x in sides))
    return values, rewards.chosen, rewards.rejected, *gradients


def pair_of(found):
    return found.chosen, found.rejected


@pytest.mark.parametrize('weights', [None, jnp.ones((1, contract.PAIRS))], ids=['uniform', 'given'])
def test_one_reference_is_dpo(weights):
    sides = [with_references(side, side.reference_logps[:1], weights) for side in pair_of(sample())]
    plain = [side.replace(mixing_weights=None) for side in sides]
    for ours, theirs in zip(together('multi_dpo', sides), together('dpo', plain)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_identical_references_are_dpo():
    given = pair_of(sample())
    sides = [
        with_references(side, jnp.broadcast_to(side.reference_logps[:1], side.reference_logps.shape), weights)
        for side, weights in zip(given, (given[0].mixing_weights, None))
    ]
    plain = [with_references(side, side.reference_logps[:1]) for side in given]
    for ours, theirs in zip(together('multi_dpo', sides), together('dpo', plain)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize('seed', range(5))
def test_it_is_at_least_dpo_against_the_geometric_mean_whose_rewards_it_has(seed):
    given = pair_of(sample(seed))
    weights = given[0].mixing_weights
    mixed = [
        with_references(side, (weights[..., None] * side.reference_logps).sum(axis=0, keepdims=True)) for side in given
    ]
    many, geometric = ENTRY(*given, beta=0.3), losses.find('dpo')(*mixed, beta=0.3)
    assert (many[0] > geometric[0] + 1e-5).all()
    np.testing.assert_allclose(many[1].chosen, geometric[1].chosen, rtol=1e-12)
    np.testing.assert_allclose(many[1].rejected, geometric[1].rejected, rtol=1e-12)


def test_the_order_of_references_has_no_say():
    order = jnp.array([2, 0, 1])
    given = pair_of(sample())
    moved = [with_references(side, side.reference_logps[order], side.mixing_weights[order]) for side in given]
    for ours, theirs in zip(together('multi_dpo', given), together('multi_dpo', moved)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    wrong = [with_references(side, side.reference_logps[order], side.mixing_weights) for side in given]
    assert not np.allclose(ENTRY(*given)[0], ENTRY(*wrong)[0])


def test_no_mixing_weights_are_equal_ones():
    given = pair_of(sample())
    bare, equal = (
        [side.replace(mixing_weights=weights) for side in given]
        for weights in (None, jnp.full((3, contract.PAIRS), 1 / 3))
    )
    for ours, theirs in zip(together('multi_dpo', bare), together('multi_dpo', equal)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)


def test_a_reference_without_weight_has_no_say():
    given = pair_of(sample())
    weights = jnp.array([0.4, 0.6, 0.0])[:, None] * jnp.ones((3, contract.PAIRS))
    three = [side.replace(mixing_weights=weights) for side in given]
    two = [with_references(side, side.reference_logps[:2], weights[:2]) for side in given]
    for ours, theirs in zip(together('multi_dpo', three), together('multi_dpo', two)):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)
