"""Links: a margin to a loss, elementwise."""

import jax
import jax.numpy as jnp

from jaxpo.types import Rewards


def logistic(margin: jax.Array) -> jax.Array:
    """-log sigmoid(margin): the Bradley-Terry negative log-likelihood."""
    return jax.nn.softplus(-margin)


def squared(margin: jax.Array, target: jax.Array | float) -> jax.Array:
    """(margin - target)^2."""
    return jnp.square(margin - target)


def smoothed(margin: jax.Array, label_smoothing: jax.Array | float) -> jax.Array:
    """Logistic where the labels are exchanged with probability `label_smoothing`; at 0 exactly `logistic`."""
    return (1 - label_smoothing) * logistic(margin) + label_smoothing * logistic(-margin)


def hinge(margin: jax.Array, target: jax.Array | float) -> jax.Array:
    """max(0, target - margin)."""
    return jax.nn.relu(target - margin)


def bradley_terry(beta: jax.Array | float, chosen_score: jax.Array, rejected_score: jax.Array):
    """The logistic loss on the margin of rewards, which are beta times the scores: `(losses [B], Rewards)`."""
    rewards = Rewards(beta * chosen_score, beta * rejected_score)
    return logistic(rewards.chosen - rewards.rejected), rewards


def expectile(residual: jax.Array, level: jax.Array | float) -> jax.Array:
    """|level - [residual < 0]| * residual^2, level in (0, 1): regression to that expectile; 0.5 is half of squares."""
    return jnp.abs(level - (residual < 0)) * jnp.square(residual)
