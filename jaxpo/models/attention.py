"""Attention by segment, branch and position: what sees what, rotary embeddings, softmax with a soft-cap.

R rows, T queries, S keys, H heads, K key-value heads, Dh head width.
"""

import math

import jax
import jax.numpy as jnp

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


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    """Attention `[R, T, H * Dh]` of query `[R, T, H, Dh]` to key and value `[R, S, K, Dh]` where mask `[R, T, S]`.

    Consecutive H / K query heads share a key head. Scores and softmax are float32, products are in the dtype of
    the arguments.
    """
    rows, queries, heads, head_dim = query.shape
    group = heads // key.shape[2]
    query = (query * scale).reshape(rows, queries, -1, group, head_dim)
    outputs = []
    # A loop over the few heads that share a key, not one product over (K, H / K): the CPU's backward pass
    # takes less than half the time, and accelerators get matrices large enough either way.
    for member in range(group):
        scores = jnp.einsum('rtkd,rskd->rkts', query[:, :, :, member], key, preferred_element_type=jnp.float32)
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(mask[:, None], scores, MASKED_SCORE)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        outputs.append(jnp.einsum('rkts,rskd->rtkd', probabilities, value))
    return jnp.stack(outputs, axis=3).reshape(rows, queries, heads * head_dim)


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
