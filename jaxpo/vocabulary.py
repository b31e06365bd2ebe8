"""Sums over a vocabulary, made part by part, and the statistics of tokens that they give.

A part is a slab of the vocabulary, or all that one device holds of it. Sums are float32, `[tokens]`, and relative to
the largest logit so far, so that none overflows. Entries that are no token's have the logit NO_LOGIT, and no say.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

DIVERGENCES = ('forward_kl', 'reverse_kl')
STATISTICS = (*DIVERGENCES, 'entropy', 'log_sum_squares', 'mean_logit')

# Finite, as all that follows from it: the difference of two of them is 0, and a sum of nothing stays 0 when it is
# multiplied by a difference from either. A probability of the first is 0 even where there is no other logit.
NO_LOGIT = float(np.finfo(np.float32).min)
_NONE_SO_FAR = NO_LOGIT / 2

_NEEDED = {'entropy': 'relative', 'log_sum_squares': 'squares', 'mean_logit': 'logits', 'reverse_kl': 'gap'}


def no_sums(statistics: tuple[str, ...], tokens: int) -> dict:
    """What `grown` starts from: only the sums that `statistics` need.

    target: the logit of the target. model, reference: each one's sums, where `largest` is its largest logit so far;
    total: of e = exp(logit - largest). relative: of e * (logit - largest). squares: of e**2. logits: of logits. gap: of
    e * gap, where gap is the logit minus that of the other model. excess: the model's total minus the reference's,
    summed by itself so that equal models have none, whatever the rounding of either total.
    """
    zero = jnp.zeros(tokens, jnp.float32)
    nothing = {'largest': jnp.full(tokens, _NONE_SO_FAR, jnp.float32), 'total': zero}
    sums = {'target': zero, 'model': nothing | {_NEEDED[name]: zero for name in statistics if name in _NEEDED}}
    if any(name in DIVERGENCES for name in statistics):
        sums['excess'] = zero
        sums['reference'] = nothing | ({'gap': zero} if 'forward_kl' in statistics else {})
    return sums


def grown(sums: dict, logits: jax.Array, reference_logits: jax.Array | None, real: jax.Array | None) -> dict:
    """The sums with a part added, `target` aside.

    Args:
      logits, reference_logits: `[tokens, size]` float32; the latter only where the sums have a reference.
      real: `[1, size]` bool, False where the logits are NO_LOGIT; None where none is.
    """
    models = {'model': logits} | ({} if reference_logits is None else {'reference': reference_logits})
    largest = {name: jnp.maximum(sums[name]['largest'], values.max(axis=1)) for name, values in models.items()}
    sums = _rebased(sums, largest)
    if reference_logits is None:
        return sums | {'model': _added(sums['model'], logits, real)[0]}
    gap = logits - reference_logits
    model, shares = _added(sums['model'], logits, real, gap)
    reference, reference_shares = _added(sums['reference'], reference_logits, real, -gap)
    excess = sums['excess'] + (shares - reference_shares).sum(axis=1)
    return sums | {'model': model, 'reference': reference, 'excess': excess}


def joined(sums: dict, axis: str) -> dict:
    """The sums of the whole vocabulary, on each device along a mesh axis, of those of each one's part of it."""
    models = [name for name in ('model', 'reference') if name in sums]
    # Raveled: one array is one message.
    flat, unravel = ravel_pytree({name: sums[name]['largest'] for name in models})
    largest = unravel(lax.pmax(flat, axis))
    sums = _rebased(sums, largest)
    rest = {name: {key: sums[name][key] for key in sums[name] if key != 'largest'} for name in models}
    flat, unravel = ravel_pytree(sums | rest)
    sums = unravel(lax.psum(flat, axis))
    return sums | {name: sums[name] | {'largest': largest[name]} for name in models}


def _rebased(sums, largest):
    """The sums relative to `largest` logits of the models, each no less than that of before."""
    model, scale = _rebased_model(sums['model'], largest['model'])
    if 'reference' not in sums:
        return sums | {'model': model}
    reference, reference_scale = _rebased_model(sums['reference'], largest['reference'])
    excess = sums['excess'] * scale + sums['reference']['total'] * (scale - reference_scale)
    return sums | {'model': model, 'reference': reference, 'excess': excess}


def _rebased_model(sums, largest):
    """One model's sums relative to `largest`, and the factor that its total took."""
    fall = sums['largest'] - largest
    scale = jnp.exp(fall)
    rebased = {**sums, 'largest': largest, 'total': sums['total'] * scale}
    if 'relative' in sums:
        rebased['relative'] = (sums['relative'] + fall * sums['total']) * scale
    if 'squares' in sums:
        rebased['squares'] = sums['squares'] * scale**2
    if 'gap' in sums:
        rebased['gap'] = sums['gap'] * scale
    return rebased, scale


def _added(sums, logits, real, gap=None):
    """One model's sums with logits added that are no larger than `largest`, and exp(logit - largest) of each."""
    relative = logits - sums['largest'][:, None]
    shares = jnp.exp(relative)
    terms = {
        'total': lambda: shares,
        'relative': lambda: shares * relative,
        'squares': lambda: shares**2,
        'logits': lambda: logits if real is None else jnp.where(real, logits, 0.0),
        'gap': lambda: shares * gap,
    }
    return sums | {name: sums[name] + terms[name]().sum(axis=1) for name in terms if name in sums}, shares


def log_normaliser(sums: dict) -> jax.Array:
    """The model's logsumexp."""
    return sums['model']['largest'] + jnp.log(sums['model']['total'])


def rise(sums: dict) -> jax.Array:
    """The model's logsumexp minus the reference's: exactly 0 for equal models."""
    model, reference = sums['model'], sums['reference']
    share = sums['excess'] / reference['total']
    near = jnp.abs(share) < 0.5
    log_ratio = jnp.where(near, jnp.log1p(jnp.where(near, share, 0.0)), jnp.log(model['total'] / reference['total']))
    return (model['largest'] - reference['largest']) + log_ratio


def _mean(sums, name):
    """Of what was summed by `name`, under the model's probabilities."""
    return sums[name] / sums['total']


VALUES = {
    'forward_kl': lambda sums, rise, _: jnp.maximum(_mean(sums['reference'], 'gap') + rise, 0.0),
    'reverse_kl': lambda sums, rise, _: jnp.maximum(_mean(sums['model'], 'gap') - rise, 0.0),
    'entropy': lambda sums, *_: jnp.log(sums['model']['total']) - _mean(sums['model'], 'relative'),
    'log_sum_squares': lambda sums, *_: jnp.minimum(
        jnp.log(sums['model']['squares']) - 2.0 * jnp.log(sums['model']['total']), 0.0
    ),
    'mean_logit': lambda sums, _, vocabulary: sums['model']['logits'] / vocabulary,
}
"""A statistic by the sums, the rise of logsumexp from reference to model, and the size of the vocabulary."""

BY_LOGITS = {
    'forward_kl': lambda value, log_p, log_q, _: jnp.exp(log_p) - jnp.exp(log_q),
    'reverse_kl': lambda value, log_p, log_q, _: jnp.exp(log_p) * (log_p - log_q - value),
    'entropy': lambda value, log_p, *_: -jnp.exp(log_p) * (log_p + value),
    'log_sum_squares': lambda value, log_p, *_: 2.0 * (jnp.exp(2.0 * log_p - value) - jnp.exp(log_p)),
    'mean_logit': lambda value, log_p, _, vocabulary: jnp.full_like(log_p, 1.0 / vocabulary),
}
"""A statistic's derivative by the logits of a part, by its value `[tokens, 1]`, the log-probabilities `[tokens, size]`
under the model and the reference, and the size of the vocabulary. The logarithms are differences of finite numbers, so
that a probability that underflows to 0 meets no -inf."""
