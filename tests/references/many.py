"""Completions with many references, for tests; and the pair that the golden values of mixtures are of."""

import jax.numpy as jnp
import numpy as np

from jaxpo.types import Completion

NAMES = ('initial', 'external', 'third')
LENGTHS = {'chosen': (5, 2, 7, 1), 'rejected': (3, 6, 1, 7)}
PAIRS, TOKENS = 4, 7


def spread(policy, references, tokens, **more):
    """Completions whose log-probabilities (policy `[B]`, references `[K, B]`) are spread evenly over `tokens`."""
    policy, references = jnp.asarray(policy), jnp.asarray(references)
    share = jnp.full((policy.shape[0], tokens), 1 / tokens, policy.dtype)
    return Completion(policy[:, None] * share, references[..., None] * share[None], jnp.ones_like(share), **more)


def golden_sides():
    """The policy, the primary reference and an external one on one pair, of 4 and 6 tokens."""
    return spread([-40.0], [[-42.0], [-35.0]], 4), spread([-52.0], [[-50.0], [-58.0]], 6)


def sides(references=3, seed=0, dtype=jnp.float64, empty=()):
    """Four pairs of unequal lengths with numbers by token; both completions of the pairs in `empty` are missing."""
    random = np.random.default_rng(seed)
    return [_side(random, lengths, references, dtype, empty) for lengths in LENGTHS.values()]


def _side(random, lengths, references, dtype, empty):
    lengths = [0 if pair in empty else length for pair, length in enumerate(lengths)]
    there = np.array([[token < length for token in range(TOKENS)] for length in lengths])

    def by_token(*shape):
        return jnp.asarray(np.where(there, -random.exponential(1.5, (*shape, PAIRS, TOKENS)), 0), dtype)

    return Completion(by_token(), by_token(references), jnp.asarray(there, dtype))


def sums(side):
    """`[K, B]`, by NumPy."""
    return np.asarray(side.reference_logps).sum(axis=-1)


def token_counts(side):
    """`[B]`, at least 1."""
    return np.maximum(np.asarray(side.weights).sum(axis=-1), 1)


def without(side, pairs):
    """The side with the completions of these pairs missing, as in an unpaired row."""
    keep = jnp.asarray([pair not in pairs for pair in range(side.weights.shape[0])])[:, None]
    return side.replace(
        policy_logps=jnp.where(keep, side.policy_logps, 0),
        reference_logps=jnp.where(keep[None], side.reference_logps, 0),
        weights=jnp.where(keep, side.weights, 0),
    )
