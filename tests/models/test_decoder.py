"""The decoder's layouts, modes and caches all say the same as plain rows; and what a config.json may say."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_meshes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_decoders import CONFIGS, loud_params, tokens_of

from jaxpo.errors import InputError
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.attention import visible
from jaxpo.models.cache import empty_cache
from jaxpo.models.decoder import Decoder, abstract_params, head_weight, init_params
from jaxpo.sharding import ROWS

pytestmark = pytest.mark.usefixtures('compiled_quickly')

# Together: rotary scaling, a window everywhere or in some layers, normed queries, biases, post-norms, soft-caps.
FAMILIES = ('llama3', 'qwen3-windowed', 'gemma2')
EXACT = {'atol': 2e-5, 'rtol': 2e-5}


def decoder_of(name, **options):
    return Decoder(from_hugging_face(CONFIGS[name]), **options)


@functools.partial(jax.jit, static_argnums=0)
def hidden_of(decoder, params, *place):
    return decoder.apply({'params': params}, *place)


def row(*parts, length):
    """One row [1, length] from (tokens, first position, segment, branch) runs; the rest is padding."""
    place = np.zeros((4, 1, length), np.int32)
    at = 0
    for tokens, first, segment, branch in parts:
        end = at + len(tokens)
        place[:2, 0, at:end] = tokens, np.arange(first, first + len(tokens))
        place[2:, 0, at:end] = [[segment], [branch]]
        at = end
    return place


@pytest.mark.parametrize('name', FAMILIES)
def test_packed_and_shared_rows_equal_separate_rows(name):
    decoder, params = decoder_of(name), loud_params(CONFIGS[name])
    prompt, chosen, rejected, other = (tokens_of(CONFIGS[name], n, seed=n) for n in (9, 7, 8, 12))
    first, second = np.concatenate([prompt, chosen]), np.concatenate([prompt, rejected])
    rows = np.concatenate(
        [
            row((first, 0, 1, 0), length=40),
            row((second, 0, 1, 0), length=40),
            row((other, 0, 1, 0), length=40),
            row((other, 0, 1, 0), (first, 0, 2, 0), length=40),
            row((prompt, 0, 1, 0), (chosen, 9, 1, 1), (rejected, 9, 1, 2), (other, 0, 2, 0), length=40),
        ],
        axis=1,
    )
    whole_first, whole_second, whole_other, packed, shared = np.asarray(hidden_of(decoder, params, *rows))
    np.testing.assert_allclose(packed[:12], whole_other[:12], **EXACT)
    np.testing.assert_allclose(packed[12:28], whole_first[:16], **EXACT)
    np.testing.assert_allclose(shared[:16], whole_first[:16], **EXACT)
    np.testing.assert_allclose(shared[16:24], whole_second[9:17], **EXACT)
    np.testing.assert_allclose(shared[24:36], whole_other[:12], **EXACT)


def test_visible_is_the_rule_of_the_batch():
    query, key = (np.random.default_rng(at).integers(0, 3, (3, 2, 6)) for at in range(2))
    mask = np.asarray(visible(query, key))
    for at, i, j in np.ndindex(2, 6, 6):
        (position, segment, branch), (other_position, other_segment, other_branch) = query[:, at, i], key[:, at, j]
        together = segment == other_segment and segment > 0 and other_branch in (0, branch)
        assert mask[at, i, j] == (together and other_position <= position)


def test_later_tokens_have_no_say():
    name = 'llama'
    tokens = tokens_of(CONFIGS[name], 20)
    changed = tokens.copy()
    changed[10:] = (changed[10:] + 1) % 61
    rows = np.concatenate([row((t, 0, 1, 0), length=20) for t in (tokens, changed)], axis=1)
    before, after = np.asarray(hidden_of(decoder_of(name), loud_params(CONFIGS[name]), *rows))
    np.testing.assert_array_equal(before[:10], after[:10])
    assert np.all(np.abs(before[10:] - after[10:]).max(axis=-1) > 1e-2)


def test_padding_has_no_say_and_no_nan():
    """Whatever padding holds, values and gradients of the real tokens stay; a row of padding alone is finite."""
    name = 'gemma2'
    decoder, params = decoder_of(name), loud_params(CONFIGS[name])
    tokens = tokens_of(CONFIGS[name], 8)
    clean = np.concatenate([row((tokens, 0, 1, 0), length=16), row(length=16)], axis=1)
    dirty = clean.copy()
    dirty[:, 0, 8:] = [[5], [3], [0], [2]]
    dirty[:, 1] = [[9], [1], [0], [1]]

    @jax.jit
    def loss_and_gradient(params, place):
        def loss(params):
            hidden = decoder.apply({'params': params}, *place)
            return jnp.sum(jnp.where(clean[2, :, :, None] > 0, hidden, 0.0) ** 3), hidden

        return jax.value_and_grad(loss, has_aux=True)(params)

    (value, hidden), gradient = loss_and_gradient(params, clean)
    (dirty_value, dirty_hidden), dirty_gradient = loss_and_gradient(params, dirty)
    assert float(value) == pytest.approx(float(dirty_value), rel=1e-6)
    assert np.all(np.isfinite(hidden)) and np.all(np.isfinite(dirty_hidden))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient, dirty_gradient)


def test_remat_changes_nothing_but_memory():
    name = 'gemma2'
    params = loud_params(CONFIGS[name])
    place = row((tokens_of(CONFIGS[name], 24), 0, 1, 0), length=32)

    def evaluate(remat):
        decoder = decoder_of(name, remat=remat)
        step = jax.jit(jax.value_and_grad(lambda p: jnp.mean(decoder.apply({'params': p}, *place) ** 2)))
        compiled = step.lower(params).compile()
        return compiled(params), compiled.memory_analysis().temp_size_in_bytes

    (value, gradient), bytes_none = evaluate('none')
    for remat in ('dots', 'full'):
        (other, other_gradient), bytes_remat = evaluate(remat)
        assert float(other) == pytest.approx(float(value), rel=1e-6)
        jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), gradient, other_gradient)
        assert bytes_remat < bytes_none
    with pytest.raises(InputError, match="Did you mean 'full'"):
        hidden_of(decoder_of(name, remat='ful'), params, *place)


def test_a_mesh_splits_the_work_and_changes_nothing():
    """Parameters split by width, one row a device: no device ever holds the hidden states of another's row."""
    name = 'llama'
    params = loud_params(CONFIGS[name])
    place = row((tokens_of(CONFIGS[name], 11), 0, 1, 0), length=16) + np.zeros((1, 8, 1), np.int32)
    place[0] = tokens_of(CONFIGS[name], 8, 16)
    mesh = tiny_meshes.mesh(2, 4)
    rows = NamedSharding(mesh, ROWS)

    def step(decoder):
        return jax.jit(jax.value_and_grad(lambda p, *x: jnp.mean(decoder.apply({'params': p}, *x) ** 2)))

    value, gradient = step(decoder_of(name))(params, *place)
    split = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, _by_width(leaf))), params)
    arguments = (split, *jax.device_put(tuple(place), rows))
    compiled = step(decoder_of(name, rows=rows)).lower(*arguments).compile()
    split_value, split_gradient = compiled(*arguments)
    assert float(split_value) == pytest.approx(float(value), rel=1e-6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), gradient, split_gradient)
    assert 'f32[1,16,24]' in compiled.as_text()
    for others_too in ('f32[8,16,6]', 'f32[8,16,24]', 'f32[4,16,24]', 'f32[8,16,40]', 'f32[4,16,40]'):
        assert others_too not in compiled.as_text()


def _by_width(leaf):
    """Splits the first axis of size 24, the width, of matrices."""
    if leaf.ndim < 3 and leaf.shape != (61, 24):
        return P()
    return P(*('fsdp' if axis == leaf.shape.index(24) else None for axis in range(leaf.ndim)))


@pytest.mark.parametrize('name', ['llama3', 'gemma2'])
def test_bfloat16_is_near_float32(name):
    """Kernels as small as those of trained models; the loud ones amplify rounding as no trained model does."""
    offset = from_hugging_face(CONFIGS[name]).norm_offset
    params = jax.tree.map_with_path(
        lambda path, leaf: leaf * 0.2 + (1 - offset if 'norm' in path[-1].key else 0), loud_params(CONFIGS[name])
    )
    place = row((tokens_of(CONFIGS[name], 24), 0, 1, 0), length=24)
    exact = hidden_of(decoder_of(name), params, *place)
    rounded = hidden_of(decoder_of(name, dtype=jnp.bfloat16), params, *place)
    assert rounded.dtype == jnp.bfloat16
    assert 0.5 < np.std(exact) < 2
    np.testing.assert_allclose(rounded.astype(jnp.float32), exact, atol=0.1)


@pytest.mark.parametrize('name', ['qwen3-windowed', 'gemma2'])
def test_cache_equals_full_forward(name):
    """Right-aligned prompts of 4 and 12 tokens in one batch, read in two equal pieces, then token by token."""
    decoder, params = decoder_of(name), loud_params(CONFIGS[name])
    sequences = [tokens_of(CONFIGS[name], n, seed=n) for n in (12, 20)]
    full = [np.asarray(hidden_of(decoder, params, *row((s, 0, 1, 0), length=20)))[0] for s in sequences]
    place = np.zeros((4, 2, 20), np.int32)
    for at, sequence in enumerate(sequences):
        place[:, at, 20 - len(sequence) :] = row((sequence, 0, 1, 0), length=len(sequence))[:, 0]
    cache = empty_cache(decoder.architecture, 2, 23, jnp.float32)
    pieces = []
    for start, end in [(0, 6), (6, 12)] + [(at, at + 1) for at in range(12, 20)]:
        hidden, cache = hidden_of(decoder, params, *place[:, :, start:end], cache)
        pieces.append(hidden)
    cached = np.concatenate(pieces, axis=1)
    assert int(cache.used) == 20
    np.testing.assert_allclose(cached[0, 8:], full[0][:12], **EXACT)
    np.testing.assert_allclose(cached[1], full[1], **EXACT)


def test_window_counts_positions_and_the_token_itself():
    """Changing a token moves the one layer's hidden states of the next `window` positions, its own included."""
    config = {**CONFIGS['mistral'], 'num_hidden_layers': 1}
    decoder, params = Decoder(from_hugging_face(config)), loud_params(config)
    tokens = tokens_of(config, 20)
    changed = tokens.copy()
    changed[6] = (changed[6] + 1) % 61
    before, after = (
        np.asarray(hidden_of(decoder, params, *row((t, 0, 1, 0), length=20)))[0] for t in (tokens, changed)
    )
    moved = np.flatnonzero(np.abs(before - after).max(axis=-1) > 1e-6)
    assert moved.tolist() == [6, 7, 8, 9, 10]


@pytest.mark.parametrize('name', CONFIGS)
def test_parameter_tree(name):
    architecture = from_hugging_face(CONFIGS[name])
    config = CONFIGS[name]
    attention = {'query': (3, 24, 32), 'key': (3, 24, 16), 'value': (3, 24, 16), 'output': (3, 32, 24)}
    bias = bool(config.get('attention_bias'))
    if bias or config['model_type'] == 'qwen2':
        attention |= {'query_bias': (3, 32), 'key_bias': (3, 16), 'value_bias': (3, 16)}
    if bias:
        attention |= {'output_bias': (3, 24)}
    if config['model_type'] == 'qwen3':
        attention |= {'query_norm': (3, 8), 'key_norm': (3, 8)}
    layers = {
        'attention': attention,
        'mlp': {'gate': (3, 24, 40), 'up': (3, 24, 40), 'down': (3, 40, 24)},
        'attention_norm': (3, 24),
        'mlp_norm': (3, 24),
    }
    if config['model_type'] == 'gemma2':
        layers |= {'attention_post_norm': (3, 24), 'mlp_post_norm': (3, 24)}
    expected = {'embedding': (61, 24), 'layers': layers, 'final_norm': (24,)}
    if not config['tie_word_embeddings']:
        expected['head'] = (61, 24)
    shapes = abstract_params(architecture)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}


def test_initial_parameters():
    params = init_params(from_hugging_face(CONFIGS['gemma2-untied']), jax.random.key(0))
    assert head_weight(params) is params['head']
    assert np.std(params['head']) == pytest.approx(0.02, rel=0.1)
    assert np.std(params['layers']['mlp']['up']) == pytest.approx(0.02, rel=0.1)
    assert not np.array_equal(*params['layers']['mlp']['up'][:2])
    assert not np.any(params['final_norm']) and not np.any(params['layers']['mlp_post_norm'])


def test_the_head_of_a_tied_model_is_its_embedding():
    params = loud_params(CONFIGS['llama-tied'])
    assert head_weight(params) is params['embedding']


def test_a_token_outside_the_vocabulary_is_loud():
    place = row((np.array([1, 61, 2]), 0, 1, 0), length=20)
    hidden = np.asarray(hidden_of(decoder_of('llama'), loud_params(CONFIGS['llama']), *place))[0]
    assert np.isnan(hidden).all()
