"""Completions for tests that need no more than their scores."""

import jax
import jax.numpy as jnp

from jaxpo.types import Completion


def completion(policy, reference, **more):
    """Completions of one token from their log-probabilities."""
    policy, reference = (jnp.asarray(x, jnp.float64)[:, None] for x in (policy, reference))
    return Completion(policy, reference[None], jnp.ones_like(policy), **more)


def of_ratios(ratios):
    return completion(jnp.asarray(ratios) - 20.0, jnp.full(len(ratios), -20.0))


def pairs_of_margins(margins):
    margins = jnp.asarray(margins, jnp.float64)
    return of_ratios(margins), of_ratios(jnp.zeros_like(margins))


def nothing(side, keep):
    """The side with every completion empty but those to `keep`; companions stay."""
    keep = jnp.asarray(keep, bool)

    def kept(x):
        return jnp.where(keep.reshape((1,) * (x.ndim - 2) + (-1, 1)), x, 0)

    return jax.tree.map(kept, side.replace(companions={})).replace(companions=side.companions)


def golden_pair():
    """The pair that the golden values are of: log-ratios 1 and -0.5."""
    return completion([-12.0], [-13.0]), completion([-15.0], [-14.5])
