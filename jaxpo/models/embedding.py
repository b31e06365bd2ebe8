"""Rows of the embedding by token, also where the table is split over a mesh by vocabulary and width."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def looked_up(embedding: jax.Array, tokens: jax.Array, dtype: Any, rows: NamedSharding | None) -> jax.Array:
    """`[V, D]`, `[R, T]` int32 -> `[R, T, D]` in `dtype`; NaN for a token outside the table.

    `rows` is how rows lie on a mesh, as `PartitionSpec((..., axis))`, where the last axis splits the table's width and
    `tensor` its vocabulary. Each device reads its share of both for the rows of all that split the width with it, adds
    up what the others read of the vocabulary, and trades width for rows. Left to itself, XLA gathers the whole batch or
    the whole vocabulary on every device, forward and backward.
    """
    if rows is None:
        return jnp.take(embedding, tokens, axis=0).astype(dtype)
    by_row, vocabulary = rows.spec[0], embedding.shape[0]
    width = by_row[-1]

    def share(part, tokens):
        tokens = lax.all_gather(tokens, width, axis=0, tiled=True)
        place = tokens - lax.axis_index('tensor') * part.shape[0]
        here = (place >= 0) & (place < part.shape[0])
        found = jnp.where(here[..., None], part[jnp.where(here, place, 0)].astype(dtype), 0)
        found = lax.psum(found, 'tensor')  # exact: all but one are 0
        found = jnp.where(((tokens >= 0) & (tokens < vocabulary))[..., None], found, jnp.nan)
        return lax.all_to_all(found, width, split_axis=0, concat_axis=2, tiled=True)

    specs = (P('tensor', width), P(by_row))
    return jax.shard_map(share, mesh=rows.mesh, in_specs=specs, out_specs=P(by_row))(embedding, tokens)
