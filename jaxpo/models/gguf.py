"""Llama models in GGUF files: config, tensors and tokenizer under their Hugging Face names.

A quantised file is a lossy copy, and the display name says so. Blocks are dequantised as they are read.
"""

import functools
import pathlib
import re
from typing import Any

import numpy as np
import tokenizers
import transformers

from jaxpo.errors import InputError, unknown
from jaxpo.models.safetensors_files import Tensors

try:
    import gguf
except ImportError:  # an optional extra; `open_file` says how to get it
    gguf = None

ARCHITECTURES = ('llama',)
PRE_TOKENIZERS = ('smollm',)
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
TENSOR_NAMES = {
    'token_embd.weight': 'model.embed_tokens.weight',
    'output_norm.weight': 'model.norm.weight',
    'output.weight': 'lm_head.weight',
}
LAYER_NAMES = {
    'attn_norm': 'input_layernorm',
    'attn_q': 'self_attn.q_proj',
    'attn_k': 'self_attn.k_proj',
    'attn_v': 'self_attn.v_proj',
    'attn_output': 'self_attn.o_proj',
    'ffn_norm': 'post_attention_layernorm',
    'ffn_gate': 'mlp.gate_proj',
    'ffn_up': 'mlp.up_proj',
    'ffn_down': 'mlp.down_proj',
}


def open_file(path: pathlib.Path) -> Any:
    """A gguf.GGUFReader of the file, memory-mapped."""
    if gguf is None:
        raise InputError(f"{path} needs the gguf package: pip install 'jaxpo[gguf]'.")
    return _reader(path.resolve(), path.stat().st_mtime_ns, path.stat().st_size)


@functools.lru_cache(maxsize=2)
def _reader(path: pathlib.Path, modified: int, size: int) -> Any:
    # Parsing the vocabulary takes seconds, and policy and reference are often one file.
    try:
        return gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise InputError(f'{path} is not a whole GGUF file: {error}') from None


def metadata(reader: Any, key: str, default: Any = None) -> Any:
    """Value of a metadata key, as Python numbers, strings and lists."""
    field = reader.get_field(key)
    return default if field is None else field.contents()


def display_name(reader: Any, path: pathlib.Path) -> str:
    """The file's name, with the format most of its weights are in: 'SmolLM2-135M-Instruct (Q4_1)'."""
    sizes: dict[str, int] = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        sizes[kind] = sizes.get(kind, 0) + tensor.n_elements
    kind = max(sizes, key=sizes.__getitem__)
    return f'{re.sub(rf"[.-]{kind}$", "", path.stem, flags=re.IGNORECASE)} ({kind})'


def hugging_face_config(reader: Any, path: pathlib.Path) -> dict[str, Any]:
    """The config.json of a GGUF file."""
    family = metadata(reader, 'general.architecture')
    if family not in ARCHITECTURES:
        raise unknown(f'GGUF architecture in {path}', str(family), ARCHITECTURES)

    def required(key: str) -> Any:
        value = metadata(reader, f'{family}.{key}')
        if value is None:
            raise InputError(f'{path} has no metadata {family}.{key}.')
        return value

    heads, width = required('attention.head_count'), required('embedding_length')
    head_dim = metadata(reader, 'llama.attention.key_length', width // heads)
    _refuse(reader, path, head_dim)
    theta = _shortest(metadata(reader, 'llama.rope.freq_base', 10000.0))
    names = {tensor.name for tensor in reader.tensors}
    config = {
        'architectures': ['LlamaForCausalLM'],
        'model_type': 'llama',
        'vocab_size': _vocabulary_size(reader, path),
        'hidden_size': width,
        'intermediate_size': required('feed_forward_length'),
        'num_hidden_layers': required('block_count'),
        'num_attention_heads': heads,
        'num_key_value_heads': metadata(reader, 'llama.attention.head_count_kv', heads),
        'head_dim': head_dim,
        'hidden_act': 'silu',
        'max_position_embeddings': required('context_length'),
        'rms_norm_eps': _shortest(required('attention.layer_norm_rms_epsilon')),
        'rope_theta': theta,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': theta},
        'attention_bias': 'blk.0.attn_q.bias' in names,
        'mlp_bias': False,
        'tie_word_embeddings': 'output.weight' not in names,
        'dtype': 'float32',
    }
    for key, kind in (('bos', 'bos'), ('eos', 'eos'), ('pad', 'padding')):
        config[f'{key}_token_id'] = metadata(reader, f'tokenizer.ggml.{kind}_token_id')
    return config


def _vocabulary_size(reader: Any, path: pathlib.Path) -> int:
    field = reader.get_field('tokenizer.ggml.tokens')
    if field is None:
        raise InputError(f'{path} has no metadata tokenizer.ggml.tokens.')
    return len(field.data)


def _shortest(value: float) -> float:
    """A stored float32 as the decimal it was written as: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _refuse(reader: Any, path: pathlib.Path, head_dim: int) -> None:
    """InputError for what a llama GGUF may ask for and the Llama decoder does not compute."""
    if metadata(reader, 'llama.rope.scaling.type', 'none') != 'none':
        raise InputError(f'{path} scales its rotary embeddings (llama.rope.scaling.type), which is not supported.')
    if metadata(reader, 'llama.rope.dimension_count', head_dim) != head_dim:
        raise InputError(f'{path} rotates only part of each head (llama.rope.dimension_count), not supported.')
    for key in ('llama.expert_count', 'llama.attention.sliding_window'):
        if metadata(reader, key):
            raise InputError(f'{path} has {key} {metadata(reader, key)}, which is not supported.')


def tensors(reader: Any, config: dict[str, Any], path: pathlib.Path) -> Tensors:
    """The tensors of a GGUF file under Hugging Face names, dequantised to float32 as they are read."""
    heads = {'attn_q': config['num_attention_heads'], 'attn_k': config['num_key_value_heads']}
    shapes, sources = {}, {}
    for tensor in reader.tensors:
        _check_type(tensor, path)
        name, part = _hugging_face_name(tensor.name)
        shapes[name] = tuple(int(size) for size in reversed(tensor.shape))
        rows = _uninterleaved(shapes[name][0], heads[part], path) if part in heads else None
        sources[name] = tensor, rows

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor, rows = sources[name]
        return _dequantise(tensor, rows, shapes[name], index)

    return Tensors(shapes, 'float32', read, (path,))


def _hugging_face_name(name: str) -> tuple[str, str]:
    """The Hugging Face name of a GGUF tensor, its own where it has none, and its part of a layer."""
    match = re.fullmatch(r'blk\.(\d+)\.(\w+)\.(weight|bias)', name)
    if match and match[2] in LAYER_NAMES:
        return f'model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}', match[2]
    return TENSOR_NAMES.get(name, name), ''


def _check_type(tensor: Any, path: pathlib.Path) -> None:
    _, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        raise InputError(
            f'{tensor.name} in {path} is {tensor.tensor_type.name}, which the gguf package cannot dequantise.'
        ) from None


def _uninterleaved(rows: int, heads: int, path: pathlib.Path) -> np.ndarray:
    """The GGUF row of each Hugging Face row of q_proj or k_proj, int [rows].

    llama.cpp rotates neighbouring rows of a head, Hugging Face rotates row i with row i + head_dim / 2.
    """
    if rows % (2 * heads):
        raise InputError(f'{path} has {rows} query or key rows for {heads} heads.')
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _dequantise(tensor: Any, rows: np.ndarray | None, shape: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """float32 values of a slice of a tensor; only the blocks that overlap it are dequantised.

    Quantised blocks lie along the last axis, so any set of rows can be read, and columns by whole blocks.
    """
    elements, block_bytes = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    start, stop, _ = index[-1].indices(shape[-1])
    first, last = start // elements, -(-stop // elements)
    units = block_bytes if tensor.data.dtype == np.uint8 else 1  # stored as bytes, or as one number an element
    data = tensor.data
    if len(shape) == 2:
        data = data[index[0]] if rows is None else data[rows[index[0]]]
    elif rows is not None:
        data = data[rows]
    data = np.ascontiguousarray(data[..., first * units : last * units])
    values = gguf.dequantize(data, tensor.tensor_type)
    return np.asarray(values[..., start - first * elements : stop - first * elements], np.float32)


def _strings(reader: Any, path: pathlib.Path, key: str) -> list[str]:
    value = metadata(reader, key)
    if not isinstance(value, list) or not value:
        raise InputError(f'{path} has no metadata {key}.')
    return value


def tokenizer(reader: Any, path: pathlib.Path) -> transformers.PreTrainedTokenizerFast:
    """The tokenizer a GGUF file describes: byte-level BPE only, of the kinds in PRE_TOKENIZERS."""
    check_tokenizer(reader, path)
    tokens = _strings(reader, path, 'tokenizer.ggml.tokens')
    backend = _byte_level_bpe(tokens, _strings(reader, path, 'tokenizer.ggml.merges'))
    for content, kind in zip(tokens, _strings(reader, path, 'tokenizer.ggml.token_type'), strict=True):
        if kind in (CONTROL, USER_DEFINED):
            added = tokenizers.AddedToken(content, special=kind == CONTROL, normalized=False)
            backend.add_special_tokens([added]) if added.special else backend.add_tokens([added])

    def named(kind: str) -> str | None:
        place = metadata(reader, f'tokenizer.ggml.{kind}_token_id')
        return None if place is None else tokens[place]

    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=named('bos'),
        eos_token=named('eos'),
        unk_token=named('unknown'),
        pad_token=named('padding'),
        chat_template=metadata(reader, 'tokenizer.chat_template'),
        model_max_length=metadata(reader, 'llama.context_length'),
        clean_up_tokenization_spaces=False,
    )


def check_tokenizer(reader: Any, path: pathlib.Path) -> None:
    """Raises InputError where the file's tokenizer is of a kind jaxpo cannot build."""
    kind, pre = metadata(reader, 'tokenizer.ggml.model'), metadata(reader, 'tokenizer.ggml.pre')
    if kind != 'gpt2' or pre not in PRE_TOKENIZERS:
        raise InputError(
            f'{path} has a tokenizer of model {kind!r}, pre-tokenizer {pre!r}; supported: gpt2 with '
            f'{", ".join(PRE_TOKENIZERS)}. Set model.tokenizer to the directory or hub id of its Hugging Face original.'
        )
    if metadata(reader, 'tokenizer.ggml.add_bos_token', False):
        raise InputError(f'{path} asks for a first token before every text (add_bos_token), which is not supported.')


def _byte_level_bpe(tokens: list[str], merges: list[str]) -> tokenizers.Tokenizer:
    pairs = [tuple(merge.split(' ')) for merge in merges]
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=pairs)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend
