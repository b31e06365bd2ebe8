"""Mixes: K references to one, by the log-probabilities of whole completions; and back to tokens, sums exact.

A mix of log-probabilities that all rise by c rises by c. So references are mixed as differences from one of them, which
are taken token by token and then summed: where references agree nothing is rounded, however long the completion.

Sequence log-probabilities are `[K, B]`, nats. Weights are `[K, B]`, at least 0, and sum to 1 over K; a reference of
weight 0 has no say, whatever it says. Weights, and all that is made of references' log-probabilities, are constants to
the gradient.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxpo.losses import scores
from jaxpo.types import Completion

CLIPS = ('none', 'adaptive', 'fixed')
"""How far references may lie from the primary one: anywhere, or as `clipped` says."""


def harmonic(logps: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted harmonic mean of probabilities, MRPO's: the reference that puts a completion lowest decides.

    log p = -logsumexp_k(log w_k - lp_k)

    `[B]`. It is at most the least lp_k - log w_k. A completion's probabilities so mixed sum to at most 1. Le et al.
    2024, arXiv:2405.16388, where it is the prior that bounds the objective with a KL penalty to each reference from
    below.

    Differs: public code holds weights to at least 1e-6, so that a reference without any weight still has its say where
    it is 14 nats below the others; here it has none.
    """
    return -_log_mean(-_heard(logps, weights), weights)


def geometric(logps: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted geometric mean of probabilities: exact for a weighted sum of KL penalties.

    log p = sum_k w_k * lp_k

    `[B]`. Its optimum is that of the objective with the penalty sum_k w_k * KL(policy || reference_k), exactly: the
    weighted sum of KL divergences is the divergence from the normalised geometric mean, but for a constant of the
    prompt.
    """
    return (weights * _heard(logps, weights)).sum(axis=0)


def arithmetic(logps: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted mean of probabilities, a mixture distribution: the reference that puts a completion highest decides.

    log p = logsumexp_k(log w_k + lp_k)

    `[B]`. The only one of the three that is a distribution over completions: a reference drawn by its weight, then
    sampled.
    """
    return _log_mean(_heard(logps, weights), weights)


MIXES: Mapping[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'harmonic': harmonic,
    'geometric': geometric,
    'arithmetic': arithmetic,
}
"""Of any weights harmonic <= geometric <= arithmetic; with one reference each is that reference."""


def _paper(weights: jax.Array) -> jax.Array:
    return weights


def _official_code(weights: jax.Array) -> jax.Array:
    """MRPO's trainer writes two references' harmonic mean as a product over a sum, with the weights exchanged."""
    return weights[::-1]


ORDERS: Mapping[str, Callable[[jax.Array], jax.Array]] = {'paper': _paper, 'official_code': _official_code}
"""Which reference each weight falls on in the harmonic mean: its own, or, of two, the other (as MRPO's authors' code
computes lp_1 + lp_2 - log(w_2 * p_2 + w_1 * p_1), where their paper has w_1 / p_1 + w_2 / p_2). Alike at 1/2."""


def clipped(
    chosen: jax.Array, rejected: jax.Array, primary: int, eps: jax.Array | float, adaptive: bool
) -> tuple[jax.Array, jax.Array]:
    """CTRO: every reference's log-probabilities held to a trust region around the primary reference's.

    lp_k(y) is held to between (1 + eps(y)) * lp_primary(y) and (1 - eps(y)) * lp_primary(y). Adaptive:
    eps(chosen) = eps * s and eps(rejected) = eps * (1 - s), s = |b(chosen)| / (|b(chosen)| + |b(rejected)|), b the mean
    of lp_k over the references, so that the less likely completion has the larger region. Fixed: eps for both.

    Le et al. 2024, arXiv:2405.16388, as the authors' code has it. s is 1/2 where both completions are empty, and falls
    all to the one that is there where one is. A log-probability within its region stays as it is, bit for bit.

    Unverified: the code has two references; for more, that b is the mean over all of them is ours.

    Args:
      chosen, rejected: `[K, B]`, at most 0.
      primary: the reference in the middle, which no region moves.
      eps: 0 to 1, relative; at 0 every reference is the primary.
    """
    if not adaptive:
        return _held(chosen, primary, eps), _held(rejected, primary, eps)
    likely, unlikely = (jnp.abs(logps.mean(axis=0)) for logps in (chosen, rejected))
    total = likely + unlikely
    share = jnp.where(total > 0, likely / jnp.where(total > 0, total, 1), 0.5)
    return _held(chosen, primary, eps * share), _held(rejected, primary, eps * (1 - share))


def _held(logps: jax.Array, primary: int, eps: jax.Array | float) -> jax.Array:
    """`[K, B]` within the region of relative size `eps`, a number or `[B]`, around the primary, which is below 0."""
    middle = logps[primary]
    return jnp.clip(logps, ((1 + eps) * middle)[None], ((1 - eps) * middle)[None])


def differences(completion: Completion, weights: jax.Array) -> jax.Array:
    """Log-probabilities of whole completions less that under the pair's reference of most weight, `[K, B]`, nats.

    Tokens are subtracted before they are summed, so that references that agree differ by exactly 0.

    Args:
      weights: `[K, B]`; at a tie the first reference is taken.
    """
    return _sums(completion, _from_heaviest(completion, weights)[1])


def mixed(completion: Completion, difference: jax.Array, weights: jax.Array) -> Completion:
    """The completion with one reference, whose log-probability is the heaviest reference's and `difference`.

    Its token log-probabilities are sum_k w_k * lp_k, token by token, and what is then missing to that sum, put evenly
    over the completion's tokens. Only sums are log-probabilities of the mix: a token's number, with its share of the
    correction, may lie above 0. Where all references that have a weight agree, or one alone has any, and the difference
    is 0, it is that reference, bit for bit.

    KL divergences to the references, and their entropy, become the mean over references by weight. Of `reverse_kl` that
    is the penalty of the objective with many references, sum_k w_k * KL(policy || reference_k), which geometric and
    harmonic mixes stand in for; it is not the divergence from the mix, which has no distribution over next tokens. The
    policy's gradient goes through it. Of one reference the completion is as it was.

    Args:
      completion: K references.
      difference: `[B]`, nats: a mix of `differences`.
      weights: `[K, B]`.

    Returns:
      `reference_logps` is `[1, B, C]` and 0 where weightless. Companions are as they were, with K references.
    """
    if completion.reference_logps.shape[0] == 1:
        return completion
    heaviest, apart = _from_heaviest(completion, weights)
    by_token = geometric(apart, weights[..., None])[None]
    by_token = _moved(completion, by_token, difference[None] - _sums(completion, by_token))
    by_token = jnp.where(completion.weights[None] > 0, heaviest[None] + by_token, 0)
    return completion.replace(
        reference_logps=jax.lax.stop_gradient(by_token),
        **{name: (weights[..., None] * each).sum(axis=0) for name, each in completion.by_reference.items()},
        by_reference={},
        reference_lengths=None,
        mixing_weights=None,
    )


def moved(completion: Completion, shifts: jax.Array) -> Completion:
    """The completion with references whose log-probabilities of it are higher by `shifts` `[K, B]`, nats.

    All tokens of a completion move alike. A reference that moves by 0 stays as it is, bit for bit.
    """
    by_token = _moved(completion, completion.reference_logps, shifts)
    return completion.replace(reference_logps=jax.lax.stop_gradient(by_token))


def _from_heaviest(completion: Completion, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Token log-probabilities of each pair's reference of most weight, `[B, C]`, and all references' less these."""
    logps = completion.reference_logps
    # Selected by a sum, not by an index, which would move pairs between devices.
    heaviest = jnp.arange(logps.shape[0])[:, None] == jnp.argmax(weights, axis=0)[None]
    of_heaviest = jnp.where(heaviest[..., None], logps, 0).sum(axis=0)
    return of_heaviest, logps - of_heaviest[None]


def _sums(completion: Completion, by_token: jax.Array) -> jax.Array:
    """`[K, B, C] -> [K, B]`."""
    weights = completion.weights[None]
    return (weights * jnp.where(weights > 0, by_token, 0)).sum(axis=-1)


def _moved(completion: Completion, by_token: jax.Array, shifts: jax.Array) -> jax.Array:
    """`by_token` `[K, B, C]` with the same number added to every token of a completion, `shifts` `[K, B]` in all."""
    share = shifts / scores.length(completion)[None]
    return jnp.where(completion.weights[None] > 0, by_token + share[..., None], 0)


def _log_mean(logs: jax.Array, weights: jax.Array) -> jax.Array:
    """log sum_k w_k * exp(x_k), `[B]`; of equal x exactly x at 0, also where rounded weights sum to not quite 1."""
    log_weights = _log(weights)
    return jax.nn.logsumexp(log_weights + logs, axis=0) - jax.nn.logsumexp(log_weights, axis=0)


def _log(weights: jax.Array) -> jax.Array:
    """log w, -inf at 0; never a division by 0 in a gradient."""
    heard = weights > 0
    return jnp.where(heard, jnp.log(jnp.where(heard, weights, 1)), -jnp.inf)


def _heard(logps: jax.Array, weights: jax.Array) -> jax.Array:
    """`logps`, and 0 in place of what has no weight: that may be infinite."""
    return jnp.where(weights > 0, logps, 0)
