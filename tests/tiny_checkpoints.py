"""Tiny Hugging Face directories. Names and shapes are written out here, apart from the readers' own table."""

import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from transformers import PreTrainedTokenizerFast

from jaxpo.models import families

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'


def hugging_face_shapes(config):
    """Name -> shape of every tensor transformers saves for a config of tiny_decoders."""
    family, width, head = config['model_type'], config['hidden_size'], config['head_dim']
    query, key = config['num_attention_heads'] * head, config['num_key_value_heads'] * head
    vocabulary, hidden = config['vocab_size'], config['intermediate_size']
    layer = {
        'self_attn.q_proj.weight': (query, width),
        'self_attn.k_proj.weight': (key, width),
        'self_attn.v_proj.weight': (key, width),
        'self_attn.o_proj.weight': (width, query),
        'mlp.gate_proj.weight': (hidden, width),
        'mlp.up_proj.weight': (hidden, width),
        'mlp.down_proj.weight': (width, hidden),
        'input_layernorm.weight': (width,),
        'post_attention_layernorm.weight': (width,),
    }
    if family == 'gemma2':
        layer |= {f'{side}_feedforward_layernorm.weight': (width,) for side in ('pre', 'post')}
    if family == 'qwen3':
        layer |= {f'self_attn.{side}_norm.weight': (head,) for side in 'qk'}
    if family == 'qwen2' or config.get('attention_bias'):
        layer |= {
            'self_attn.q_proj.bias': (query,),
            'self_attn.k_proj.bias': (key,),
            'self_attn.v_proj.bias': (key,),
        }
    if config.get('attention_bias'):
        layer['self_attn.o_proj.bias'] = (width,)
    shapes = {'model.embed_tokens.weight': (vocabulary, width), 'model.norm.weight': (width,)}
    for number in range(config['num_hidden_layers']):
        shapes |= {f'model.layers.{number}.{name}': shape for name, shape in layer.items()}
    if not config['tie_word_embeddings']:
        shapes['lm_head.weight'] = (vocabulary, width)
    return shapes


def hugging_face_tensors(config, dtype='float32', seed=0):
    """Random tensors of a config, by name."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.normal(0, 0.35, shape).astype(DTYPES[dtype]) for name, shape in hugging_face_shapes(config).items()
    }


def write_directory(path, config, tensors=None, shards=1, generation=None):
    """A Hugging Face directory with these tensors (random float32 ones by default), in one file or more."""
    path.mkdir(parents=True)
    tensors = hugging_face_tensors(config) if tensors is None else tensors
    (path / 'config.json').write_text(json.dumps(config))
    if generation is not None:
        (path / 'generation_config.json').write_text(json.dumps(generation))
    tiny_tokenizer().save_pretrained(path)
    if shards == 1:
        safetensors.numpy.save_file(tensors, path / 'model.safetensors', {'format': 'pt'})
        return path
    weight_map = {}
    for shard in range(shards):
        name = f'model-{shard + 1:05d}-of-{shards:05d}.safetensors'
        part = {tensor: tensors[tensor] for tensor in list(tensors)[shard::shards]}
        safetensors.numpy.save_file(part, path / name, {'format': 'pt'})
        weight_map |= dict.fromkeys(part, name)
    write_index(path, weight_map)
    return path


def write_index(path, weight_map):
    (path / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': weight_map}))


def tiny_tokenizer():
    """Twenty words, `</s>` ends a turn."""
    words = ['<unk>', '<s>', '</s>', *(f'word{number}' for number in range(17))]
    return word_level({word: place for place, word in enumerate(words)})


def word_level(words, split=()):
    """A tokenizer of words and their ids, `</s>` ends a turn. `split`: what divides words, parts of them, further."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token='<unk>'))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Whitespace(), *split])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token='<unk>', bos_token='<s>', eos_token='</s>', pad_token='</s>'
    )


def raw_tensors(path):
    """Bytes, dtype and shape of every tensor of a directory, by name, straight from its safetensors files."""
    found = {}
    for file in sorted(path.glob('*.safetensors')):
        for name, tensor in safetensors.numpy.load_file(file).items():
            assert name not in found
            found[name] = tensor.tobytes(), tensor.dtype.name, tensor.shape
    return found


def on_one_device(architecture):
    """Shardings that put every parameter whole on the first device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return families.nest({key.path: sharding for key in families.keys(architecture)})
