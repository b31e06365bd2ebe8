"""One leaf of a parameter tree in and out: from the tensors of a checkpoint to its sharding, and back to a host."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxpo import sharding
from jaxpo.errors import InputError
from jaxpo.models import families
from jaxpo.models.families import Key
from jaxpo.models.safetensors_files import Tensors

DTYPES = {'float32': np.float32, 'bfloat16': ml_dtypes.bfloat16, 'float16': np.float16}


def load(key: Key, tensors: Tensors, sharding: jax.sharding.Sharding) -> jax.Array:
    """The float32 leaf with its sharding. Every device's slice is read on its own."""
    slices: dict[tuple, np.ndarray] = {}  # devices that hold copies share one reading

    def read_once(index: tuple[slice, ...]) -> np.ndarray:
        place = tuple((part.start, part.stop) for part in index)
        if place not in slices:
            slices[place] = read(key, tensors, index)
        return slices[place]

    leaf = jax.make_array_from_callback(key.leaf_shape, sharding, read_once, dtype=np.float32)
    return leaf.block_until_ready()  # else the host holds the next leaf as well


def read(key: Key, tensors: Tensors, index: tuple[slice, ...]) -> np.ndarray:
    """float32 values of a slice of our leaf; its padding is 0."""
    if key.padding:
        rows = range(key.leaf_shape[0])[index[0]]
        stored = range(rows.start, max(rows.start, min(rows.stop, key.leaf_shape[0] - key.padding)))
        plain = dataclasses.replace(key, padding=0)
        values = read(plain, tensors, (slice(stored.start, stored.stop), *index[1:])) if stored else None
        blank = np.zeros((len(rows) - len(stored), len(range(key.leaf_shape[1])[index[1]])), np.float32)
        return blank if values is None else np.concatenate([values, blank])
    ranges = [range(size)[part] for size, part in zip(key.leaf_shape, index, strict=True)]
    inner = tuple(slice(part.start, part.stop) for part in (ranges if key.layers is None else ranges[1:]))
    names = key.names if key.layers is None else [key.names[layer] for layer in ranges[0]]
    values = np.empty([len(part) for part in ranges], np.float32)
    rows = values[None] if key.layers is None else values
    for row, name in zip(rows, names, strict=True):
        tensor = tensors.read(name, inner[::-1] if key.transposed else inner)
        row[...] = tensor.T if key.transposed else tensor
    return values


def check(keys: Iterable[Key], params: Mapping[str, Any]) -> None:
    """Raises InputError where the parameters are not exactly these leaves, or have other shapes."""
    keys = tuple(keys)
    for key in keys:
        shape = families.leaf(params, key.path).shape
        if shape != key.leaf_shape:
            raise InputError(f'The parameter {"/".join(key.path)} has shape {shape}; the config says {key.leaf_shape}.')
    if len(jax.tree.leaves(params)) != len(keys):
        raise InputError('The parameters have leaves that the config knows nothing of.')


def without_padding(keys: Iterable[Key], params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters as a checkpoint has them: the rows of zeros behind vocabularies are gone."""
    params = {**params}
    for key in keys:
        if key.padding:
            (name,) = key.path
            params[name] = params[name][: key.shape[0]]
    return params


def fetch(key: Key, layer: int, params: Mapping[str, Any], dtype: str) -> np.ndarray:
    """One Hugging Face tensor on every host; a collective operation."""
    array = families.leaf(params, key.path)
    array = jnp.astype(array if key.layers is None else array[layer], DTYPES[dtype])
    values = sharding.read(array)
    if not np.isfinite(values).all():
        raise InputError(f'{key.names[layer]} has values that are not finite in {dtype}; nothing is exported.')
    return np.ascontiguousarray(values.T if key.transposed else values)
