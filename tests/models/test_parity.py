"""Logits of every family equal those of transformers: live where torch is installed, and from a committed file."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoders import CONFIGS, loud_params, tokens_of

from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.checkpoint import load_params
from jaxpo.models.decoder import Decoder, abstract_params, head_weight
from jaxpo.models.source import open_model

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'decoder_logits.json').read_text())
TOLERANCE = 1e-4


@functools.cache
def jaxpo_logits(name):
    """Float32 logits [1, 40, V] of one plain row."""
    config = CONFIGS[name]
    architecture = from_hugging_face(config)
    tokens = tokens_of(config, 1, 40)
    positions = np.arange(40, dtype=np.int32)[None]
    ones = np.ones_like(tokens)

    @jax.jit
    def logits(params):
        hidden = Decoder(architecture).apply({'params': params}, tokens, positions, ones, 0 * ones)
        logits = jnp.einsum('rtd,vd->rtv', hidden, head_weight(params))
        cap = architecture.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    return np.asarray(logits(loud_params(config)))


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_equal_those_of_transformers(name):
    pytest.importorskip('torch', reason='parity with transformers needs torch')
    from golden import make_decoder_golden

    config = CONFIGS[name]
    theirs = make_decoder_golden.torch_logits(config, loud_params(config), tokens_of(config, 1, 40))
    assert np.std(theirs) > 0.2  # far above the tolerance
    np.testing.assert_allclose(jaxpo_logits(name), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_equal_the_committed_ones(name):
    golden = GOLDEN['models'][name]
    assert golden['config'] == CONFIGS[name] and golden['tokens'] == tokens_of(CONFIGS[name], 1, 40).tolist()
    np.testing.assert_allclose(jaxpo_logits(name)[:, golden['at']], golden['logits'], atol=TOLERANCE, rtol=0)


def test_a_trained_model_knows_its_language():
    """stories260k finds a story of its own kind likely, and the same words backwards not."""
    directory = pathlib.Path(__file__).resolve().parents[2] / '../shared/models/stories260k'
    if not directory.exists():
        pytest.skip('needs the model stories260k in ../shared')
    pretrained = open_model(str(directory))
    placement = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = load_params(pretrained, jax.tree.map(lambda _: placement, abstract_params(pretrained.architecture)))
    text = 'Once upon a time, there was a little girl named Lily. She loved to play outside in the park.'
    story = np.asarray(pretrained.load_tokenizer()(text, add_special_tokens=False)['input_ids'], np.int32)
    tokens = np.stack([np.r_[1, story], np.r_[1, story[::-1]]]).astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    ones = np.ones_like(tokens)
    hidden = Decoder(pretrained.architecture).apply({'params': params}, tokens, positions, ones, 0 * ones)
    logps = jax.nn.log_softmax(hidden @ head_weight(params).T)[:, :-1]
    forward, backward = -np.take_along_axis(np.asarray(logps), tokens[:, 1:, None], axis=-1).mean(axis=(1, 2))
    assert forward < 1.0 < 5.0 < backward
