"""Scores: a Completion to one number per completion, `[B]` float32."""

import jax
import jax.numpy as jnp

from jaxpo.types import Completion


def length(completion: Completion) -> jax.Array:
    """Weighted tokens, at least 1, so that an empty slot divides by 1."""
    return jnp.maximum(completion.weights.sum(axis=-1), 1.0)


def logp(completion: Completion) -> jax.Array:
    """Log-probability of the completion under the policy, nats."""
    return (completion.weights * completion.policy_logps).sum(axis=-1)


def log_ratio(completion: Completion) -> jax.Array:
    """log pi - log pi_ref of the completion, nats. Tokens are subtracted before they are summed: exact at 0."""
    (reference_logps,) = completion.reference_logps
    return (completion.weights * (completion.policy_logps - reference_logps)).sum(axis=-1)
