"""Adapters: nothing at the start, the same as their merged kernels afterwards, and apart from the base always."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_meshes
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_decoders import CONFIGS, loud_params, tokens_of

from jaxpo import config, sharding
from jaxpo.errors import InputError
from jaxpo.models import lora
from jaxpo.models.activations import apply_collecting
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.cache import empty_cache
from jaxpo.models.decoder import Decoder, abstract_params

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ALL = tuple(lora.BLOCKS)
SETTINGS = lora.Lora(rank=3, scale=0.7, targets=ALL, zero='a')
# Together: rotary scaling, a window in some layers, normed queries, biases, post-norms, soft-caps.
FAMILIES = ('llama3', 'qwen3-windowed', 'gemma2')
EXACT = {'atol': 2e-5, 'rtol': 2e-5}
# Fused with another neighbour, the compiler for CPUs adds up the same squares in another order.
UNFUSED = {'xla_disable_hlo_passes': 'fusion'}


def decoder_of(name, **options):
    return Decoder(from_hugging_face(CONFIGS[name]), **options)


def apply(decoder, params, *place):
    return decoder.apply({'params': params}, *place)


hidden_of = jax.jit(apply, static_argnums=0)
unfused_hidden_of = jax.jit(apply, static_argnums=0, compiler_options=UNFUSED)
merged = jax.jit(lora.merged, static_argnums=1)


def plain_rows(name, *shape):
    """tokens, positions, segment, branch of rows that hold one sequence each."""
    tokens = tokens_of(CONFIGS[name], *shape)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    return np.stack([tokens, positions, np.ones(shape, np.int32), np.zeros(shape, np.int32)])


def fresh_adapter(name, zero='a', targets=ALL, seed=0):
    settings = lora.Lora(3, 0.7, targets, zero)
    return lora.init_adapter(from_hugging_face(CONFIGS[name]), settings, jax.random.key(seed))


def loud_adapter(name, settings=SETTINGS, seed=5):
    """Both factors far from 0, so that a dropped, swapped or unscaled one shows."""
    rng = np.random.default_rng(seed)
    shapes = lora.abstract_adapter(from_hugging_face(CONFIGS[name]), settings)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


def loud_pair(name):
    """A base and an adapter in one tree."""
    return lora.combined(loud_params(CONFIGS[name]), loud_adapter(name))


@pytest.mark.parametrize(
    ('name', 'dtype'), [*((name, 'float32') for name in CONFIGS), *((name, 'bfloat16') for name in FAMILIES)]
)
def test_a_fresh_adapter_changes_no_bit(name, dtype):
    base, place = loud_params(CONFIGS[name]), plain_rows(name, 2, 16)
    without = unfused_hidden_of(decoder_of(name, dtype=jnp.dtype(dtype)), base, *place)
    decoder = decoder_of(name, dtype=jnp.dtype(dtype), lora=SETTINGS)
    for zero in 'ab':
        adapted = unfused_hidden_of(decoder, lora.combined(base, fresh_adapter(name, zero)), *place)
        assert adapted.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(adapted, without)


@pytest.mark.parametrize('name', ['llama', 'gemma2'])
def test_a_fresh_adapter_changes_no_bit_as_usually_compiled(compiled_as_usual, name):
    base, place = loud_params(CONFIGS[name]), plain_rows(name, 2, 16)
    adapted = hidden_of(decoder_of(name, lora=SETTINGS), lora.combined(base, fresh_adapter(name)), *place)
    np.testing.assert_array_equal(adapted, hidden_of(decoder_of(name), base, *place))


@pytest.mark.parametrize('zero', ['a', 'b'])
def test_one_factor_is_zero_and_the_other_keeps_the_size_of_what_passes(zero):
    leaves = flatten_dict(fresh_adapter('llama', zero))
    assert len(leaves) == 14
    for path, leaf in leaves.items():
        assert leaf.dtype == jnp.float32
        if path[-1].endswith(f'_lora_{zero}'):
            assert not np.any(leaf)
        else:
            assert np.std(leaf) * np.sqrt(leaf.shape[-2]) == pytest.approx(1, abs=0.2)
            assert not np.array_equal(leaf[0], leaf[1])
    queries = flatten_dict(fresh_adapter('llama', zero, targets=('query',)))
    assert len(queries) == 2
    for path, leaf in queries.items():
        np.testing.assert_array_equal(leaf, leaves[path])


@pytest.mark.parametrize('name', CONFIGS)
def test_the_adapted_model_is_the_merged_one(name):
    place, both, base = plain_rows(name, 2, 16), loud_pair(name), loud_params(CONFIGS[name])
    adapted = unfused_hidden_of(decoder_of(name, lora=SETTINGS), both, *place)
    plain = merged(both, SETTINGS)
    assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, base)
    np.testing.assert_allclose(unfused_hidden_of(decoder_of(name), plain, *place), adapted, **EXACT)
    assert np.abs(adapted - unfused_hidden_of(decoder_of(name), base, *place)).max() > 0.1


def test_without_adapters_the_decoder_passes_over_their_leaves():
    place, both, base = plain_rows('llama', 2, 16), loud_pair('llama'), loud_params(CONFIGS['llama'])
    off = hidden_of(decoder_of('llama'), both, *place)
    np.testing.assert_array_equal(off, hidden_of(decoder_of('llama'), base, *place))


@pytest.mark.parametrize('target', ALL)
def test_merging_adds_the_scaled_product_to_its_own_kernel_alone(target):
    base, settings = loud_params(CONFIGS['llama']), lora.Lora(2, -1.5, (target,))
    adapter = loud_adapter('llama', settings)
    factors = adapter['layers'][lora.BLOCKS[target]]
    a, b = (factors[f'{target}_lora_{factor}'].astype(np.float64) for factor in 'ab')
    plain = merged(lora.combined(base, adapter), settings)
    path = lora.kernel_path(target)
    for other, leaf in flatten_dict(base).items():
        expected = leaf + (-1.5 * np.einsum('lir,lro->lio', a, b) if other == path else 0)
        np.testing.assert_allclose(flatten_dict(plain)[other], expected, rtol=1e-5, atol=1e-6)


def test_merging_a_bfloat16_kernel_adds_up_in_float32():
    kernel, b = np.ones((1, 2, 2), jnp.bfloat16), np.ones((1, 3, 2), np.float32)
    a = np.full((1, 2, 3), 2**-8 + 2**-12, np.float32)  # thrice it is no bfloat16, nor each sum on the way
    result = lora.merged_kernel(kernel, a, b, 0.5)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, (1 + 1.5 * a[:, :, :2]).astype(jnp.bfloat16))


def test_the_gradient_reaches_the_zero_factor_and_needs_no_base():
    name, place = 'gemma2', plain_rows('gemma2', 2, 16)
    base, decoder = loud_params(CONFIGS[name]), decoder_of(name, lora=SETTINGS)

    @jax.jit
    @jax.grad
    def gradient_of(adapter):
        return jnp.mean(apply(decoder, lora.combined(base, adapter), *place) ** 3)

    for zero in 'ab':
        gradient = flatten_dict(gradient_of(fresh_adapter(name, zero)))
        assert len(gradient) == 14 and all(path[-1].endswith(lora.SUFFIXES) for path in gradient)
        for path, leaf in gradient.items():
            # The gradient of the other factor passes through the zero one.
            assert all(np.any(layer) for layer in leaf) == path[-1].endswith(f'_lora_{zero}')
            assert np.all(np.isfinite(leaf))


def test_the_gradient_of_the_factors_is_that_of_their_kernels():
    """By the chain rule through W + s A B: dA = s dW B^T, dB = s A^T dW."""
    name, place = 'llama', plain_rows('llama', 2, 16)
    base, adapter = loud_params(CONFIGS[name]), loud_adapter(name)

    def loss(decoder, params):
        return jnp.mean(apply(decoder, params, *place) ** 3)

    adapted = jax.jit(jax.grad(lambda factors: loss(decoder_of(name, lora=SETTINGS), lora.combined(base, factors))))
    ours = adapted(adapter)['layers']
    plain = jax.jit(jax.grad(functools.partial(loss, decoder_of(name))))
    theirs = plain(merged(lora.combined(base, adapter), SETTINGS))['layers']
    for target, block in lora.BLOCKS.items():
        a, b = (adapter['layers'][block][f'{target}_lora_{factor}'] for factor in 'ab')
        kernel = np.asarray(theirs[block][target])
        expected = {'a': 0.7 * kernel @ b.swapaxes(1, 2), 'b': 0.7 * a.swapaxes(1, 2) @ kernel}
        for factor, value in expected.items():
            size = np.abs(value).max()
            np.testing.assert_allclose(ours[block][f'{target}_lora_{factor}'], value, rtol=1e-3, atol=1e-4 * size)


def test_remat_changes_nothing():
    name, place = 'gemma2', plain_rows('gemma2', 2, 16)
    base, adapter = loud_params(CONFIGS[name]), loud_adapter(name)

    def evaluate(remat):
        decoder = decoder_of(name, lora=SETTINGS, remat=remat)
        loss = jax.value_and_grad(lambda factors: jnp.mean(apply(decoder, lora.combined(base, factors), *place) ** 2))
        return jax.jit(loss)(adapter)

    exact = evaluate('none')
    for remat in ('dots', 'full'):
        jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), evaluate(remat), exact)


def test_sampling_with_a_cache_equals_the_full_forward():
    name, both, place = 'qwen3-windowed', loud_pair('qwen3-windowed'), plain_rows('qwen3-windowed', 2, 20)
    decoder = decoder_of(name, lora=SETTINGS)
    full, cache, pieces = hidden_of(decoder, both, *place), empty_cache(decoder.architecture, 2, 24, jnp.float32), []
    for start, end in [(0, 8), (8, 16)] + [(at, at + 1) for at in range(16, 20)]:
        hidden, cache = hidden_of(decoder, both, *place[:, :, start:end], cache)
        pieces.append(hidden)
    np.testing.assert_allclose(np.concatenate(pieces, axis=1), full, **EXACT)


def test_packed_and_shared_rows_equal_separate_rows():
    """Tokens of two completions behind one prompt, and of another sequence, in one row."""
    name, both = 'gemma2', loud_pair('gemma2')
    place = plain_rows(name, 3, 12)
    place[0, 1, :6] = place[0, 0, :6]  # the prompt they share
    separate = np.asarray(hidden_of(decoder_of(name, lora=SETTINGS), both, *place))
    shared = np.concatenate([place[:, 0], place[:, 1, 6:], place[:, 2]], axis=-1)[:, None]
    shared[2, 0] = [1] * 18 + [2] * 12
    shared[3, 0] = [0] * 6 + [1] * 6 + [2] * 6 + [0] * 12
    packed = np.asarray(hidden_of(decoder_of(name, lora=SETTINGS), both, *shared))[0]
    np.testing.assert_allclose(packed, np.concatenate([separate[0], separate[1, 6:], separate[2]]), **EXACT)


def test_activations_are_those_of_the_merged_model():
    name, both, place = 'llama', loud_pair('llama'), plain_rows('llama', 1, 8)

    def collect(decoder, params):
        return apply_collecting(decoder, params, *place, hidden_states=True, activations=True)[1]

    adapted = collect(decoder_of(name, lora=SETTINGS), both)
    plain = collect(decoder_of(name), merged(both, SETTINGS))
    jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), adapted, plain)


def test_a_mesh_splits_the_factors_by_width_and_changes_nothing():
    name, both = 'qwen3', loud_pair('qwen3')
    place = plain_rows(name, 8, 16)
    mesh = tiny_meshes.mesh(1, 8)
    shardings = sharding.parameter_shardings(both, mesh)
    for target, block in lora.BLOCKS.items():
        a, b = (shardings['layers'][block][f'{target}_lora_{factor}'].spec for factor in 'ab')
        reads_width = target not in ('output', 'down')
        factors = P(None, 'fsdp', None), P(None, None, 'tensor')
        assert (a, b) == (factors if reads_width else (P(None, 'tensor', None), P(None, None, 'fsdp')))
    rows = NamedSharding(mesh, sharding.ROWS)

    def step(decoder):
        def loss(adapter, base, *place):
            return jnp.mean(apply(decoder, lora.combined(base, adapter), *place) ** 2)

        return jax.jit(jax.value_and_grad(loss))

    base, adapter = lora.split(both)
    value, gradient = step(decoder_of(name, lora=SETTINGS))(adapter, base, *place)
    split_base, split_adapter = lora.split(jax.device_put(both, shardings))
    split_step = step(decoder_of(name, lora=SETTINGS, rows=rows))
    split_value, split_gradient = split_step(split_adapter, split_base, *jax.device_put(tuple(place), rows))
    assert float(split_value) == pytest.approx(float(value), rel=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), gradient, split_gradient)

    base_shardings, _ = lora.split(shardings)
    whole = merged(both, SETTINGS)
    parts = jax.jit(lora.merged, static_argnums=1, out_shardings=base_shardings)(
        jax.device_put(both, shardings), SETTINGS
    )
    assert parts['layers']['mlp']['down'].sharding.spec == P(None, 'tensor', 'fsdp')
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), parts, whole)


def test_base_and_adapter_are_disjoint_and_combine_to_the_whole():
    both = loud_pair('llama-bias')
    base, adapter = lora.split(both)
    assert jax.tree.map(jnp.shape, base) == jax.tree.map(
        jnp.shape, abstract_params(from_hugging_face(CONFIGS['llama-bias']))
    )
    assert flatten_dict(adapter).keys() == {path for target in ALL for path in lora.factor_paths(target)}
    assert len(jax.tree.leaves(base)) + len(jax.tree.leaves(adapter)) == len(jax.tree.leaves(both))
    jax.tree.map(np.testing.assert_array_equal, lora.combined(base, adapter), both)
    assert lora.combined(base, {}) == base and lora.split(base)[1] == {}
    with pytest.raises(InputError, match='both have the leaf layers/attention/key_lora_a'):
        lora.combined(both, adapter)


def test_the_abstract_adapter_is_the_adapter_and_what_the_decoder_asks_for():
    architecture = from_hugging_face(CONFIGS['qwen2'])
    for targets in (ALL, ('query', 'down')):
        settings = lora.Lora(5, 1.0, targets, 'b')
        abstract = lora.abstract_adapter(architecture, settings)
        fresh = lora.init_adapter(architecture, settings, jax.random.key(1))
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), fresh) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), abstract
        )
        place = jnp.zeros((1, 1), jnp.int32)
        made = jax.eval_shape(Decoder(architecture, lora=settings).init, jax.random.key(0), *(place,) * 4)['params']
        assert lora.split(made)[1] == abstract
        assert lora.split(made)[0] == abstract_params(architecture)


def test_merging_refuses_factors_that_are_missing_or_left_over():
    base, some = loud_params(CONFIGS['llama']), lora.Lora(3, 0.7, ('query', 'up'))
    adapter = loud_adapter('llama', some)
    both = lora.combined(base, adapter)
    with pytest.raises(InputError, match='lack layers/attention/key_lora_a'):
        lora.merged(both, SETTINGS)
    with pytest.raises(InputError, match='also have layers/mlp/up_lora_a'):
        lora.merged(both, lora.Lora(3, 0.7, ('query',)))


def test_a_config_says_which_adapters_there_are():
    assert lora.of(config.Lora()) is None
    assert lora.of(config.Lora(rank=8)) == lora.Lora(8, 2.0, ALL, 'a')
    some = lora.of(config.Lora(rank=4, alpha=1.0, targets=('up', 'query', 'up'), zero='b'))
    assert some == lora.Lora(4, 0.25, ('query', 'up'), 'b') and hash(some) is not None


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'rank': -1}, 'lora.rank .* not -1'),
        ({'rank': 2.5}, 'lora.rank .* not 2.5'),
        ({'rank': True}, 'lora.rank .* not True'),
        ({'alpha': 0.0}, 'lora.alpha .* not 0.0'),
        ({'alpha': float('nan')}, 'lora.alpha .* not nan'),
        ({'targets': ()}, 'lora.targets names no kernel'),
        ({'targets': ('query', 'outptu')}, "'outptu'. Did you mean 'output'"),
        ({'zero': 'c'}, "lora.zero 'c'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        lora.of(config.Lora(**{'rank': 4, **settings}))
