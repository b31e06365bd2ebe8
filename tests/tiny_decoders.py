"""Tiny configs of every family, as config.json has them, and numbers for their parameters, shared by tests."""

from typing import Any

import jax
import numpy as np

from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import abstract_params

_COMMON = {
    'vocab_size': 61,
    'hidden_size': 24,
    'intermediate_size': 40,
    'num_hidden_layers': 3,
    'num_attention_heads': 4,
    'num_key_value_heads': 2,
    'head_dim': 8,
    'hidden_act': 'silu',
    'max_position_embeddings': 128,
    'rms_norm_eps': 1e-5,
    'rope_theta': 1000.0,
    'tie_word_embeddings': False,
}
_WINDOWED = {'use_sliding_window': True, 'sliding_window': 5, 'max_window_layers': 1}
_GEMMA = {
    'hidden_activation': 'gelu_pytorch_tanh',
    'query_pre_attn_scalar': 11,
    'sliding_window': 5,
    'attn_logit_softcapping': 2.0,
    'final_logit_softcapping': 3.0,
}
_LLAMA3 = {
    'rope_type': 'llama3',
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 32,
}

CONFIGS: dict[str, dict[str, Any]] = {
    'llama': {**_COMMON, 'model_type': 'llama'},
    'llama-tied': {**_COMMON, 'model_type': 'llama', 'tie_word_embeddings': True},
    'llama-bias': {**_COMMON, 'model_type': 'llama', 'attention_bias': True},
    'llama3': {**_COMMON, 'model_type': 'llama', 'rope_scaling': _LLAMA3},
    'mistral': {**_COMMON, 'model_type': 'mistral', 'sliding_window': 5},
    'qwen2': {**_COMMON, 'model_type': 'qwen2', 'use_sliding_window': False, 'sliding_window': 5},
    'qwen2-windowed': {**_COMMON, 'model_type': 'qwen2', 'tie_word_embeddings': True, **_WINDOWED},
    'qwen3': {**_COMMON, 'model_type': 'qwen3', 'attention_bias': False},
    'qwen3-windowed': {**_COMMON, 'model_type': 'qwen3', 'attention_bias': True, **_WINDOWED},
    'gemma2': {**_COMMON, 'model_type': 'gemma2', 'tie_word_embeddings': True, **_GEMMA},
    'gemma2-untied': {
        **_COMMON,
        'model_type': 'gemma2',
        **_GEMMA,
        'layer_types': ['full_attention', 'sliding_attention', 'sliding_attention'],
    },
}


def loud_params(config: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Parameters of a config, large enough that attention is peaked and every norm and bias matters."""
    rng = np.random.default_rng(seed)
    shapes = abstract_params(from_hugging_face(config))

    def draw(shape: jax.ShapeDtypeStruct) -> jax.Array:
        return rng.normal(0.0, 0.35, shape.shape).astype(np.float32)

    return jax.tree.map(draw, shapes)


def tokens_of(config: dict[str, Any], *shape: int, seed: int = 1) -> np.ndarray:
    """Random token ids, int32."""
    return np.random.default_rng(seed).integers(0, config['vocab_size'], shape).astype(np.int32)
