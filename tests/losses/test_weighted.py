"""What is particular to the losses that weigh or scale each pair: golden values, and what they come down to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.sides import completion

from jaxpo import losses
from jaxpo.types import Completion


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def golden_tokens(policy, reference, ids):
    """A completion of the notes' token-level inputs: logits over three words."""
    policy, reference = (jax.nn.log_softmax(jnp.asarray(x, jnp.float64), axis=-1) for x in (policy, reference))
    places = jnp.arange(len(ids))
    return Completion(
        policy[places, jnp.asarray(ids)][None],
        reference[places, jnp.asarray(ids)][None, None],
        jnp.ones((1, len(ids))),
        log_sum_squares=jnp.log(jnp.square(jnp.exp(policy)).sum(axis=-1))[None],
    )


def golden_token_pair():
    chosen = golden_tokens([[1, 0, -1], [0.5, 0.2, 0]], [[0.8, 0.1, -0.5], [0, 0, 0]], [0, 1])
    rejected = golden_tokens(
        [[0, 1, 0], [0.3, -0.3, 0], [1, 1, -1]], [[0.2, 0.5, 0], [0, 0, 0.1], [0.5, 1, 0]], [1, 2, 0]
    )
    return chosen, rejected


def ratio_to_dpo(chosen, rejected):
    """What wpo multiplies each pair's DPO loss by."""
    values, _ = losses.find('wpo')(chosen, rejected, beta=0.5)
    return values / losses.find('dpo')(chosen, rejected, beta=0.5)[0]


def test_golden_wpo_weights():
    """The mean aligned log-probability of each completion, beside one of weight 1e-9, and their clamped product."""
    chosen, rejected = golden_token_pair()
    tiny = completion([-10.0], [-10.0], log_sum_squares=jnp.full((1, 1), -10.0 + np.log(1e9)))
    for side, mean in ((chosen, 0.083680294625), (rejected, 0.093820557229)):
        np.testing.assert_allclose(ratio_to_dpo(side, tiny) * 1e9, [np.exp(mean)], rtol=1e-11)
    # Both together, each 1e-3 as likely, then unclamped: 1.194229075210e-3, and 1 where the product is above 1.
    less = completion([-10.0], [-10.0], log_sum_squares=jnp.full((1, 1), -10.0 + np.log(1e3)))
    product = ratio_to_dpo(chosen, less) * ratio_to_dpo(rejected, less) * 1e6
    np.testing.assert_allclose(product, [1.194229075210], rtol=1e-11)
    np.testing.assert_array_equal(ratio_to_dpo(chosen, rejected), [1.0])


def test_wpos_weight_has_no_gradient():
    chosen, rejected = golden_token_pair()
    chosen = chosen.replace(log_sum_squares=chosen.log_sum_squares + 2.0)
    slopes = jax.grad(lambda side: losses.find('wpo')(side, rejected)[0].sum())(chosen)
    plain = jax.grad(lambda side: losses.find('dpo')(side, rejected, beta=0.01)[0].sum())(chosen)
    assert not np.any(slopes.log_sum_squares)
    np.testing.assert_allclose(slopes.policy_logps / plain.policy_logps, ratio_to_dpo(chosen, rejected)[0])


def golden_rainbow():
    """Log-probabilities -40 and -52 over 20 and 26 tokens, -42 and -50 of the reference, entropy 0.05 log |V|."""

    def spread(policy, reference, tokens):
        share = jnp.full((1, tokens), 1.0 / tokens)
        entropy = jnp.full((1, tokens), 0.05 * np.log(1000))
        return Completion(
            policy * share,
            (reference * share)[None],
            jnp.ones((1, tokens)),
            reference_entropy=entropy,
            vocabulary=1000,
        )

    return spread(-40.0, -42.0, 20), spread(-52.0, -50.0, 26)


def test_golden_rainbow_po():
    values, rewards = losses.find('rainbow_po')(*golden_rainbow())
    np.testing.assert_allclose(values, [0.8357083905], rtol=1e-9)
    # Of the margin -0.0307692308, home advantage has 0.075.
    np.testing.assert_allclose(rewards.chosen - rewards.rejected - 0.75, [-0.307692308], rtol=1e-8)


def test_rainbow_po_is_simpo_without_a_reference_and_length_normalised_dpo_with_all_of_it():
    chosen, rejected = golden_rainbow()
    phi = -0.29 * np.log(0.05)
    given = {'beta': 10.0 / phi, 'home_advantage': 0.3}
    values, _ = losses.find('rainbow_po')(chosen, rejected, mixing_alpha=0.0, **given)
    expected, _ = losses.find('simpo')(chosen, rejected, beta=10.0, gamma=3.0)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    values, _ = losses.find('rainbow_po')(chosen, rejected, mixing_alpha=1.0, **given)
    margin = (-40 + 42) / 20 - (-52 + 50) / 26
    np.testing.assert_allclose(values, [np.log1p(np.exp(-10 * margin))], rtol=1e-12)


def test_rainbow_po_is_finite_where_the_reference_is_certain():
    sides = [side.replace(reference_entropy=jnp.zeros_like(side.reference_entropy)) for side in golden_rainbow()]
    values, slopes = jax.value_and_grad(lambda side: losses.find('rainbow_po')(side, sides[1])[0].sum())(sides[0])
    assert jnp.isfinite(values) and jnp.isfinite(slopes.policy_logps).all() and np.any(slopes.policy_logps)
