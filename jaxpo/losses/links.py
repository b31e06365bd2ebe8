"""Links: a margin to a loss, elementwise."""

import jax
import jax.numpy as jnp


def logistic(margin: jax.Array) -> jax.Array:
    """-log sigmoid(margin): the Bradley-Terry negative log-likelihood."""
    return jax.nn.softplus(-margin)


def squared(margin: jax.Array, target: jax.Array | float) -> jax.Array:
    """(margin - target)^2."""
    return jnp.square(margin - target)
