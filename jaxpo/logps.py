"""Hidden states and a vocabulary head -> log-probabilities of scored tokens. The only file that sees the vocabulary.

One primitive serves policy and references. It walks the vocabulary in slabs, so that no `[tokens, V]` array exists in
the forward or the backward pass, accumulates in float32, and has its own derivative. Where the head is split over the
mesh axis `fsdp` (its width, never its vocabulary), one slab at a time is gathered, and the slab's gradient is
reduce-scattered: no device ever holds the whole head.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpo.types import TokenStatistics

SLAB = 4096  # vocabulary entries at a time
ROW_AXES = ('data', 'fsdp')


def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    slab: int = SLAB,
) -> TokenStatistics:
    """Log-probabilities of `targets`, exact and in float32.

    Args:
      hidden: `[R, S, D]`, in the compute dtype, rows split over the mesh axes `data` and `fsdp`.
      head: `[V, D]`, one row per vocabulary entry; cast to the compute dtype a slab at a time.
      targets: `[R, S]` int32 in [0, V).
      softcap: logits are `softcap * tanh(logits / softcap)` where given.
      mesh: the mesh the arrays live on; None for one device.
      slab: vocabulary entries held at a time.

    Returns:
      TokenStatistics of shape `[R, S]`.
    """
    mesh = mesh if mesh is not None and mesh.size > 1 else None
    return TokenStatistics(logps=_token_logps(hidden, head, targets, softcap, slab, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _token_logps(hidden, head, targets, softcap, slab, mesh):
    return _forward(hidden, head, targets, softcap, slab, mesh)[0]


def _token_logps_forward(hidden, head, targets, softcap, slab, mesh):
    logps, logsumexp = _forward(hidden, head, targets, softcap, slab, mesh)
    return logps, (hidden, head, targets, logsumexp)


def _token_logps_backward(softcap, slab, mesh, saved, cotangent):
    hidden, head, targets, logsumexp = saved
    hidden_gradient, head_gradient = _backward(hidden, head, targets, logsumexp, cotangent, softcap, slab, mesh)
    return hidden_gradient, head_gradient, None


_token_logps.defvjp(_token_logps_forward, _token_logps_backward)


def _forward(hidden, head, targets, softcap, slab, mesh):
    """-> (logps, logsumexp), both `[R, S]` float32."""
    walk = functools.partial(_walk_forward, softcap=softcap, slab=slab, split=mesh is not None)
    if mesh is None:
        return walk(hidden, head, targets)
    rows, split_head = P(ROW_AXES), P(None, 'fsdp')
    return jax.shard_map(walk, mesh=mesh, in_specs=(rows, split_head, rows), out_specs=(rows, rows), check_vma=False)(
        hidden, head, targets
    )


def _backward(hidden, head, targets, logsumexp, cotangent, softcap, slab, mesh):
    """-> gradients of hidden `[R, S, D]` and head `[V, D]`, in their dtypes."""
    walk = functools.partial(_walk_backward, softcap=softcap, slab=slab, split=mesh is not None)
    if mesh is None:
        return walk(hidden, head, targets, logsumexp, cotangent)
    rows, split_head = P(ROW_AXES), P(None, 'fsdp')
    return jax.shard_map(
        walk,
        mesh=mesh,
        in_specs=(rows, split_head, rows, rows, rows),
        out_specs=(rows, split_head),
        check_vma=False,
    )(hidden, head, targets, logsumexp, cotangent)


def _walk_forward(hidden, head, targets, *, softcap, slab, split):
    shape = targets.shape
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def visit(carry, start, size):
        largest, total, target_logits = carry
        logits, _ = _slab_logits(hidden, _take_slab(head, start, size, hidden.dtype, split), softcap)
        new_largest = jnp.maximum(largest, logits.max(axis=1))
        total = total * jnp.exp(largest - new_largest) + jnp.exp(logits - new_largest[:, None]).sum(axis=1)
        here, place = _place_in_slab(targets, start, size)
        picked = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
        return new_largest, total, jnp.where(here, picked, target_logits)

    tokens = targets.shape[0]
    nothing = (jnp.full(tokens, -jnp.inf), jnp.zeros(tokens), jnp.zeros(tokens))
    largest, total, target_logits = _over_slabs(visit, nothing, head.shape[0], slab)
    logsumexp = largest + jnp.log(total)
    return (target_logits - logsumexp).reshape(shape), logsumexp.reshape(shape)


def _walk_backward(hidden, head, targets, logsumexp, cotangent, *, softcap, slab, split):
    shape, dtype = hidden.shape, hidden.dtype
    hidden, targets = hidden.reshape(-1, shape[-1]), targets.reshape(-1)
    logsumexp, cotangent = logsumexp.reshape(-1, 1), cotangent.reshape(-1, 1)

    def visit(carry, start, size):
        hidden_gradient, head_gradient = carry
        part = _take_slab(head, start, size, dtype, split)
        logits, slope = _slab_logits(hidden, part, softcap)
        here, place = _place_in_slab(targets, start, size)
        chosen = here[:, None] & (place[:, None] == jnp.arange(size)[None, :])
        # Cast before the products: they then run in the compute dtype, with float32 accumulation.
        logits_gradient = (cotangent * (chosen - jnp.exp(logits - logsumexp)) * slope).astype(dtype)
        hidden_gradient += _matmul(logits_gradient, part, ((1,), (0,)))
        part_gradient = _matmul(logits_gradient, hidden, ((0,), (0,)))
        if split:
            part_gradient = lax.psum_scatter(part_gradient, 'fsdp', scatter_dimension=1, tiled=True)
        return hidden_gradient, lax.dynamic_update_slice(head_gradient, part_gradient, (start, 0))

    nothing = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32))
    hidden_gradient, head_gradient = _over_slabs(visit, nothing, head.shape[0], slab)
    if split:
        head_gradient = lax.psum(head_gradient, 'data')
    return hidden_gradient.astype(dtype).reshape(shape), head_gradient.astype(head.dtype)


def _over_slabs(visit, carry, vocabulary, slab):
    """Folds `visit(carry, start, size)` over the vocabulary: whole slabs in a loop, then what is left over."""
    whole, rest = divmod(vocabulary, slab)
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, c: visit(c, i * slab, slab), carry)
    return visit(carry, whole * slab, rest) if rest else carry


def _take_slab(head, start, size, dtype, split):
    part = lax.dynamic_slice_in_dim(head, start, size).astype(dtype)
    return lax.all_gather(part, 'fsdp', axis=1, tiled=True) if split else part


def _slab_logits(hidden, part, softcap):
    """-> float32 logits `[tokens, slab]` and their derivative by the uncapped logits."""
    logits = _matmul(hidden, part, ((1,), (1,)))
    if softcap is None:
        return logits, 1.0
    capped = jnp.tanh(logits / softcap)
    return softcap * capped, 1.0 - capped**2


def _place_in_slab(targets, start, size):
    place = targets - start
    return (place >= 0) & (place < size), jnp.clip(place, 0, size - 1)


def _matmul(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)
