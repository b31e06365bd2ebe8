"""Weights in and out: a checked source into sharded parameters, and parameters into a Hugging Face directory."""

import contextlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors.numpy
import transformers
from jax.experimental import multihost_utils

from jaxpo.errors import InputError, unknown
from jaxpo.models import families
from jaxpo.models.architecture import Architecture, from_hugging_face
from jaxpo.models.families import Key
from jaxpo.models.safetensors_files import INDEX, SINGLE, Tensors
from jaxpo.models.source import Pretrained

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}
ROWS_AT_ONCE = 4096  # of an embedding, where two are compared


def load_params(pretrained: Pretrained, shardings: Any, seed: int = 0) -> dict[str, Any]:
    """The float32 parameters of a model, each leaf with its sharding from the tree `shardings`.

    Every device's slice is read on its own, so that the host holds about one stacked leaf at a time. `seed` is that
    of random weights.
    """
    if pretrained.tensors is None:
        return _random_params(pretrained.architecture, shardings, seed)
    _check_redundant_head(pretrained.architecture, pretrained.tensors, pretrained.name)
    leaves = {
        key.path: _load_leaf(key, pretrained.tensors, families.leaf(shardings, key.path))
        for key in families.keys(pretrained.architecture)
    }
    return families.nest(leaves)


def _random_params(architecture: Architecture, shardings: Any, seed: int) -> dict[str, Any]:
    # Imported here: only random weights need the model itself.
    from jaxpo.models.decoder import init_params

    return jax.jit(init_params, static_argnums=0, out_shardings=shardings)(architecture, jax.random.key(seed))


def _load_leaf(key: Key, tensors: Tensors, sharding: jax.sharding.Sharding) -> jax.Array:
    slices: dict[tuple, np.ndarray] = {}  # devices that hold copies share one reading

    def read(index: tuple[slice, ...]) -> np.ndarray:
        place = tuple((part.start, part.stop) for part in index)
        if place not in slices:
            slices[place] = _read_slice(key, tensors, index)
        return slices[place]

    leaf = jax.make_array_from_callback(key.leaf_shape, sharding, read, dtype=np.float32)
    return leaf.block_until_ready()  # else the host holds the next leaf as well


def _read_slice(key: Key, tensors: Tensors, index: tuple[slice, ...]) -> np.ndarray:
    """float32 values of a slice of our leaf."""
    ranges = [range(size)[part] for size, part in zip(key.leaf_shape, index, strict=True)]
    inner = tuple(slice(part.start, part.stop) for part in (ranges if key.layers is None else ranges[1:]))
    names = key.names if key.layers is None else [key.names[layer] for layer in ranges[0]]
    values = np.empty([len(part) for part in ranges], np.float32)
    rows = values[None] if key.layers is None else values
    for row, name in zip(rows, names, strict=True):
        tensor = tensors.read(name, inner[::-1] if key.transposed else inner)
        row[...] = tensor.T if key.transposed else tensor
    return values


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
    _check_params(keys, params)
    shards = _plan_shards(keys, np.dtype(DTYPES[dtype]).itemsize, max_shard_bytes)
    total = sum(size for shard in shards for _, _, size in shard)
    _agree(_obstacle(directory, total) if jax.process_index() == 0 else None)
    with _atomic_directory(directory) as folder:
        metadata = {'format': 'pt', **(extra_metadata or {})}
        if folder is not None:
            _write_configs(folder, hugging_face_config, generation_config, dtype)
        for name, shard in zip(_shard_names(len(shards)), shards, strict=True):
            tensors = {key.names[layer]: _fetch(key, layer, params, dtype) for key, layer, _ in shard}
            if folder is not None:
                safetensors.numpy.save_file(tensors, folder / name, metadata)
                shutil.copymode(folder / 'config.json', folder / name)  # safetensors writes for the owner alone
        if folder is not None:
            _write_index(folder, shards, total)
            if tokenizer is not None:
                _write_tokenizer(folder, tokenizer)
    _agree(None)  # no process returns before the directory is there


def _check_params(keys: tuple[Key, ...], params: Mapping[str, Any]) -> None:
    for key in keys:
        shape = families.leaf(params, key.path).shape
        if shape != key.leaf_shape:
            raise InputError(f'The parameter {"/".join(key.path)} has shape {shape}; the config says {key.leaf_shape}.')
    if len(jax.tree.leaves(params)) != len(keys):
        raise InputError('The parameters have leaves that the config knows nothing of.')


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


def _fetch(key: Key, layer: int, params: Mapping[str, Any], dtype: str) -> np.ndarray:
    """One Hugging Face tensor on every host; a collective operation."""
    array = families.leaf(params, key.path)
    array = jnp.astype(array if key.layers is None else array[layer], DTYPES[dtype])
    if array.is_fully_addressable:
        values = np.asarray(array)
    else:
        values = multihost_utils.process_allgather(array, tiled=True)
    if not np.isfinite(values).all():
        raise InputError(f'{key.names[layer]} has values that are not finite in {dtype}; nothing is exported.')
    return np.ascontiguousarray(values.T if key.transposed else values)


def _obstacle(directory: pathlib.Path, size: int) -> str | None:
    """Why `size` bytes cannot be exported to the directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        return f'{directory} exists and is not empty: choose another export directory or remove it.'
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(parent).free, size + 50_000_000  # the tokenizer's files, generously
    if needed > free:
        return f'No room for the export: {needed / 1e9:.2f} GB needed in {parent}, {free / 1e9:.2f} GB free.'
    return None


def _agree(problem: str | None) -> None:
    """Raises InputError on all processes where process 0 has a problem, so that none waits for another."""
    failed = problem is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.int32(failed)))
    if failed:
        raise InputError(problem or 'Process 0 cannot export; its own message says why.')


@contextlib.contextmanager
def _atomic_directory(directory: pathlib.Path) -> Iterator[pathlib.Path | None]:
    """A temporary sibling that becomes `directory` at the end, or nothing; None except on process 0."""
    if jax.process_index() != 0:
        yield None
        return
    folder = directory.absolute().parent / f'.{directory.name}.{uuid.uuid4().hex[:8]}.partial'
    folder.mkdir()
    try:
        yield folder
        os.rename(folder, directory)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_index(folder: pathlib.Path, shards: list[list[tuple[Key, int, int]]], total: int) -> None:
    if len(shards) == 1:
        return
    names = _shard_names(len(shards))
    weight_map = {key.names[layer]: name for name, shard in zip(names, shards) for key, layer, _ in shard}
    parameters = sum(int(np.prod(key.shape)) for shard in shards for key, _, _ in shard)
    sizes = {'total_parameters': parameters, 'total_size': total}
    _write_json(folder / INDEX, {'metadata': sizes, 'weight_map': dict(sorted(weight_map.items()))})


def _write_configs(
    folder: pathlib.Path,
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any] | None,
    dtype: str,
) -> None:
    # transformers 4 reads torch_dtype, 5 reads dtype.
    written = {**config, 'dtype': dtype, 'torch_dtype': dtype}
    written.pop('_name_or_path', None)
    _write_json(folder / 'config.json', written)
    if generation_config is not None:
        _write_json(folder / 'generation_config.json', generation_config)


def _write_tokenizer(folder: pathlib.Path, tokenizer: transformers.PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / 'tokenizer_config.json'
    config = json.loads(path.read_text('utf-8'))
    if config.get('tokenizer_class') == 'TokenizersBackend':
        config['tokenizer_class'] = 'PreTrainedTokenizerFast'  # its name in transformers 4, known to 5 as well
        _write_json(path, config)


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + '\n', 'utf-8')
