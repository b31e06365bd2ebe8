"""Hidden states and a vocabulary head -> log-probabilities of scored tokens, and what else the vocabulary says of them.

The only file that sees the vocabulary. One primitive serves policy and references. It walks the vocabulary in slabs, so
that no `[tokens, V]` array exists in the forward or the backward pass, accumulates in float32, and has its own
derivative. Where a head is split over the mesh axis `fsdp` (its width, never its vocabulary), one slab at a time is
gathered, and the slab's gradient is reduce-scattered: no device ever holds the whole head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpo.errors import InputError, unknown
from jaxpo.sharding import ROW_AXES
from jaxpo.types import TokenStatistics

SLAB = 4096  # vocabulary entries at a time
DIVERGENCES = ('forward_kl', 'reverse_kl')
STATISTICS = (*DIVERGENCES, 'entropy', 'log_sum_squares', 'mean_logit')

_ROWS, _MODEL = P(ROW_AXES), (P(ROW_AXES), P('tensor', 'fsdp'))  # how rows, and a (hidden, head), lie on a mesh


class Reference(NamedTuple):
    """A frozen model over the same vocabulary, of any width: what a KL divergence is measured against."""

    hidden: jax.Array  # [R, S, D2]: its hidden states at the same places, in its compute dtype
    head: jax.Array  # [V, D2]
    softcap: float | None = None


class _Plan(NamedTuple):
    """What is fixed when a call is compiled."""

    statistics: tuple[str, ...]
    softcap: float | None
    reference_softcap: float | None
    slab: int
    mesh: Mesh | None


def token_statistics(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    statistics: tuple[str, ...] = (),
    reference: Reference | None = None,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    slab: int = SLAB,
) -> TokenStatistics:
    """Log-probabilities of `targets`, and the statistics asked for, exact and in float32.

    Args:
      hidden: `[R, S, D]`, in the compute dtype, rows split over the mesh axes `data` and `fsdp`.
      head: `[V, D]`, one row per vocabulary entry; cast to the compute dtype a slab at a time.
      targets: `[R, S]` int32 in [0, V).
      statistics: which of STATISTICS to compute beside `logps`, in nats. KL divergences are at least 0, and exactly
        0 where model and reference are the same arrays; else their rounding is about 1e-6 nats. `mean_logit`, the mean
        over the vocabulary (of capped logits where there is a softcap), is what MaPO reads of logits.
      reference: what `forward_kl` and `reverse_kl` compare with; never differentiated, and not read for anything else.
      softcap: logits are `softcap * tanh(logits / softcap)` where given.
      mesh: the mesh the arrays live on; None for one device.
      slab: vocabulary entries held at a time.

    Returns:
      TokenStatistics of shape `[R, S]`; None in the fields that were not asked for.

    Raises:
      InputError: an unknown statistic, a KL without a reference, or a reference with another vocabulary.
    """
    _check(statistics, head, reference)
    compared = reference is not None and any(name in DIVERGENCES for name in statistics)
    frozen = lax.stop_gradient((reference.hidden, reference.head)) if compared else None
    plan = _Plan(
        statistics=tuple(name for name in STATISTICS if name in statistics),
        softcap=softcap,
        reference_softcap=reference.softcap if compared else None,
        slab=slab,
        mesh=mesh if mesh is not None and mesh.size > 1 else None,
    )
    return TokenStatistics(**_statistics(plan, (hidden, head), frozen, targets))


def _check(statistics, head, reference):
    for name in statistics:
        if name not in STATISTICS:
            raise unknown('statistic of a token', name, STATISTICS)
        if name in DIVERGENCES and reference is None:
            raise InputError(f'The statistic {name!r} compares with a reference model, and there is none.')
        if name in DIVERGENCES and reference.head.shape[0] != head.shape[0]:
            sizes = f'the model has {head.shape[0]} entries, the reference {reference.head.shape[0]}'
            raise InputError(f'The statistic {name!r} needs two models with one vocabulary: {sizes}.')


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
    shape, targets = targets.shape, targets.reshape(-1)

    def visit(sums, start, size):
        logits, _, _ = _slab(model, start, size, plan.softcap, plan.mesh)
        here, place = _place_in_slab(targets, start, size)
        picked = jnp.take_along_axis(logits, place[:, None], axis=1)[:, 0]
        new = {'target': jnp.where(here, picked, sums['target'])}
        if reference is None:
            return {**new, 'model': _grown(sums['model'], logits)[0]}
        reference_logits, _, _ = _slab(reference, start, size, plan.reference_softcap, plan.mesh)
        gap = logits - reference_logits
        new['model'], scale, shares = _grown(sums['model'], logits, gap)
        new['reference'], reference_scale, reference_shares = _grown(sums['reference'], reference_logits, -gap)
        moved = sums['excess'] * scale + sums['reference']['total'] * (scale - reference_scale)
        return {**new, 'excess': moved + (shares - reference_shares).sum(axis=1)}

    sums = _over_slabs(visit, _no_sums(plan, targets.shape[0]), model[1].shape[0], plan.slab)
    normaliser = sums['model']['largest'] + jnp.log(sums['model']['total'])
    rise = None if reference is None else _rise(sums)
    values = {'logps': sums['target'] - normaliser}
    values |= {name: _VALUES[name](sums, rise, model[1].shape[0]) for name in plan.statistics}
    normalisers = (normaliser, None if rise is None else normaliser - rise)
    return jax.tree.map(lambda array: array.reshape(shape), (values, normalisers))


def _no_sums(plan, tokens):
    """What `_walk_forward` starts from: only the sums that it needs. `excess` is the model's total minus the
    reference's, summed by itself so that equal models have none, whatever the rounding of either total."""
    zero = jnp.zeros(tokens, jnp.float32)
    # Finite: a difference from it times a sum of nothing must be 0.
    nothing = {'largest': jnp.full(tokens, jnp.finfo(jnp.float32).min / 2), 'total': zero}
    needed = {'entropy': 'relative', 'log_sum_squares': 'squares', 'mean_logit': 'logits', 'reverse_kl': 'gap'}
    sums = {'target': zero, 'model': nothing | {needed[name]: zero for name in plan.statistics if name in needed}}
    if any(name in DIVERGENCES for name in plan.statistics):
        sums['excess'] = zero
        sums['reference'] = nothing | ({'gap': zero} if 'forward_kl' in plan.statistics else {})
    return sums


def _grown(sums, logits, gap=None):
    """One model's sums over the vocabulary with a slab added, the factor the old ones took, and the slab's shares.

    The sums are relative to the largest logit so far, `largest`:
    total: of e = exp(logit - largest). relative: of e * (logit - largest). squares: of e**2. logits: of logits. gap: of
    e * gap, where gap is the logit minus that of the other model.
    """
    largest = jnp.maximum(sums['largest'], logits.max(axis=1))
    fall = sums['largest'] - largest
    scale = jnp.exp(fall)
    relative = logits - largest[:, None]
    shares = jnp.exp(relative)
    grown = {'largest': largest, 'total': sums['total'] * scale + shares.sum(axis=1)}
    if 'relative' in sums:
        moved = (sums['relative'] + fall * sums['total']) * scale
        grown['relative'] = moved + (shares * relative).sum(axis=1)
    if 'squares' in sums:
        grown['squares'] = sums['squares'] * scale**2 + (shares**2).sum(axis=1)
    if 'logits' in sums:
        grown['logits'] = sums['logits'] + logits.sum(axis=1)
    if 'gap' in sums:
        grown['gap'] = sums['gap'] * scale + (shares * gap).sum(axis=1)
    return grown, scale, shares


def _rise(sums):
    """The model's logsumexp minus the reference's: exactly 0 for equal models."""
    model, reference = sums['model'], sums['reference']
    share = sums['excess'] / reference['total']
    near = jnp.abs(share) < 0.5
    log_ratio = jnp.where(near, jnp.log1p(jnp.where(near, share, 0.0)), jnp.log(model['total'] / reference['total']))
    return (model['largest'] - reference['largest']) + log_ratio


def _mean(sums, name):
    """Of what was summed by `name`, under the model's probabilities."""
    return sums[name] / sums['total']


# A statistic by the sums, the rise of logsumexp from reference to model, and the size of the vocabulary.
_VALUES = {
    'forward_kl': lambda sums, rise, _: jnp.maximum(_mean(sums['reference'], 'gap') + rise, 0.0),
    'reverse_kl': lambda sums, rise, _: jnp.maximum(_mean(sums['model'], 'gap') - rise, 0.0),
    'entropy': lambda sums, *_: jnp.log(sums['model']['total']) - _mean(sums['model'], 'relative'),
    'log_sum_squares': lambda sums, *_: jnp.minimum(
        jnp.log(sums['model']['squares']) - 2.0 * jnp.log(sums['model']['total']), 0.0
    ),
    'mean_logit': lambda sums, _, vocabulary: sums['model']['logits'] / vocabulary,
}
# Its derivative by the logits of a slab, by its value [tokens, 1], the log-probabilities [tokens, slab] under the
# model and the reference, and the size of the vocabulary. The logarithms are differences of finite numbers, so that a
# probability that underflows to 0 meets no -inf.
_BY_LOGITS = {
    'forward_kl': lambda value, log_p, log_q, _: jnp.exp(log_p) - jnp.exp(log_q),
    'reverse_kl': lambda value, log_p, log_q, _: jnp.exp(log_p) * (log_p - log_q - value),
    'entropy': lambda value, log_p, *_: -jnp.exp(log_p) * (log_p + value),
    'log_sum_squares': lambda value, log_p, *_: 2.0 * (jnp.exp(2.0 * log_p - value) - jnp.exp(log_p)),
    'mean_logit': lambda value, log_p, _, vocabulary: jnp.full_like(log_p, 1.0 / vocabulary),
}


def _walk_backward(plan, model, reference, targets, values, normalisers, cotangents):
    """-> gradients of the model's hidden `[R, S, D]` and head `[V, D]`, in their dtypes."""
    (hidden, head), targets = model, targets.reshape(-1)
    shape, dtype, hidden = hidden.shape, hidden.dtype, hidden.reshape(-1, hidden.shape[-1])
    values, normalisers, cotangents = jax.tree.map(lambda x: x.reshape(-1, 1), (values, normalisers, cotangents))

    def visit(carry, start, size):
        hidden_gradient, head_gradient = carry
        logits, slope, part = _slab(model, start, size, plan.softcap, plan.mesh)
        log_p, log_q = logits - normalisers[0], None
        if reference is not None:
            reference_logits, _, _ = _slab(reference, start, size, plan.reference_softcap, plan.mesh)
            log_q = reference_logits - normalisers[1]
        here, place = _place_in_slab(targets, start, size)
        chosen = here[:, None] & (place[:, None] == jnp.arange(size)[None, :])
        by_logits = cotangents['logps'] * (chosen - jnp.exp(log_p))
        for name in plan.statistics:
            by_logits += cotangents[name] * _BY_LOGITS[name](values[name], log_p, log_q, head.shape[0])
        # Cast before the products: they then run in the compute dtype, with float32 accumulation.
        by_logits = (by_logits * slope).astype(dtype)
        hidden_gradient += _matmul(by_logits, part, ((1,), (0,)))
        part_gradient = _matmul(by_logits, hidden, ((0,), (0,)))
        if plan.mesh is not None:
            part_gradient = lax.psum_scatter(part_gradient, 'fsdp', scatter_dimension=1, tiled=True)
        return hidden_gradient, lax.dynamic_update_slice(head_gradient, part_gradient, (start, 0))

    nothing = (jnp.zeros(hidden.shape, jnp.float32), jnp.zeros(head.shape, jnp.float32))
    hidden_gradient, head_gradient = _over_slabs(visit, nothing, head.shape[0], plan.slab)
    if plan.mesh is not None:
        head_gradient = lax.psum(head_gradient, ('replica', 'data'))
    return hidden_gradient.astype(dtype).reshape(shape), head_gradient.astype(head.dtype)


def _over_slabs(visit, carry, vocabulary, slab):
    """Folds `visit(carry, start, size)` over the vocabulary: whole slabs in a loop, then what is left over."""
    whole, rest = divmod(vocabulary, slab)
    if whole:
        carry = lax.fori_loop(0, whole, lambda i, c: visit(c, i * slab, slab), carry)
    return visit(carry, whole * slab, rest) if rest else carry


def _slab(model, start, size, softcap, mesh):
    """-> float32 logits `[tokens, size]`, their derivative by the uncapped logits, and the slab of the head."""
    hidden, head = model
    part = lax.dynamic_slice_in_dim(head, start, size).astype(hidden.dtype)
    if mesh is not None:
        part = lax.all_gather(part, 'fsdp', axis=1, tiled=True)
    logits = _matmul(hidden.reshape(-1, hidden.shape[-1]), part, ((1,), (1,)))
    if softcap is None:
        return logits, 1.0, part
    capped = jnp.tanh(logits / softcap)
    # The minimum changes no number: it keeps the product from being fused, unrounded, with a subtraction that follows,
    # by which equal models would differ.
    return jnp.minimum(softcap * capped, softcap), 1.0 - capped**2, part


def _place_in_slab(targets, start, size):
    place = targets - start
    return (place >= 0) & (place < size), jnp.clip(place, 0, size - 1)


def _matmul(a, b, contract):
    return lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)
