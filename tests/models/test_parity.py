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
from jaxpo.models.decoder import Decoder, head_weight

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
