"""What a decoder is built from, as data, and how a Hugging Face config.json says it.

Families differ only in the fields of `Architecture`; no other module asks for a family's name to compute.
"""

import dataclasses
from typing import Any

from jaxpo.errors import InputError, unknown

FAMILIES = ('gemma2', 'llama', 'mistral', 'qwen2', 'qwen3')
ACTIVATIONS = ('gelu_pytorch_tanh', 'silu')
LAYER_TYPES = ('full_attention', 'sliding_attention')


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3's stretch of the rotary wavelengths that are long against `original_max_positions` (tokens)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_max_positions: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shapes and choices of one decoder. Hashable, so it can be a static argument of jit."""

    family: str  # the config's model_type: names the checkpoint's keys, chooses no computation
    vocabulary: int  # V, rows of the embedding
    width: int  # D, of the residual stream
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    hidden: int  # F, of the gated MLP
    max_positions: int  # tokens
    norm_epsilon: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    windows: tuple[int | None, ...]  # per layer: a token sees this many positions, its own included; None all
    query_scale: float  # attention scores are multiplied by it
    attention_softcap: float | None  # scores become cap * tanh(scores / cap)
    final_softcap: float | None  # the same of the logits; applied with the head, not by the decoder
    embedding_scale: float
    activation: str  # of the MLP's gate: one of ACTIVATIONS
    query_key_norm: bool  # RMSNorm of each query and key head before the rotation
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    post_norms: bool  # RMSNorm of each block's output, besides that of its input
    norm_offset: float  # norms multiply by offset + weight: Gemma stores w and uses 1 + w
    tied: bool  # the head is the embedding
    padding: int = 0  # rows of zeros behind the embedding's and the head's V: no token's, and masked out of every sum


def padded(architecture: Architecture, multiple: int) -> Architecture:
    """The architecture with rows of zeros behind its vocabulary, so that `multiple` divides them all."""
    return dataclasses.replace(architecture, padding=-architecture.vocabulary % multiple)


def from_hugging_face(config: dict[str, Any]) -> Architecture:
    """The architecture a config.json describes, spelled as by transformers 4 or 5.

    Raises InputError, naming the key, where a key is missing or asks for what jaxpo does not compute.
    """
    family = _required(config, 'model_type')
    if family not in FAMILIES:
        raise unknown('model_type in config.json', str(family), FAMILIES)
    gemma = family == 'gemma2'
    _refuse(config, family)
    heads = _integer(config, 'num_attention_heads')
    head_dim = _head_dim(config, family, heads)
    layers = _integer(config, 'num_hidden_layers')
    width = _integer(config, 'hidden_size')
    attention_bias = family in ('llama', 'qwen3', 'gemma2') and bool(config.get('attention_bias'))
    rope_theta, rope_scaling = _rope(config, family)
    return Architecture(
        family=family,
        vocabulary=_integer(config, 'vocab_size'),
        width=width,
        layers=layers,
        heads=heads,
        key_value_heads=_key_value_heads(config, heads),
        head_dim=head_dim,
        hidden=_integer(config, 'intermediate_size'),
        max_positions=_integer(config, 'max_position_embeddings'),
        norm_epsilon=float(_required(config, 'rms_norm_eps')),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        windows=_windows(config, family, layers),
        query_scale=float(_required(config, 'query_pre_attn_scalar') if gemma else head_dim) ** -0.5,
        attention_softcap=_softcap(config, 'attn_logit_softcapping') if gemma else None,
        final_softcap=_softcap(config, 'final_logit_softcapping') if gemma else None,
        embedding_scale=width**0.5 if gemma else 1.0,
        activation=_activation(config, family),
        query_key_norm=family == 'qwen3',
        qkv_bias=family == 'qwen2' or attention_bias,
        output_bias=attention_bias,
        post_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        # transformers writes the key only where it is not the family's default.
        tied=bool(config.get('tie_word_embeddings', gemma)),
    )


def _required(config: dict[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise InputError(
            f'config.json has no {key!r}: is it the config of a decoder? Supported families: {", ".join(FAMILIES)}.'
        )
    return config[key]


def _integer(config: dict[str, Any], key: str) -> int:
    value = _required(config, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f'{key!r} in config.json must be a positive integer, not {value!r}.')
    return value


def _refuse(config: dict[str, Any], family: str) -> None:
    """InputError for a switch that changes the computation to one the decoder does not have."""
    switches = ['mlp_bias', 'use_bidirectional_attention'] + ['attention_bias'] * (family == 'mistral')
    for key in switches:
        if config.get(key):
            raise InputError(
                f'{key!r} in config.json is {config[key]!r}, which is not supported for model_type '
                f'{family!r}. Supported families: {", ".join(FAMILIES)}.'
            )


def _head_dim(config: dict[str, Any], family: str, heads: int) -> int:
    if config.get('head_dim') is not None or family in ('qwen3', 'gemma2'):
        head_dim = _integer(config, 'head_dim')
    else:
        width = _integer(config, 'hidden_size')
        if width % heads:
            raise InputError(f'hidden_size {width} in config.json is no multiple of num_attention_heads {heads}.')
        head_dim = width // heads
    if head_dim % 2:
        raise InputError(f'head_dim {head_dim} in config.json is odd: rotary embeddings turn pairs.')
    return head_dim


def _key_value_heads(config: dict[str, Any], heads: int) -> int:
    if config.get('num_key_value_heads') is None:
        return heads
    key_value_heads = _integer(config, 'num_key_value_heads')
    if heads % key_value_heads:
        raise InputError(
            f'num_attention_heads {heads} in config.json is no multiple of num_key_value_heads {key_value_heads}.'
        )
    return key_value_heads


def _activation(config: dict[str, Any], family: str) -> str:
    if family == 'gemma2':
        # Gemma's hidden_act may say 'gelu' and mean the tanh form; hidden_activation is what is computed.
        activation = config.get('hidden_activation') or 'gelu_pytorch_tanh'
    else:
        activation = _required(config, 'hidden_act')
    if activation not in ACTIVATIONS:
        raise unknown('activation in config.json', str(activation), ACTIVATIONS)
    return activation


def _softcap(config: dict[str, Any], key: str) -> float | None:
    """The cap, None where the config says null; absent is an error, for transformers' default is a cap."""
    if key not in config:
        _required(config, key)
    return None if config[key] is None else float(config[key])


def _rope(config: dict[str, Any], family: str) -> tuple[float, Llama3Scaling | None]:
    """Base and scaling of the rotary embeddings, from either spelling of the config."""
    parameters = {**(config.get('rope_scaling') or {}), **(config.get('rope_parameters') or {})}
    kind = parameters.get('rope_type', parameters.get('type', 'default'))
    theta = parameters.get('rope_theta', config.get('rope_theta'))
    theta = 10000.0 if theta is None else float(theta)  # the default of every supported family
    partial = parameters.get('partial_rotary_factor', config.get('partial_rotary_factor'))
    if partial not in (None, 1, 1.0):
        raise InputError(f"'partial_rotary_factor' {partial!r} in config.json is not supported, only 1.")
    if kind == 'default':
        return theta, None
    if kind != 'llama3':
        raise unknown(f'rope_type in config.json (model_type {family!r})', str(kind), ('default', 'llama3'))
    return theta, Llama3Scaling(
        factor=float(_required(parameters, 'factor')),
        low_frequency_factor=float(_required(parameters, 'low_freq_factor')),
        high_frequency_factor=float(_required(parameters, 'high_freq_factor')),
        original_max_positions=_integer(parameters, 'original_max_position_embeddings'),
    )


def _windows(config: dict[str, Any], family: str, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, in positions; None where a layer sees everything before it."""
    uses_window = family in ('mistral', 'gemma2') or bool(config.get('use_sliding_window'))
    if family == 'llama' or not uses_window or config.get('sliding_window') is None:
        return (None,) * layers
    window = _integer(config, 'sliding_window')
    return tuple(window if local else None for local in _local_layers(config, family, layers))


def _local_layers(config: dict[str, Any], family: str, layers: int) -> list[bool]:
    """Which layers have the sliding window, given that some may."""
    if family == 'mistral':
        return [True] * layers
    if config.get('layer_types') is None:
        if family == 'gemma2':
            return [layer % 2 == 0 for layer in range(layers)]
        return [layer >= int(_required(config, 'max_window_layers')) for layer in range(layers)]
    types = config['layer_types']
    if len(types) != layers:
        raise InputError(f"'layer_types' in config.json names {len(types)} layers of {layers}.")
    for name in types:
        if name not in LAYER_TYPES:
            raise unknown('layer type in config.json', str(name), LAYER_TYPES)
    return [name == 'sliding_attention' for name in types]
