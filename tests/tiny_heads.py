"""Heads of a few vocabulary entries, and what a whole vocabulary at once says, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo.logps import DIVERGENCES, Reference, token_statistics

ROWS, SCORED, WIDTH, REFERENCE_WIDTH = 8, 6, 16, 24
EXACT = {'rtol': 1e-5, 'atol': 1e-5}


def inputs(vocabulary, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(ROWS, SCORED, WIDTH)).astype(np.float32)
    head = random.normal(size=(vocabulary, WIDTH)).astype(np.float32)
    targets = random.integers(0, vocabulary, (ROWS, SCORED)).astype(np.int32)
    targets[0, :2] = 0, vocabulary - 1
    cotangent = random.normal(size=(ROWS, SCORED)).astype(np.float32)
    return hidden, head, targets, cotangent


def padded(head, rows, seed=3):
    """A head with rows behind it that would say much if they had a say."""
    return np.concatenate(
        [head, np.random.default_rng(seed).normal(size=(rows - len(head), head.shape[1])) * 9.0]
    ).astype(np.float32)


def naive(hidden, head, targets, reference, softcap, name):
    """A statistic `[R, S]` of the whole vocabulary at once, as its definition has it."""

    def logits_of(hidden, head, softcap):
        logits = jnp.einsum('rsd,vd->rsv', hidden, head)
        return logits if softcap is None else softcap * jnp.tanh(logits / softcap)

    logits = logits_of(hidden, head, softcap)
    log_p = jax.nn.log_softmax(logits)
    log_q = jax.nn.log_softmax(logits_of(*reference)) if name in DIVERGENCES else None
    return {
        'logps': lambda: jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0],
        'forward_kl': lambda: (jnp.exp(log_q) * (log_q - log_p)).sum(-1),
        'reverse_kl': lambda: (jnp.exp(log_p) * (log_p - log_q)).sum(-1),
        'entropy': lambda: -(jnp.exp(log_p) * log_p).sum(-1),
        'log_sum_squares': lambda: jax.nn.logsumexp(2 * log_p, axis=-1),
        'mean_logit': lambda: logits.mean(-1),
    }[name]()


def naive_values_and_gradients(hidden, head, reference, cotangents, softcap=None, targets=None):
    """Statistics and the gradients of sum(cotangents * statistics) by hidden and head, differentiated in float64."""
    wide = [np.asarray(array, np.float64) for array in (hidden, head, *reference[:2])]
    cotangents = {name: np.asarray(array, np.float64) for name, array in cotangents.items()}

    def scalar(hidden, head, *frozen):
        values = {
            name: naive(hidden, head, targets, (*frozen, reference.softcap), softcap, name) for name in cotangents
        }
        return sum((cotangents[name] * values[name]).sum() for name in values), values

    with jax.enable_x64(True):
        (_, values), gradients = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(*wide)
        return jax.tree.map(np.asarray, (values, gradients))


def our_values_and_gradients(hidden, head, targets, reference, cotangents, **options):
    def scalar(hidden, head, *frozen):
        given = Reference(*frozen, reference.softcap) if frozen else None
        asked = {'statistics': tuple(name for name in cotangents if name != 'logps'), 'reference': given}
        statistics = token_statistics(hidden, head, targets, **asked, **options)
        values = {name: getattr(statistics, name) for name in cotangents}
        return sum((cotangents[name] * values[name]).sum() for name in values), values

    frozen = () if reference is None else reference[:2]
    (_, values), gradients = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(hidden, head, *frozen)
    return values, gradients


def reference_of(vocabulary, softcap=None, seed=1):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(ROWS, SCORED, REFERENCE_WIDTH)).astype(np.float32)
    return Reference(hidden, random.normal(size=(vocabulary, REFERENCE_WIDTH)).astype(np.float32), softcap)


def cotangents_of(names, seed=2):
    random = np.random.default_rng(seed)
    return {name: random.normal(size=(ROWS, SCORED)).astype(np.float32) for name in names}


def assert_equal(ours, theirs, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or EXACT)), ours, theirs)
