"""Which Hugging Face tensor is which leaf of our parameter tree, as one table.

A leaf under `layers` stacks one Hugging Face tensor per layer on axis 0; a transposed leaf keeps its kernel [in, out]
where Hugging Face keeps [out, in].
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from jaxpo.errors import InputError
from jaxpo.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Key:
    """One leaf: its path in our tree, its name in the checkpoint (`{}` is the layer) and its Hugging Face shape."""

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    layers: int | None = None  # None: a single tensor, not stacked
    transposed: bool = False
    padding: int = 0  # rows of zeros behind those of the checkpoint

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of our leaf."""
        shape = self.shape[::-1] if self.transposed else self.shape
        shape = (shape[0] + self.padding, *shape[1:])
        return shape if self.layers is None else (self.layers, *shape)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors in the checkpoint, by layer."""
        return (self.name,) if self.layers is None else tuple(map(self.name.format, range(self.layers)))


def keys(architecture: Architecture) -> tuple[Key, ...]:
    """Every leaf of a model of this architecture: the layers' leaves last."""
    vocabulary, width, hidden = architecture.vocabulary, architecture.width, architecture.hidden
    padding = architecture.padding
    query = architecture.heads * architecture.head_dim
    key = architecture.key_value_heads * architecture.head_dim
    single = [
        Key(('embedding',), 'model.embed_tokens.weight', (vocabulary, width), padding=padding),
        Key(('final_norm',), 'model.norm.weight', (width,)),
    ]
    if not architecture.tied:
        single.append(Key(('head',), 'lm_head.weight', (vocabulary, width), padding=padding))
    kernels = {
        ('attention', 'query'): ('self_attn.q_proj.weight', (query, width)),
        ('attention', 'key'): ('self_attn.k_proj.weight', (key, width)),
        ('attention', 'value'): ('self_attn.v_proj.weight', (key, width)),
        ('attention', 'output'): ('self_attn.o_proj.weight', (width, query)),
        ('mlp', 'gate'): ('mlp.gate_proj.weight', (hidden, width)),
        ('mlp', 'up'): ('mlp.up_proj.weight', (hidden, width)),
        ('mlp', 'down'): ('mlp.down_proj.weight', (width, hidden)),
    }
    vectors = {('attention_norm',): ('input_layernorm.weight', (width,))} | _optional_vectors(architecture)
    return (*single, *_layer_keys(kernels, architecture, True), *_layer_keys(vectors, architecture, False))


def _optional_vectors(architecture: Architecture) -> dict[tuple[str, ...], tuple[str, tuple[int, ...]]]:
    width, head = (architecture.width,), (architecture.head_dim,)
    query = (architecture.heads * architecture.head_dim,)
    key = (architecture.key_value_heads * architecture.head_dim,)
    vectors = {}
    if architecture.post_norms:
        vectors[('attention_post_norm',)] = ('post_attention_layernorm.weight', width)
        vectors[('mlp_norm',)] = ('pre_feedforward_layernorm.weight', width)
        vectors[('mlp_post_norm',)] = ('post_feedforward_layernorm.weight', width)
    else:
        # The same Hugging Face name stands for another norm: here it precedes the MLP.
        vectors[('mlp_norm',)] = ('post_attention_layernorm.weight', width)
    if architecture.query_key_norm:
        vectors[('attention', 'query_norm')] = ('self_attn.q_norm.weight', head)
        vectors[('attention', 'key_norm')] = ('self_attn.k_norm.weight', head)
    if architecture.qkv_bias:
        vectors[('attention', 'query_bias')] = ('self_attn.q_proj.bias', query)
        vectors[('attention', 'key_bias')] = ('self_attn.k_proj.bias', key)
        vectors[('attention', 'value_bias')] = ('self_attn.v_proj.bias', key)
    if architecture.output_bias:
        vectors[('attention', 'output_bias')] = ('self_attn.o_proj.bias', width)
    return vectors


def _layer_keys(table: dict, architecture: Architecture, transposed: bool) -> Iterator[Key]:
    for path, (name, shape) in table.items():
        yield Key(('layers', *path), f'model.layers.{{}}.{name}', shape, architecture.layers, transposed)


REDUNDANT = re.compile(r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq')  # a buffer old checkpoints keep


def check_tensors(architecture: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises one InputError that names every missing, unexpected and misshaped tensor of a checkpoint.

    `shapes` are by Hugging Face name. A tied model may hold `lm_head.weight` too; reading the weights checks that it
    is the embedding.
    """
    expected = {name: key.shape for key in keys(architecture) for name in key.names}
    known = dict(expected)
    if architecture.tied:
        known['lm_head.weight'] = expected['model.embed_tokens.weight']
    faults = [f'missing {name} {list(shape)}' for name, shape in expected.items() if name not in shapes]
    for name, shape in shapes.items():
        if name not in known:
            if not REDUNDANT.fullmatch(name):
                faults.append(f'unexpected {name} {list(shape)}')
        elif tuple(shape) != known[name]:
            faults.append(f'misshaped {name}: {list(shape)}, config.json says {list(known[name])}')
    if faults:
        raise InputError(f'{where} does not fit its config.json: ' + '; '.join(sorted(faults)) + '.')


def leaf(tree: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at `path`; InputError where it has none."""
    for name in path:
        if name not in tree:
            raise InputError(f'The parameters have no leaf {"/".join(path)}.')
        tree = tree[name]
    return tree


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """The nested dict with these leaves by path."""
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        branch = tree
        for name in path[:-1]:
            branch = branch.setdefault(name, {})
        branch[path[-1]] = value
    return tree
