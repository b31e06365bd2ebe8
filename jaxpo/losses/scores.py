"""Scores: a Completion to one number per completion, `[B]` float32."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxpo.types import Completion, Rewards

LARGEST_EXPONENT = 30.0  # where exp goes on along its tangent: squares and sums of e^30 still fit float32


def length(completion: Completion) -> jax.Array:
    """Weighted tokens, at least 1, so that an empty slot divides by 1."""
    return jnp.maximum(completion.weights.sum(axis=-1), 1.0)


def logp(completion: Completion) -> jax.Array:
    """Log-probability of the completion under the policy, nats."""
    return (completion.weights * completion.policy_logps).sum(axis=-1)


def log_ratio(completion: Completion) -> jax.Array:
    """log pi - log pi_ref of the completion, nats. Tokens are subtracted before they are summed: exact at 0."""
    (ratio,) = log_ratios(completion)
    return ratio


def log_ratios(completion: Completion) -> jax.Array:
    """log pi - log pi_ref of the completion for each reference, nats, `[K, B]`; subtracted by token, as above."""
    by_token = completion.policy_logps[None] - completion.reference_logps
    return (completion.weights[None] * by_token).sum(axis=-1)


def mean_logp(completion: Completion) -> jax.Array:
    """Log-probability of the completion per token under the policy, nats."""
    return logp(completion) / length(completion)


def mean_log_ratio(completion: Completion) -> jax.Array:
    """log pi - log pi_ref of the completion per token, nats."""
    return log_ratio(completion) / length(completion)


def reference_logps(completion: Completion) -> jax.Array:
    """Log-probability of the completion under each reference, nats, `[K, B]`."""
    weights = completion.weights[None]
    return (weights * jnp.where(weights > 0, completion.reference_logps, 0)).sum(axis=-1)


def mean_reference_logps(completion: Completion) -> jax.Array:
    """Log-probability of the completion per token of each reference's own, nats, `[K, B]`."""
    lengths = completion.reference_lengths
    lengths = length(completion)[None] if lengths is None else jnp.maximum(lengths, 1.0)
    return reference_logps(completion) / lengths


def tempered_log_ratio(completion: Completion, alpha: jax.Array | float) -> jax.Array:
    """alpha * log pi - log pi_ref of the completion, nats; exactly `log_ratio` at alpha = 1."""
    (reference_logps,) = completion.reference_logps
    return (completion.weights * (alpha * completion.policy_logps - reference_logps)).sum(axis=-1)


def log_odds(completion: Completion) -> jax.Array:
    """log(p / (1 - p)) for p the geometric mean of the token probabilities, nats.

    A mean log-probability nearer to 0 than the precision of its dtype counts as that far from 0, without a gradient:
    the odds of a certain completion (or of an empty slot) are infinite.
    """
    mean = mean_logp(completion)
    mean = jnp.minimum(mean, -jnp.finfo(mean.dtype).eps)
    return mean - _log1mexp(mean)


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 - exp(x)) for x <= -eps, where both forms are finite, gradients too; each is exact on its own side."""
    return jnp.where(x > -math.log(2.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))


def deformed_log(log_value: jax.Array, alpha: jax.Array | float) -> jax.Array:
    """(1 - u^-alpha) / alpha for u = exp(log_value), elementwise; its limit log_value at alpha = 0. alpha is traced.

    Beyond u^-alpha = exp(LARGEST_EXPONENT) the power goes on along its tangent: finite, the gradient's sign kept.
    """
    nonzero = jnp.where(alpha == 0, 1.0, alpha)
    exponent = -nonzero * log_value
    beyond = jnp.maximum(exponent - LARGEST_EXPONENT, 0.0)
    power_less_one = jnp.expm1(jnp.minimum(exponent, LARGEST_EXPONENT)) + math.exp(LARGEST_EXPONENT) * beyond
    return jnp.where(alpha == 0, log_value, -power_less_one / nonzero)


def forward_kl(completion: Completion) -> jax.Array:
    """KL(reference || policy) of the next token, summed over the completion, nats."""
    return (completion.weights * completion.forward_kl).sum(axis=-1)


def reverse_kl(completion: Completion) -> jax.Array:
    """KL(policy || reference) of the next token, summed over the completion, nats."""
    return (completion.weights * completion.reverse_kl).sum(axis=-1)


def reweighted(completion: Completion, by_token: jax.Array) -> Completion:
    """The completion with every token's weight multiplied by `by_token` `[B, C]`, so that every score is weighted."""
    return completion.replace(weights=completion.weights * by_token)


def present(completion: Completion) -> jax.Array:
    """Whether the completion is there, `[B]` bool: it is not where an unpaired row lacks it, or in an empty slot."""
    return completion.weights.sum(axis=-1) > 0


def rewards(
    score: Callable[[Completion], jax.Array], chosen: Completion, rejected: Completion, beta: jax.Array | float
) -> Rewards:
    """beta times the score of each completion."""
    return Rewards(beta * score(chosen), beta * score(rejected))
