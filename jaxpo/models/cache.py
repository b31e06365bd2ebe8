"""Keys and values of tokens already read, for generation."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from jaxpo.models.architecture import Architecture


@flax.struct.dataclass
class Cache:
    """Keys and values of tokens already read, for generation: S slots a row, the first `used` of them written.

    The cached tokens of a row are one sequence: branches are not kept.
    """

    key: jax.Array  # [L, R, S, K, Dh] in the compute dtype, rotated
    value: jax.Array  # [L, R, S, K, Dh]
    positions: jax.Array  # [R, S] int32
    segment: jax.Array  # [R, S] int32; 0 where a slot is padding or not yet written
    used: jax.Array  # int32, of all rows


def empty_cache(architecture: Architecture, rows: int, slots: int, dtype: Any) -> Cache:
    """A cache with room for `slots` tokens in each of `rows` rows."""
    shape = (architecture.layers, rows, slots, architecture.key_value_heads, architecture.head_dim)
    return Cache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        positions=jnp.zeros((rows, slots), jnp.int32),
        segment=jnp.zeros((rows, slots), jnp.int32),
        used=jnp.zeros((), jnp.int32),
    )


def extended(cache: Cache, new: tuple[jax.Array, jax.Array], positions: jax.Array, segment: jax.Array) -> Cache:
    """The cache with a call's keys and values `[L, R, T, K, Dh]` and their places in its next slots."""

    def write(old: jax.Array, update: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, update, cache.used, axis=axis)

    return Cache(
        key=write(cache.key, new[0], 2),
        value=write(cache.value, new[1], 2),
        positions=write(cache.positions, positions, 1),
        segment=write(cache.segment, segment, 1),
        used=cache.used + positions.shape[1],
    )
