"""Hidden states and a vocabulary head -> log-probabilities of scored tokens, and what else the vocabulary says of them.

One primitive serves policy and references. It walks the vocabulary in slabs, so that no `[tokens, V]` array exists in
the forward or the backward pass, accumulates in float32, and has its own derivative. Where a head is split over a mesh,
each device of the axis `tensor` walks its own rows of the vocabulary, and sums are joined once, behind the walk; the
width is split over `fsdp`: one slab at a time is gathered, and the slab's gradient is reduce-scattered, so that no
device ever holds more of the head than its part and a slab.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpo.errors import InputError, unknown
from jaxpo.rings import reduce_scatter, rings
from jaxpo.sharding import ROW_AXES
from jaxpo.types import TokenStatistics
from jaxpo.vocabulary import (
    BY_LOGITS,
    DIVERGENCES,
    NO_LOGIT,
    STATISTICS,
    VALUES,
    grown,
    joined,
    log_normaliser,
    no_sums,
    rise,
)

SLAB = 4096  # vocabulary entries at a time

_ROWS, _MODEL = P(ROW_AXES), (P(ROW_AXES), P('tensor', 'fsdp'))  # how rows, and a (hidden, head), lie on a mesh


class Reference(NamedTuple):
    """A frozen model over the same vocabulary, of any width: what a KL divergence is measured against."""

    hidden: jax.Array  # [R, S, D2]: its hidden states at the same places, in its compute dtype
    head: jax.Array  # [V, D2], padded as the model's
    softcap: float | None = None


class _Plan(NamedTuple):
    """What is fixed when a call is compiled."""

    statistics: tuple[str, ...]
    softcap: float | None
    reference_softcap: float | None
    slab: int
    mesh: Mesh | None
    vocabulary: int
    padded: bool  # whether the head has more rows than the vocabulary

    def splits(self, *axes: str) -> bool:
        """Whether there are several devices along these axes of the mesh."""
        return self.mesh is not None and any(self.mesh.shape[axis] > 1 for axis in axes)


def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    statistics: tuple[str, ...] = (),
    reference: Reference | None = None,
    softcap: float | None = None,
    vocabulary: int | None = None,
    mesh: Mesh | None = None,
    slab: int = SLAB,
) -> TokenStatistics:
    """Log-probabilities of `targets`, and the statistics asked for, exact and in float32.

    Args:
      hidden: `[R, S, D]`, in the compute dtype, rows split over the mesh axes `replica`, `data` and `fsdp`.
      head: `[V, D]`, one row per vocabulary entry, padding behind them, split over `tensor` and `fsdp`; cast to the
        compute dtype a slab at a time.
      targets: `[R, S]` int32 in [0, vocabulary).
      statistics: which of STATISTICS to compute beside `logps`, in nats. KL divergences are at least 0, and exactly
        0 where model and reference are the same arrays; else their rounding is about 1e-6 nats. `mean_logit`, the mean
        over the vocabulary (of capped logits where there is a softcap), is what MaPO reads of logits.
      reference: what `forward_kl` and `reverse_kl` compare with; never differentiated, and not read for anything else.
      softcap: logits are `softcap * tanh(logits / softcap)` where given.
      vocabulary: rows of the heads that are tokens; None: all. Those behind are padding (any finite numbers), of
        probability 0 and gradient 0.
      mesh: the mesh the arrays live on; None for one device.
      slab: vocabulary entries that a device holds at a time.

    Returns:
      TokenStatistics of shape `[R, S]`; None in the fields that were not asked for.

    Raises:
      InputError: an unknown statistic, a KL without a reference, a reference with another vocabulary, a vocabulary that
        the head does not hold, or a head whose rows do not divide over the mesh's `tensor`.
    """
    vocabulary = head.shape[0] if vocabulary is None else vocabulary
    _check(statistics, head, reference, vocabulary, mesh)
    compared = reference is not None and any(name in DIVERGENCES for name in statistics)
    frozen = lax.stop_gradient((reference.hidden, reference.head)) if compared else None
    plan = _Plan(
        statistics=tuple(name for name in STATISTICS if name in statistics),
        softcap=softcap,
        reference_softcap=reference.softcap if compared else None,
        slab=slab,
        mesh=mesh if mesh is not None and mesh.size > 1 else None,
        vocabulary=vocabulary,
        padded=vocabulary < head.shape[0],
    )
    return TokenStatistics(**_statistics(plan, (hidden, head), frozen, targets))


def _check(statistics, head, reference, vocabulary, mesh):
    for name in statistics:
        if name not in STATISTICS:
            raise unknown('statistic of a token', name, STATISTICS)
        if name in DIVERGENCES and reference is None:
            raise InputError(f'The statistic {name!r} compares with a reference model, and there is none.')
        if name in DIVERGENCES and reference.head.shape[0] != head.shape[0]:
            sizes = f'the model has {head.shape[0]} entries, the reference {reference.head.shape[0]}'
            raise InputError(f'The statistic {name!r} needs two models with one vocabulary: {sizes}.')
    if not 1 <= vocabulary <= head.shape[0]:
        raise InputError(f'The vocabulary is from 1 to the {head.shape[0]} rows of the head, not {vocabulary}.')
    if mesh is not None and head.shape[0] % mesh.shape['tensor']:
        raise InputError(
            f'The head {head.shape} cannot be split over mesh.tensor {mesh.shape["tensor"]}: {head.shape[0]} is not a '
            'multiple of it. Set model.vocabulary_multiple to pad it.'
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(plan, model, reference, targets):
    """-> {'logps' or statistic: [R, S]} of a model and a reference (or None), which are (hidden, head)."""
    return _statistics_forward(plan, model, reference, targets)[0]


def _statistics_forward(plan, *arguments):
    values, normalisers = _on_mesh(plan, _walk_forward, arguments, _ROWS)
    return values, (*arguments, values, normalisers)


def _statistics_backward(plan, saved, cotangents):
    return _on_mesh(plan, _walk_backward, (*saved, cotangents), _MODEL), None, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _on_mesh(plan, walk, arguments, result):
    """A walk of (model, reference or None, then arrays by rows), on each device's share where there is a mesh."""
    walk = functools.partial(walk, plan)
    if plan.mesh is None:
        return walk(*arguments)
    model, reference, *by_rows = arguments
    specs = (_MODEL, None if reference is None else _MODEL, *(_ROWS for _ in by_rows))
    return jax.shard_map(walk, mesh=plan.mesh, in_specs=specs, out_specs=result, check_vma=False)(*arguments)


def _walk_forward(plan, model, reference, targets):
    """-> values, and the logsumexp of the model's and of the reference's logits (or None), all `[R, S]` float32."""
    shape, rows, first = targets.shape, model[1].shape[0], _first_row(plan, model)
    targets = targets.reshape(-1) - first

    def visit(sums, start, size):
        real = _real(plan, first + start, size)
        logits, _, _ = _slab(plan, model, plan.softcap, start, size, real)
        here, place = _place_in_slab(targets, start, size)
        picked = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
        sums = sums | {'target': jnp.where(here, picked, sums['target'])}
        if reference is None:
            return grown(sums, logits, None, real)
        return grown(sums, logits, _slab(plan, reference, plan.reference_softcap, start, size, real)[0], real)

    sums = _over_slabs(visit, no_sums(plan.statistics, targets.shape[0]), rows, plan.slab)
    sums = joined(sums, 'tensor') if plan.splits('tensor') else sums
    normaliser, above = log_normaliser(sums), None if reference is None else rise(sums)
    values = {'logps': sums['target'] - normaliser}
    values |= {name: VALUES[name](sums, above, plan.vocabulary) for name in plan.statistics}
    normalisers = (normaliser, None if above is None else normaliser - above)
    return jax.tree.map(lambda array: array.reshape(shape), (values, normalisers))


def _walk_backward(plan, model, reference, targets, values, normalisers, cotangents):
    """-> gradients of the model's hidden `[R, S, D]` and head `[V, D]`, in their dtypes."""
    (hidden, head), first = model, _first_row(plan, model)
    shape, dtype, hidden = hidden.shape, hidden.dtype, hidden.reshape(-1, hidden.shape[-1])
    targets = targets.reshape(-1) - first
    values, normalisers, cotangents = jax.tree.map(lambda x: x.reshape(-1, 1), (values, normalisers, cotangents))

    def visit(carry, start, size):
        hidden_gradient, head_gradient = carry
        real = _real(plan, first + start, size)
        logits, slope, part = _slab(plan, model, plan.softcap, start, size, real)
        log_p, log_q = logits - normalisers[0], None
        if reference is not None:
            log_q = _slab(plan, reference, plan.reference_softcap, start, size, real)[0] - normalisers[1]
        here, place = _place_in_slab(targets, start, size)
        chosen = here[:, None] & (place[:, None] == jnp.arange(size)[None, :])
        by_logits = cotangents['logps'] * (chosen - jnp.exp(log_p))
        for name in plan.statistics:
            by_logits += cotangents[name] * BY_LOGITS[name](values[name], log_p, log_q, plan.vocabulary)
        by_logits = by_logits * slope if real is None else jnp.where(real, by_logits * slope, 0.0)
        # Cast before the products: they then run in the compute dtype, with float32 accumulation.
        by_logits = by_logits.astype(dtype)
        hidden_gradient += _matmul(by_logits, part, ((1,), (0,)))
        part_gradient = _matmul(by_logits, hidden, ((0,), (0,)))
        if plan.splits('fsdp'):
            part_gradient = reduce_scatter(part_gradient, 'fsdp', 1, stages)
        return hidden_gradient, lax.dynamic_update_slice(head_gradient, part_gradient, (start, 0))

    stages = rings(plan.mesh, 'fsdp') if plan.splits('fsdp') else ()
    nothing = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32))
    hidden_gradient, head_gradient = _over_slabs(visit, nothing, head.shape[0], plan.slab)
    if plan.splits('tensor'):
        hidden_gradient = lax.psum(hidden_gradient, 'tensor')
    if plan.splits('replica', 'data'):
        head_gradient = lax.psum(head_gradient, ('replica', 'data'))
    return hidden_gradient.astype(dtype).reshape(shape), head_gradient.astype(head.dtype)


def _over_slabs(visit, carry, rows, slab):
    """Folds `visit(carry, start, size)` over rows of a head: whole slabs in a loop, then what is left over."""
    whole, rest = divmod(rows, slab)
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, c: visit(c, i * slab, slab), carry)
    return visit(carry, whole * slab, rest) if rest else carry


def _first_row(plan, model):
    """The vocabulary entry of the first row of the head that this device holds."""
    return lax.axis_index('tensor') * model[1].shape[0] if plan.splits('tensor') else 0


def _real(plan, first, size):
    """`[1, size]`: whether the entries from `first` on are tokens; None where all of the head are."""
    return (first + jnp.arange(size) < plan.vocabulary)[None, :] if plan.padded else None


def _slab(plan, model, softcap, start, size, real):
    """-> float32 logits `[tokens, size]`, their derivative by the uncapped logits, and the slab of the head."""
    hidden, head = model
    part = lax.dynamic_slice_in_dim(head, start, size).astype(hidden.dtype)
    if plan.splits('fsdp'):
        part = lax.all_gather(part, 'fsdp', axis=1, tiled=True)
    logits, slope = _matmul(hidden.reshape(-1, hidden.shape[-1]), part, ((1,), (1,))), 1.0
    if softcap is not None:
        capped = jnp.tanh(logits / softcap)
        # The minimum changes no number: it keeps the product from being fused, unrounded, with a subtraction that
        # follows, by which equal models would differ.
        logits, slope = jnp.minimum(softcap * capped, softcap), 1.0 - capped**2
    return logits if real is None else jnp.where(real, logits, NO_LOGIT), slope, part


def _place_in_slab(targets, start, size):
    place = targets - start
    return (place >= 0) & (place < size), jnp.clip(place, 0, size - 1)


def _matmul(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)
