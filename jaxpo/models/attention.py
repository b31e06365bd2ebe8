"""Attention by segment, branch and position: what sees what, rotary embeddings, softmax with a soft-cap.

R rows, T queries, S keys, H heads, K key-value heads, Dh head width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo.models.architecture import Architecture, Llama3Scaling

# Finite, so that a query that sees nothing (padding) averages all values instead of giving NaN.
MASKED_SCORE = -1e30


def visible(query: tuple[jax.Array, jax.Array, jax.Array], key: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """[R, T, S] bool: which keys each query may attend to, sliding windows aside.

    `query` and `key` are (positions, segment, branch), int32 `[R, T]` and `[R, S]`, as `jaxpo.types.Batch` has them.
    """
    query_positions, query_segment, query_branch = (array[:, :, None] for array in query)
    key_positions, key_segment, key_branch = (array[:, None, :] for array in key)
    same_segment = (query_segment == key_segment) & (key_segment != 0)
    same_branch = (key_branch == 0) | (key_branch == query_branch)
    return same_segment & same_branch & (key_positions <= query_positions)


class Keys(NamedTuple):
    """What queries attend to: keys and values `[R, S, K, Dh]`, and where each query may look."""

    key: jax.Array
    value: jax.Array
    mask: jax.Array  # [R, T, S] bool


def attend(query: jax.Array, parts: Sequence[Keys], *, scale: float, softcap: float | None) -> jax.Array:
    """Attention `[R, T, H * Dh]` of query `[R, T, H, Dh]` to the keys of all `parts` together.

    Consecutive H / K query heads share a key head. Scores and softmax are float32, products are in the dtype of
    the arguments. Parts are not joined first: a long cache would be copied to add one key to it.
    """
    rows, queries, heads, head_dim = query.shape
    group = heads // parts[0].key.shape[2]
    query = (query * scale).reshape(rows, queries, -1, group, head_dim)
    outputs = []
    # A loop over the few heads that share a key, not one product over (K, H / K): the CPU's backward pass
    # takes less than half the time, and accelerators get matrices large enough either way.
    for member in range(group):
        scores = [_scores(query[:, :, :, member], part, softcap) for part in parts]
        widths = [part.mask.shape[2] for part in parts]
        probabilities = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(query.dtype)
        shares = jnp.split(probabilities, np.cumsum(widths)[:-1].tolist(), axis=-1)
        outputs.append(sum(jnp.einsum('rkts,rskd->rtkd', share, part.value) for share, part in zip(shares, parts)))
    return jnp.stack(outputs, axis=3).reshape(rows, queries, heads * head_dim)


def _scores(query: jax.Array, part: Keys, softcap: float | None) -> jax.Array:
    """Float32 scores `[R, K, T, S]` of query `[R, T, K, Dh]`."""
    scores = jnp.einsum('rtkd,rskd->rkts', query, part.key, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    return jnp.where(part.mask[:, None], scores, MASKED_SCORE)


def rotary(architecture: Architecture, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[R, T, 1, Dh / 2]`, float32, of the rotary angles at int32 `positions` `[R, T]`."""
    angles = positions[:, :, None, None].astype(jnp.float32) * _inverse_frequencies(architecture)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(heads: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """`heads` `[R, T, H, Dh]` with coordinate i of the first half and of the second half turned as a pair."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return turned.astype(heads.dtype)


def _inverse_frequencies(architecture: Architecture) -> jax.Array:
    """Radians per position of each pair of coordinates, float32 `[1, 1, 1, Dh / 2]`."""
    pairs = architecture.head_dim // 2
    frequencies = [architecture.rope_theta ** (-pair / pairs) for pair in range(pairs)]
    if architecture.rope_scaling is not None:
        frequencies = [_stretch(frequency, architecture.rope_scaling) for frequency in frequencies]
    return jnp.asarray(frequencies, jnp.float32).reshape(1, 1, 1, pairs)


def _stretch(frequency: float, scaling: Llama3Scaling) -> float:
    """Llama 3: waves that turn seldom within the original context slow down by `factor`, fast ones stay."""
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    kept = (turns - scaling.low_frequency_factor) / (scaling.high_frequency_factor - scaling.low_frequency_factor)
    kept = min(max(kept, 0.0), 1.0)
    return kept * frequency + (1 - kept) * frequency / scaling.factor
