"""What a decoder lets be read of its inside, against the same layers run one by one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_meshes
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_decoders import CONFIGS, loud_params, tokens_of

from jaxpo import sharding
from jaxpo.models.activations import apply_collecting
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.attention import Keys, attend, rotary, rotate, visible
from jaxpo.models.decoder import ACTIVATIONS, Decoder

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROWS, TOKENS = 8, 12
EXACT = {'atol': 2e-5, 'rtol': 2e-5}


def rows_of(config):
    """Rows of a prompt with two completions, then padding: `[R, T]` tokens, positions, segment, branch."""
    tokens = tokens_of(config, ROWS, TOKENS)
    place = np.zeros((3, ROWS, TOKENS), np.int32)
    place[:, :, :10] = np.array([[0, 1, 2, 3, 4, 5, 6, 4, 5, 6], [1] * 10, [0] * 4 + [1] * 3 + [2] * 3])[:, None]
    return tokens, *place


def recomputed(config, params, tokens, positions, segment, branch):
    """States behind each layer, and lists of activations `[R, T, ...]` by kind, written out layer by layer."""
    architecture = from_hugging_face(config)
    epsilon, offset = architecture.norm_epsilon, architecture.norm_offset

    def norm(values, weight):
        return (
            values
            / jnp.sqrt(jnp.mean(values**2, axis=-1, keepdims=True) + epsilon)
            * (offset + jnp.broadcast_to(weight, values.shape))
        )

    def projected(weights, name, values):
        bias = weights.get(f'{name}_bias', np.zeros(1, np.float32))
        return values @ weights[name] + bias.reshape(1, 1, -1)

    def heads(weights, name, values):
        return projected(weights, name, values).reshape(ROWS, TOKENS, -1, architecture.head_dim)

    place = (positions, segment, branch)
    angles = rotary(architecture, positions)
    hidden = params['embedding'][tokens] * architecture.embedding_scale
    states, kept = [], {'residual': [hidden], 'attention': [], 'mlp': []}
    for at in range(architecture.layers):
        layer = jax.tree.map(lambda leaf: leaf[at], params['layers'])  # noqa: B023
        attention, mlp = layer['attention'], layer['mlp']
        distance = positions[:, :, None] - positions[:, None, :]
        mask = visible(place, place) & (distance < (architecture.windows[at] or 10**6))

        normed = norm(hidden, layer['attention_norm'])
        query, key, value = (heads(attention, name, normed) for name in ('query', 'key', 'value'))
        kept['attention'] += [query, key, value]
        if architecture.query_key_norm:
            query, key = norm(query, attention['query_norm']), norm(key, attention['key_norm'])
        query, key = rotate(query, *angles), rotate(key, *angles)
        softcap = architecture.attention_softcap
        mixed = attend(query, [Keys(key, value, mask)], scale=architecture.query_scale, softcap=softcap)
        kept['attention'] += [query, key, mixed]
        update = projected(attention, 'output', mixed)
        if architecture.post_norms:
            update = norm(update, layer['attention_post_norm'])
        kept['residual'] += [hidden, normed, update, hidden + update]
        hidden = hidden + update

        normed = norm(hidden, layer['mlp_norm'])
        active = ACTIVATIONS[architecture.activation](normed @ mlp['gate']) * (normed @ mlp['up'])
        kept['mlp'].append(active)
        update = active @ mlp['down']
        if architecture.post_norms:
            update = norm(update, layer['mlp_post_norm'])
        hidden = hidden + update
        kept['residual'] += [normed, update, hidden]
        states.append(hidden)
    final = norm(hidden, params['final_norm'])
    kept['residual'].append(final)
    return final, states, kept


def in_any_order(means):
    """[N, R, T] sorted by what stands in the first row: activations of a kind have no order of meaning."""
    means = np.asarray(means)
    return means[np.lexsort(np.round(means[:, 0, :2], 4).T)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def collected(decoder, asked, params, *rows):
    return apply_collecting(decoder, params, *rows, **dict(asked))


BOTH = (('hidden_states', True), ('activations', True))


@pytest.mark.parametrize('remat', ['none', 'full'])
@pytest.mark.parametrize('name', ['llama', 'qwen3-windowed', 'gemma2'])
def test_collected_are_those_of_layers_run_one_by_one(name, remat):
    config, params = CONFIGS[name], loud_params(CONFIGS[name])
    decoder, rows = Decoder(from_hugging_face(config), remat=remat), rows_of(config)
    hidden, result = collected(decoder, BOTH, params, *rows)
    final, states, kept = recomputed(config, params, *rows)
    np.testing.assert_allclose(hidden, final, **EXACT)
    np.testing.assert_allclose(hidden, decoder.apply({'params': params}, *rows), **EXACT)
    np.testing.assert_allclose(result.hidden_states, np.stack(states), **EXACT)
    assert {kind: len(means) for kind, means in result.activations.items()} == {
        'attention': 18,
        'mlp': 3,
        'residual': 23,
    }
    for kind, means in result.activations.items():
        theirs = [np.asarray(values).reshape(ROWS, TOKENS, -1).mean(-1) for values in kept[kind]]
        assert means.dtype == jnp.float32
        np.testing.assert_allclose(in_any_order(means), in_any_order(theirs), **EXACT)


@pytest.mark.parametrize('states, activations', [(True, False), (False, True), (False, False)])
def test_only_what_is_asked_for_is_collected(states, activations):
    config, params = CONFIGS['llama'], loud_params(CONFIGS['llama'])
    decoder, rows = Decoder(from_hugging_face(config)), rows_of(config)
    asked = (('hidden_states', states), ('activations', activations))
    hidden, result = collected(decoder, asked, params, *rows)
    np.testing.assert_allclose(hidden, decoder.apply({'params': params}, *rows), **EXACT)
    assert (result.hidden_states is not None, bool(result.activations)) == (states, activations)


def test_a_call_that_does_not_ask_computes_no_means():
    """Sums of the plain call: of three norms, and of a softmax for each of two heads that share a key."""
    config = CONFIGS['llama']
    decoder, params, rows = Decoder(from_hugging_face(config)), loud_params(config), rows_of(config)
    neither = {'hidden_states': False, 'activations': False}
    plain = jax.make_jaxpr(lambda p: decoder.apply({'params': p}, *rows))(params)
    unasked = jax.make_jaxpr(lambda p: apply_collecting(decoder, p, *rows, **neither)[0])(params)
    asked = jax.make_jaxpr(lambda p: apply_collecting(decoder, p, *rows, **dict(BOTH)))(params)
    assert count(plain.jaxpr, 'reduce_sum') == count(unasked.jaxpr, 'reduce_sum') == 5
    assert count(asked.jaxpr, 'reduce_sum') == 5 + 14 + 2


def count(jaxpr, primitive):
    """How often a primitive stands in a jaxpr and in those inside it."""
    inner = [sub for equation in jaxpr.eqns for sub in jaxprs_in_params(equation.params)]
    return sum(e.primitive.name == primitive for e in jaxpr.eqns) + sum(count(sub, primitive) for sub in inner)


def test_nothing_collected_is_differentiated():
    config, params = CONFIGS['llama'], loud_params(CONFIGS['llama'])
    decoder, rows = Decoder(from_hugging_face(config)), rows_of(config)

    def total(params):
        return sum(leaf.sum() for leaf in jax.tree.leaves(apply_collecting(decoder, params, *rows, **dict(BOTH))))

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(params)))


def test_means_of_bfloat16_activations_are_float32():
    """A mean may be of activations before they are rounded to bfloat16 (2^-8 relative), as XLA sees fit."""
    config, params = CONFIGS['llama'], loud_params(CONFIGS['llama'])
    decoder = Decoder(from_hugging_face(config), dtype=jnp.bfloat16)
    _, result = collected(decoder, BOTH, params, *rows_of(config))
    assert result.hidden_states.dtype == jnp.bfloat16
    assert {means.dtype for means in result.activations.values()} == {jnp.dtype(jnp.float32)}
    last = np.asarray(result.hidden_states[-1], np.float32)
    away = np.abs(np.asarray(result.activations['residual']) - last.mean(-1)) / np.abs(last).mean(-1)
    assert away.max(axis=(1, 2)).min() < 2**-8


@pytest.mark.parametrize('name', ['llama', 'gemma2'])
def test_a_mesh_changes_nothing_collected_and_keeps_rows_apart(name):
    config, params = CONFIGS[name], loud_params(CONFIGS[name])
    mesh = tiny_meshes.mesh(2, 4)
    rows = NamedSharding(mesh, sharding.ROWS)
    whole = collected(Decoder(from_hugging_face(config)), BOTH, params, *rows_of(config))
    split = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, by_width(leaf))), params)
    arrays = jax.device_put(rows_of(config), rows)
    ours = collected(Decoder(from_hugging_face(config), rows=rows), BOTH, split, *arrays)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), ours, whole)
    for leaf in jax.tree.leaves(ours[1]):
        assert {shard.data.shape[1] for shard in leaf.addressable_shards} == {1}


def by_width(leaf):
    """Splits the first axis of size 24, the width, of matrices."""
    if leaf.ndim < 3 and leaf.shape != (61, 24):
        return P()
    return P(*('fsdp' if axis == leaf.shape.index(24) else None for axis in range(leaf.ndim)))
