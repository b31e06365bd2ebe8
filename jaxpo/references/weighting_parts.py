"""What weightings are made of: shapes of weights, and what a reference says of a pair.

Confidence is how far apart a reference puts the two completions of a pair.
"""

import jax
import jax.numpy as jnp

from jaxpo.losses import scores
from jaxpo.types import Completion


def normalised(values: jax.Array) -> jax.Array:
    """`values` `[K, ...]`, at least 0, over their sum over K; uniform where all are 0."""
    total = values.sum(axis=0, keepdims=True)
    return jnp.where(total > 0, values / jnp.where(total > 0, total, 1), 1 / values.shape[0])


def for_all(weights: jax.Array, completion: Completion) -> jax.Array:
    """`[K] -> [K, B]`: the same for every pair."""
    return jnp.broadcast_to(weights[:, None], (weights.shape[0], completion.weights.shape[0]))


def one_hot(values: jax.Array, primary: int) -> jax.Array:
    """All weight on the highest of `[K]`; of several as high, the primary, or else the first."""
    favours_primary = values[primary] == values.max()
    place = jnp.where(favours_primary, primary, jnp.argmax(values))
    return jax.nn.one_hot(place, values.shape[0], dtype=values.dtype)


_CONFIDENCES = {'sum': scores.reference_logps, 'mean': scores.mean_reference_logps}


def both_there(chosen: Completion, rejected: Completion) -> jax.Array:
    return (scores.present(chosen) & scores.present(rejected))[None]


def confidence_in(chosen: Completion, rejected: Completion, confidence: str = 'mean') -> jax.Array:
    """|lp_k(chosen) - lp_k(rejected)|, `[K, B]`, nats; 0 where either is missing, which says nothing of a reference."""
    logps = _CONFIDENCES[confidence]
    return jnp.where(both_there(chosen, rejected), jnp.abs(logps(chosen) - logps(rejected)), 0)
