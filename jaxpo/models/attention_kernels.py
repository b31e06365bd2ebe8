"""Attention of a call's own tokens by one of several kernels, all of which answer as `attend` with `visible`.

R rows, T tokens, S keys, H heads, K key-value heads, Dh head width, N views.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec as P

from jaxpo.models.architecture import Architecture
from jaxpo.models.attention import Keys, attend, visible
from jaxpo.models.attention_choice import BLOCK

LARGEST_BLOCK = 512  # tokens: with 1024, float32 heads of 128 do not fit into a v5e's vector memory
Pair = tuple[jax.Array, jax.Array]


class View(NamedTuple):
    """Where the call's T tokens may look among S others."""

    mask: jax.Array  # [R, T, S] bool, windows aside
    distance: jax.Array  # [R, T, S] int32: position of the query minus that of the key


class Sight(NamedTuple):
    """Who sees whom in one call, as its kernel wants to hear it."""

    views: tuple[View, ...]  # of the cache where there is one, then of the call's own tokens; none for splash
    branch: jax.Array  # [R, T] int32
    ids: jax.Array | None = None  # [R, N, T] of `segment_views`, for splash
    window: jax.Array | None = None  # [] int32, of the layer at hand; None where no layer has one


def sight(kernel: str, place: tuple[jax.Array, ...], cached: tuple[jax.Array, ...] | None, branches: int) -> Sight:
    """Who sees whom, windows aside, of tokens at `place` and of `cached` ones: (positions, segment, branch) each."""
    _, segment, branch = place
    if kernel == 'splash':
        return Sight((), branch, segment_views(segment, branch, branches))
    return Sight(tuple(_view(place, keys) for keys in (cached, place) if keys is not None), branch)


def _view(query: tuple[jax.Array, ...], key: tuple[jax.Array, ...]) -> View:
    return View(visible(query, key), query[0][:, :, None] - key[0][:, None, :])


def within(sight: Sight, window: jax.Array | None) -> Sight:
    """What remains within a layer's window."""
    if window is None:
        return sight
    views = tuple(view._replace(mask=view.mask & (view.distance < window)) for view in sight.views)
    return sight._replace(views=views, window=window)


def mix(
    kernel: str,
    query: jax.Array,
    own: Pair,
    past: Pair | None,
    sight: Sight,
    architecture: Architecture,
    rows: jax.sharding.NamedSharding | None,
) -> jax.Array:
    """Values `[R, T, H * Dh]` as queries `[R, T, H, Dh]` mix them, of (keys, values) `[R, S, K, Dh]`.

    `past` is that of a cache, which only xla takes; `rows` as for `decoder.Decoder`.
    """
    if kernel == 'splash':
        mixed = splash(query, *own, sight.branch, sight.ids, sight.window, architecture=architecture, rows=rows)
    elif kernel == 'cudnn':
        mixed = cudnn(query, *own, sight.views[0].mask, architecture=architecture, rows=rows)
    else:
        pairs = (own,) if past is None else (past, own)
        parts = [Keys(*pair, view.mask) for pair, view in zip(pairs, sight.views)]
        mixed = attend(query, parts, scale=architecture.query_scale, softcap=architecture.attention_softcap)
    return mixed.reshape(*query.shape[:2], -1)


def segment_views(segment: jax.Array, branch: jax.Array, branches: int) -> jax.Array:
    """int32 `[R, branches, T]`: ids under which plain causal attention is that of `attention.visible`.

    View n - 1 is the one of branch n: there the prompt and that branch have their segment's id, and the tokens of other
    branches another, so that each sees itself at least. It is exact for queries of that branch, and the first for the
    prompt too, where place grows with position within a segment's prompt and each of its branches, as in
    `jaxpo.data.rows`. With one completion to a segment (`branches` 1) ids are segments.
    """
    if branches == 1:
        return segment[:, None]
    segment, branch = segment[:, None], branch[:, None]
    numbers = jnp.arange(1, branches + 1, dtype=branch.dtype).reshape(1, -1, 1)
    return jnp.where((branch == 0) | (branch == numbers), segment, -segment)


def splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    branch: jax.Array,
    ids: jax.Array,
    window: jax.Array | None,
    *,
    architecture: Architecture,
    rows: jax.sharding.NamedSharding | None,
    interpret: bool = False,
) -> jax.Array:
    """Attention `[R, T, H, Dh]` of heads `[R, T, H or K, Dh]` on a TPU.

    Args:
      branch: int32 `[R, T]`.
      ids: of `segment_views`.
      window: int32 [], of this layer, as one of `architecture.windows`; None where no layer has one.
      rows: how rows lie on a mesh, as for `decoder.Decoder`.
      interpret: runs the kernel's program by XLA, on any platform.
    """
    length = query.shape[1]
    widths = sorted({min(width or length, length) for width in architecture.windows})
    kernels = [
        functools.partial(_views, width=width, architecture=architecture, interpret=interpret) for width in widths
    ]

    def local(query, key, value, branch, ids, window):
        heads = (jnp.swapaxes(x, 1, 2) for x in (query * architecture.query_scale, key, value))
        kind = 0 if len(widths) == 1 else jnp.searchsorted(jnp.asarray(widths), jnp.minimum(window, length))
        views = jax.lax.switch(kind, kernels, *heads, ids)
        mixed = views[:, 0]
        for view in range(1, views.shape[1]):
            mixed = jnp.where((branch == view + 1)[:, None, :, None], views[:, view], mixed)
        return jnp.swapaxes(mixed, 1, 2)

    return _on_mesh(local, rows, (query, key, value), (branch, ids), window)


def _views(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    ids: jax.Array,
    *,
    width: int,
    architecture: Architecture,
    interpret: bool,
) -> jax.Array:
    """Causal attention `[R, N, H, T, Dh]` of `[R, H or K, T, Dh]` under ids `[R, N, T]`, `width` places back."""
    heads, length = query.shape[1:3]
    if width < length:
        mask = splash_attention_mask.LocalMask((length, length), (width - 1, 0), offset=0)
    else:
        mask = splash_attention_mask.CausalMask((length, length))
    block = next(size for size in range(LARGEST_BLOCK, 0, -BLOCK) if length % size == 0)
    sizes = ('q', 'kv', 'kv_compute', 'q_dkv', 'kv_dkv', 'kv_dkv_compute', 'q_dq', 'kv_dq')
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**{f'block_{size}': block for size in sizes}),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=architecture.attention_softcap,
        interpret=interpret,
    )

    def view(query, key, value, ids):
        return kernel(query, key, value, splash_attention_kernel.SegmentIds(ids, ids))

    return jax.vmap(jax.vmap(view, (None, None, None, 0)))(query, key, value, ids)


def cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    *,
    architecture: Architecture,
    rows: jax.sharding.NamedSharding | None,
) -> jax.Array:
    """Attention `[R, T, H, Dh]` of bfloat16 heads `[R, T, H or K, Dh]` under `mask` `[R, T, T]` on an NVIDIA GPU.

    The mask becomes a bias of each head's scores: memory goes by the square of a row, as with xla.

    Unverified: seen on no GPU yet; what the library is told is tested against dense attention.
    """

    def local(query, key, value, mask):
        length = mask.shape[1]
        mask = mask | jnp.eye(length, dtype=bool)[None]  # padding sees itself, so that no softmax is empty
        by_head = jnp.broadcast_to(mask[:, None], (len(mask), query.shape[2], length, length))
        scale = architecture.query_scale
        return jax.nn.dot_product_attention(query, key, value, mask=by_head, scale=scale, implementation='cudnn')

    return _on_mesh(local, rows, (query, key, value), (mask,))


def _on_mesh(
    local: Callable[..., jax.Array],
    rows: jax.sharding.NamedSharding | None,
    heads: tuple[jax.Array, ...],
    places: tuple[jax.Array, ...],
    *whole: Any,
) -> jax.Array:
    """`local` of each device's rows and heads: the partitioner cannot look into a kernel."""
    if rows is None:
        return local(*heads, *places, *whole)
    by_heads = P(rows.spec[0], None, 'tensor', None)
    by_rows = [P(rows.spec[0])] * len(places)
    specs = (*[by_heads] * len(heads), *by_rows, *[P()] * len(whole))
    return jax.shard_map(local, mesh=rows.mesh, in_specs=specs, out_specs=by_heads, check_vma=False)(
        *heads, *places, *whole
    )
