"""The log-prob primitive against float64 NumPy, and what it compiles to."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_meshes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_heads import (
    REFERENCE_WIDTH,
    ROWS,
    SCORED,
    WIDTH,
    assert_equal,
    cotangents_of,
    inputs,
    naive_values_and_gradients,
    our_values_and_gradients,
    padded,
    reference_of,
)

from jaxpo import sharding
from jaxpo.errors import InputError
from jaxpo.logps import DIVERGENCES, STATISTICS, Reference, token_statistics


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
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize(
    'vocabulary, slab, softcap, reference_softcap',
    [(37, 8, None, None), (37, 8, 3.0, None), (32, 8, 2.0, 3.0), (5, 8, 2.0, 3.0), (37, 37, None, 3.0)],
)
def test_all_statistics_equal_the_whole_vocabulary_in_float64(vocabulary, slab, softcap, reference_softcap):
    hidden, head, targets, _ = inputs(vocabulary)
    reference, cotangents = reference_of(vocabulary, reference_softcap), cotangents_of(STATISTICS)
    ours = our_values_and_gradients(hidden, head, targets, reference, cotangents, softcap=softcap, slab=slab)
    assert_equal(ours, naive_values_and_gradients(hidden, head, reference, cotangents, softcap))


@pytest.mark.parametrize('names', [DIVERGENCES, ('forward_kl',), ('reverse_kl',)])
@pytest.mark.parametrize(
    'shape, slab, dtype, softcap',
    [
        (None, 1031, jnp.float32, None),
        (None, 100, jnp.bfloat16, 3.0),
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, 100, jnp.float32, None),
    ],
)
def test_a_model_diverges_from_itself_by_exactly_nothing(shape, slab, dtype, softcap, names):
    """No rounding in the value, and none in the gradient, whatever the slabs, at large and at small logits."""
    mesh = None if shape is None else tiny_meshes.mesh(**shape)
    hidden, head, targets, _ = inputs(1031)
    head = padded(head, 1032)
    hidden = jnp.asarray(hidden * np.array([1e-3, 1, 30, 1e3] * 2, np.float32).reshape(8, 1, 1), dtype)
    ours = our_values_and_gradients(
        hidden,
        head,
        targets,
        Reference(hidden, head, softcap),
        cotangents_of(names),
        softcap=softcap,
        vocabulary=1031,
        mesh=mesh,
        slab=slab,
    )
    assert not any(np.any(np.asarray(array, np.float32) != 0) for array in jax.tree.leaves(ours))


def test_a_small_divergence_is_known_to_a_millionth():
    """Of a policy a few steps from its reference, with logits as large as those of trained models."""
    hidden, head, targets, _ = inputs(1031)
    head = head * 1.5
    moved = hidden + 1e-3 * np.random.default_rng(5).normal(size=hidden.shape).astype(np.float32)
    reference, cotangents = Reference(hidden, head), cotangents_of(DIVERGENCES)
    ours, _ = our_values_and_gradients(moved, head, targets, reference, cotangents, slab=100)
    theirs, _ = naive_values_and_gradients(moved, head, reference, cotangents)
    assert np.median(theirs['forward_kl']) < 5e-5
    assert_equal(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize('scale', [10.0, 100.0])
def test_statistics_stay_exact_where_probabilities_underflow(scale):
    """Logits of thousands: nearly every probability is 0 in float32, and no statistic or gradient is lost to that.

    A logit of 1e5 is known to 1e5 * 2^-24, some 1e-2 with the product's own rounding, relative to it 1e-6.
    """
    hidden, head, targets, _ = inputs(37)
    hidden, head = hidden * scale, head * scale
    reference = reference_of(37)
    reference = Reference(reference.hidden * scale, reference.head * scale)
    cotangents = cotangents_of(STATISTICS)
    values, gradients = our_values_and_gradients(hidden, head, targets, reference, cotangents, slab=8)
    theirs, _ = naive_values_and_gradients(hidden, head, reference, cotangents)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert (values['entropy'] >= 0).all() and (values['log_sum_squares'] <= 0).all()
    for name in STATISTICS:
        largest = np.abs(theirs[name]).max() if name in (*DIVERGENCES, 'mean_logit') else 0.0
        np.testing.assert_allclose(values[name], theirs[name], rtol=1e-5, atol=1e-6 * largest + 1e-4 * scale)


def test_the_reference_is_never_differentiated():
    hidden, head, targets, _ = inputs(37)

    def scalar(reference):
        result = token_statistics(hidden, head, targets, statistics=DIVERGENCES, reference=reference, slab=8)
        return (result.forward_kl + result.reverse_kl).sum()

    gradient = jax.jit(jax.grad(lambda *arrays: scalar(Reference(*arrays)), argnums=(0, 1)))(*reference_of(37)[:2])
    assert not any(np.any(leaf) for leaf in gradient)


def test_bfloat16_statistics_lose_only_their_own_rounding():
    """Values are those of the rounded arrays, accumulated in float32. A gradient by logits is rounded to bfloat16
    (relative 2^-9) before the products: so much of the sum of absolute products may be lost, and as much again where
    the result is rounded."""
    hidden, head, targets, _ = inputs(37)
    reference, cotangents = reference_of(37), cotangents_of(STATISTICS)
    low = [jnp.asarray(array, jnp.bfloat16) for array in (hidden, reference.hidden)]
    rounded = [np.asarray(jnp.asarray(array, jnp.bfloat16), np.float32) for array in (hidden, head, *reference[:2])]
    frozen = Reference(*rounded[2:])
    values, gradients = our_values_and_gradients(
        low[0], head, targets, Reference(low[1], reference.head), cotangents, slab=8
    )
    assert all(value.dtype == jnp.float32 for value in values.values())
    theirs, their_gradients = naive_values_and_gradients(*rounded[:2], frozen, cotangents)
    assert_equal(values, theirs)
    by_logits = logits_gradient(*rounded[:2], frozen, cotangents)
    bounds = (
        np.einsum('rsv,vd->rsd', np.abs(by_logits), np.abs(rounded[1])),
        np.einsum('rsv,rsd->vd', np.abs(by_logits), np.abs(rounded[0])),
    )
    for ours, theirs, bound in zip(gradients, their_gradients, bounds):
        assert (np.abs(np.asarray(ours, np.float64) - theirs) <= 2**-8 * bound + 1e-5).all()


def logits_gradient(hidden, head, reference, cotangents):
    """[R, S, V]: of sum(cotangents * statistics) by logits, by way of a head that is one logit an entry."""
    logits = np.einsum('rsd,vd->rsv', np.asarray(hidden, np.float64), np.asarray(head, np.float64))
    identity = np.eye(len(head))
    return naive_values_and_gradients(logits, identity, reference, cotangents)[1][0]


def test_statistics_compile_to_no_buffer_of_tokens_by_vocabulary():
    hidden, head, targets, _ = inputs(1031)
    reference, cotangents = reference_of(1031), cotangents_of(STATISTICS)

    def scalar(hidden, head, *arrays):
        asked = {'statistics': STATISTICS, 'reference': Reference(*arrays, 2.0), 'softcap': 3.0}
        result = token_statistics(hidden, head, targets, **asked, slab=64)
        return sum((cotangents[name] * getattr(result, name)).sum() for name in STATISTICS)

    compiled = jax.jit(jax.value_and_grad(scalar, argnums=(0, 1))).lower(hidden, head, *reference[:2]).compile()
    text = compiled.as_text()
    sizes = {tuple(map(int, dims.split(','))) for dims in re.findall(r'\b(?:f32|bf16|pred|s32)\[([\d,]+)\]', text)}
    assert {(1031, WIDTH), (1031, REFERENCE_WIDTH)} <= sizes
    assert not [size for size in sizes if np.prod(size) >= ROWS * SCORED * 1031]


def test_a_mesh_compiles_to_one_slab_at_a_time_and_one_message_of_sums():
    """Devices gather no more of the head than a slab, which they scatter the gradient of, and hold no logits but its.

    With 4 shares of 48 rows and 2 of 1031 entries and padding, a device has 12 tokens and 516 entries.
    """
    mesh = tiny_meshes.mesh(data=2, fsdp=2, tensor=2)
    rows, split = (NamedSharding(mesh, spec) for spec in (sharding.ROWS, P('tensor', 'fsdp')))
    hidden = jax.ShapeDtypeStruct((ROWS, SCORED, WIDTH), jnp.float32, sharding=rows)
    head = jax.ShapeDtypeStruct((1032, WIDTH), jnp.float32, sharding=split)
    targets = jax.ShapeDtypeStruct((ROWS, SCORED), jnp.int32, sharding=rows)

    def gradients(hidden, head, targets, weights):
        options = {'statistics': ('entropy',), 'vocabulary': 1031, 'mesh': mesh, 'slab': 43}

        def scalar(hidden, head):
            result = token_statistics(hidden, head, targets, **options)
            return (weights * (result.logps + result.entropy)).sum()

        return jax.grad(scalar, argnums=(0, 1))(hidden, head)

    weights = jax.ShapeDtypeStruct((ROWS, SCORED), jnp.float32, sharding=rows)
    lowered = jax.jit(gradients, out_shardings=(rows, split)).lower(hidden, head, targets, weights)
    text = lowered.compile().as_text()
    collectives = re.findall(r'= (.*?)\{.*? (all-gather|reduce-scatter|all-reduce|all-to-all)\(', text)
    assert sorted(collectives) == [
        ('f32[12,16]', 'all-reduce'),  # the gradient of hidden states, over tensor
        ('f32[12]', 'all-reduce'),  # largest logits
        ('f32[36]', 'all-reduce'),  # sums: targets' logits, totals and what the entropy needs
        ('f32[43,16]', 'all-gather'),
        ('f32[43,16]', 'all-gather'),
        ('f32[43,8]', 'reduce-scatter'),
        ('f32[516,8]', 'all-reduce'),  # the gradient of the head, over data
    ]
    sizes = [np.prod([int(size) for size in dims.split(',')]) for dims in re.findall(r'\b\w+\[([\d,]+)\]', text)]
    assert max(sizes) < 12 * 516


def test_a_bad_request_is_refused():
    hidden, head, targets, _ = inputs(37)
    with pytest.raises(InputError, match="'entropi'. Did you mean 'entropy'"):
        token_statistics(hidden, head, targets, statistics=('entropi',))
    with pytest.raises(InputError, match="'reverse_kl' compares with a reference"):
        token_statistics(hidden, head, targets, statistics=('reverse_kl',))
    with pytest.raises(InputError, match='the model has 37 entries, the reference 36'):
        token_statistics(hidden, head, targets, statistics=('forward_kl',), reference=reference_of(36))
    with pytest.raises(InputError, match='from 1 to the 37 rows of the head, not 38'):
        token_statistics(hidden, head, targets, vocabulary=38)
    with pytest.raises(InputError, match='over mesh.tensor 2: 37 is not a multiple of it. Set model.vocabulary_mult'):
        token_statistics(hidden, head, targets, mesh=tiny_meshes.mesh(tensor=2))
