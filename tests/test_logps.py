"""The log-prob primitive against float64 NumPy, on one device and on meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpo.logps import token_statistics

ROWS, SCORED, WIDTH = 8, 6, 16


def oracle(hidden, head, targets, cotangent, softcap):
    """Log-probabilities and the gradients of sum(cotangent * logps), one token at a time, in float64."""
    hidden, head, cotangent = (np.asarray(x, np.float64) for x in (hidden, head, cotangent))
    logps, hidden_gradient, head_gradient = np.zeros(targets.shape), np.zeros(hidden.shape), np.zeros(head.shape)
    for r, s in np.ndindex(*targets.shape):
        raw = np.array([row @ hidden[r, s] for row in head])
        logits = raw if softcap is None else softcap * np.tanh(raw / softcap)
        slope = np.ones_like(raw) if softcap is None else 1 / np.cosh(raw / softcap) ** 2
        probabilities = np.exp(logits) / np.exp(logits).sum()
        logps[r, s] = np.log(probabilities[targets[r, s]])
        for v in range(len(head)):
            by_logit = cotangent[r, s] * ((v == targets[r, s]) - probabilities[v]) * slope[v]
            hidden_gradient[r, s] += by_logit * head[v]
            head_gradient[v] += by_logit * hidden[r, s]
    return logps, hidden_gradient, head_gradient


def inputs(vocabulary, seed=0):
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(ROWS, SCORED, WIDTH)).astype(np.float32)
    head = random.normal(size=(vocabulary, WIDTH)).astype(np.float32)
    targets = random.integers(0, vocabulary, (ROWS, SCORED)).astype(np.int32)
    targets[0, :2] = 0, vocabulary - 1
    cotangent = random.normal(size=(ROWS, SCORED)).astype(np.float32)
    return hidden, head, targets, cotangent


def values_and_gradients(hidden, head, targets, cotangent, **options):
    def scalar(hidden, head):
        logps = token_statistics(hidden, head, targets, **options).logps
        return (cotangent * logps).sum(), logps

    (_, logps), gradients = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True))(hidden, head)
    return logps, *gradients


@pytest.mark.parametrize('softcap', [None, 3.0])
@pytest.mark.parametrize('vocabulary, slab', [(32, 8), (37, 8), (5, 8), (37, 37)])
def test_equals_float64_oracle(vocabulary, slab, softcap):
    arrays = inputs(vocabulary)
    results = values_and_gradients(*arrays, softcap=softcap, slab=slab)
    for ours, theirs in zip(results, oracle(*arrays, softcap)):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize('shape', [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_sharded_equals_oracle(shape):
    mesh = jax.make_mesh(shape, ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
    hidden, head, targets, cotangent = inputs(37)
    rows = NamedSharding(mesh, P(('data', 'fsdp')))
    placed = (
        jax.device_put(hidden, rows),
        jax.device_put(head, NamedSharding(mesh, P(None, 'fsdp'))),
        jax.device_put(targets, rows),
        jax.device_put(cotangent, rows),
    )
    results = values_and_gradients(*placed, softcap=3.0, slab=8, mesh=mesh)
    for ours, theirs in zip(results, oracle(hidden, head, targets, cotangent, 3.0)):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_stays_exact_at_extreme_logits():
    hidden, head, targets, cotangent = inputs(37)
    results = values_and_gradients(hidden * 100, head * 100, targets, cotangent, slab=8)
    assert all(jnp.isfinite(result).all() for result in results)
    assert results[0].max() <= 0


def test_bfloat16_hidden_states_lose_only_their_own_rounding():
    hidden, head, targets, cotangent = inputs(37)
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (hidden, head)]
    logps, *_ = values_and_gradients(jnp.asarray(hidden, jnp.bfloat16), head, targets, cotangent, slab=8)
    assert logps.dtype == jnp.float32
    np.testing.assert_allclose(logps, oracle(*rounded, targets, cotangent, None)[0], rtol=1e-5, atol=1e-5)


def test_compiles_to_no_buffer_of_tokens_by_vocabulary():
    hidden, head, targets, cotangent = inputs(1031)

    def scalar(hidden, head):
        return (cotangent * token_statistics(hidden, head, targets, slab=64).logps).sum()

    text = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1))).lower(hidden, head).compile().as_text()
    sizes = {tuple(map(int, dims.split(','))) for dims in re.findall(r'\b(?:f32|bf16|pred|s32)\[([\d,]+)\]', text)}
    tokens = ROWS * SCORED
    assert (1031, WIDTH) in sizes
    assert not [size for size in sizes if np.prod(size) >= tokens * 1031]
