"""Weights in and out: a checked source into sharded parameters, and parameters into a Hugging Face directory."""

import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import transformers

from jaxpo.errors import InputError, unknown
from jaxpo.models import families, leaves, lora, peft
from jaxpo.models.architecture import Architecture, from_hugging_face
from jaxpo.models.directories import exported, write_json
from jaxpo.models.families import Key
from jaxpo.models.leaves import DTYPES
from jaxpo.models.safetensors_files import INDEX, SINGLE, Tensors
from jaxpo.models.source import Pretrained

ROWS_AT_ONCE = 4096  # of an embedding, where two are compared


def load_params(
    pretrained: Pretrained, shardings: Any, seed: int = 0, adapter: str | pathlib.Path | None = None
) -> dict[str, Any]:
    """The float32 parameters of a model, each leaf with its sharding from the tree `shardings`.

    Every device's slice is read on its own, so that the host holds about one stacked leaf at a time. `seed` is that
    of random weights. `adapter` is the directory of a PEFT adapter that is merged into the kernels, a leaf at a time.

    Raises InputError where the adapter does not fit the model (`models.peft.read_adapter`), before weights are read.
    """
    architecture, tensors = pretrained.architecture, pretrained.tensors
    low_rank = None if adapter is None else peft.read_adapter(adapter, architecture)
    if tensors is None:
        params = _random_params(architecture, shardings, seed)
    else:
        _check_redundant_head(architecture, tensors, pretrained.name)
        keys = families.keys(architecture)
        params = families.nest(
            {key.path: leaves.load(key, tensors, families.leaf(shardings, key.path)) for key in keys}
        )
    return params if low_rank is None else lora.merged_by_leaf(params, *low_rank, shardings)


def _random_params(architecture: Architecture, shardings: Any, seed: int) -> dict[str, Any]:
    # Imported here: only random weights need the model itself.
    from jaxpo.models.decoder import init_params

    return jax.jit(init_params, static_argnums=0, out_shardings=shardings)(architecture, jax.random.key(seed))


def _check_redundant_head(architecture: Architecture, tensors: Tensors, name: str) -> None:
    """A tied model may store its head too; it must be the embedding."""
    if not architecture.tied or 'lm_head.weight' not in tensors.shapes:
        return
    columns = slice(0, architecture.width)
    for start in range(0, architecture.vocabulary, ROWS_AT_ONCE):
        index = (slice(start, min(start + ROWS_AT_ONCE, architecture.vocabulary)), columns)
        pair = tensors.read('lm_head.weight', index), tensors.read('model.embed_tokens.weight', index)
        if not np.array_equal(*pair):
            raise InputError(
                f'{name} says tie_word_embeddings, but its lm_head.weight differs from model.embed_tokens.weight. '
                "Set 'tie_word_embeddings': false in its config.json to keep both."
            )


def write_hugging_face(
    directory: pathlib.Path,
    params: Mapping[str, Any],
    hugging_face_config: Mapping[str, Any],
    tokenizer: transformers.PreTrainedTokenizerBase | None,
    *,
    dtype: str,
    max_shard_bytes: int = 5_000_000_000,
    generation_config: Mapping[str, Any] | None = None,
    extra_metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a Hugging Face directory: sharded safetensors, configs and, where given, the tokenizer.

    Every process must call it; process 0 alone writes. The host holds one file's tensors at a time. An interrupted
    export leaves no `directory`. `extra_metadata` goes into the header of every safetensors file.

    Raises InputError where the directory exists and is not empty, the disk has too little room, or a value is not
    finite in `dtype`.
    """
    if dtype not in DTYPES:
        raise unknown('export dtype', dtype, DTYPES)
    architecture = from_hugging_face(dict(hugging_face_config))
    keys = families.keys(architecture)
    leaves.check(keys, params)
    shards = _plan_shards(keys, np.dtype(DTYPES[dtype]).itemsize, max_shard_bytes)
    total = sum(size for shard in shards for _, _, size in shard)
    with exported(directory, total) as folder:
        metadata = {'format': 'pt', **(extra_metadata or {})}
        if folder is not None:
            _write_configs(folder, hugging_face_config, generation_config, dtype)
        for name, shard in zip(_shard_names(len(shards)), shards, strict=True):
            tensors = {key.names[layer]: leaves.fetch(key, layer, params, dtype) for key, layer, _ in shard}
            if folder is not None:
                safetensors.numpy.save_file(tensors, folder / name, metadata)
                shutil.copymode(folder / 'config.json', folder / name)  # safetensors writes for the owner alone
        if folder is not None:
            _write_index(folder, shards, total)
            if tokenizer is not None:
                _write_tokenizer(folder, tokenizer)


def _plan_shards(keys: tuple[Key, ...], item_bytes: int, max_bytes: int) -> list[list[tuple[Key, int, int]]]:
    """Files as lists of (key, layer, bytes), the layers in order, each file within `max_bytes` or a single tensor."""
    tensors = [(key, layer, int(np.prod(key.shape)) * item_bytes) for key in keys for layer in range(key.layers or 1)]
    tensors.sort(key=lambda tensor: (tensor[0].layers is not None, tensor[1]))  # stable: whole layers together
    shards: list[list[tuple[Key, int, int]]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor[2] > max_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor[2]
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f'model-{number:05d}-of-{count:05d}.safetensors' for number in range(1, count + 1)]


def _write_index(folder: pathlib.Path, shards: list[list[tuple[Key, int, int]]], total: int) -> None:
    if len(shards) == 1:
        return
    names = _shard_names(len(shards))
    weight_map = {key.names[layer]: name for name, shard in zip(names, shards) for key, layer, _ in shard}
    parameters = sum(int(np.prod(key.shape)) for shard in shards for key, _, _ in shard)
    sizes = {'total_parameters': parameters, 'total_size': total}
    write_json(folder / INDEX, {'metadata': sizes, 'weight_map': dict(sorted(weight_map.items()))})


def _write_configs(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    dtype: str,
) -> None:
    # transformers 4 reads torch_dtype, 5 reads dtype.
    written = {**config, 'dtype': dtype, 'torch_dtype': dtype}
    written.pop('_name_or_path', None)
    write_json(folder / 'config.json', written)
    if generation_config is not None:
        write_json(folder / 'generation_config.json', generation_config)


def _write_tokenizer(folder: pathlib.Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / 'tokenizer_config.json'
    config = json.loads(path.read_text('utf-8'))
    if config.get('tokenizer_class') == 'TokenizersBackend':
        config['tokenizer_class'] = 'PreTrainedTokenizerFast'  # its name in transformers 4, known to 5 as well
        write_json(path, config)
