"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685): small trained factors beside frozen kernels.

A kernel W `[in, out]` with an adapter acts as W + scale * A @ B, where A is `[in, rank]` and B is `[rank, out]`. The
factors lie in the parameter tree next to their kernel, stacked over layers as it is:

    layers/attention/query [L, D, H * Dh]      layers/attention/query_lora_a [L, D, r]
                                               layers/attention/query_lora_b [L, r, H * Dh]

so that base and adapter are two nested dicts without a common leaf: the one can stay frozen, and be the reference,
while the other is trained.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxpo import config
from jaxpo.errors import InputError, unknown
from jaxpo.models import families
from jaxpo.models.architecture import Architecture
from jaxpo.models.families import Key

BLOCKS = {
    'query': 'attention',
    'key': 'attention',
    'value': 'attention',
    'output': 'attention',
    'gate': 'mlp',
    'up': 'mlp',
    'down': 'mlp',
}
"""The kernels that can have an adapter, and where in a layer they are."""
SUFFIXES = ('_lora_a', '_lora_b')


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which kernels have adapters, and of what form. Hashable: a static field of the decoder."""

    rank: int
    scale: float
    """What A @ B is multiplied by: alpha / rank."""
    targets: tuple[str, ...]
    """Names of BLOCKS, in its order."""
    zero: Literal['a', 'b'] = 'b'
    """The factor that starts at 0. After the start it says nothing."""


def of(settings: config.Lora) -> Lora | None:
    """The adapters that a config asks for; None where rank is 0.

    Raises InputError where the rank is negative, alpha is not a positive number, or targets are none or unknown.
    """
    if isinstance(settings.rank, bool) or not isinstance(settings.rank, int) or settings.rank < 0:
        raise InputError(f'lora.rank is a whole number, 0 (no adapter) or more, not {settings.rank!r}.')
    if not (math.isfinite(settings.alpha) and settings.alpha > 0):
        raise InputError(f'lora.alpha is a number above 0, not {settings.alpha!r}.')
    if not settings.targets:
        raise InputError(f'lora.targets names no kernel. Known: {", ".join(BLOCKS)}.')
    for name in settings.targets:
        if name not in BLOCKS:
            raise unknown('kernel in lora.targets', name, BLOCKS)
    if settings.zero not in ('a', 'b'):
        raise unknown('factor in lora.zero', settings.zero, ('a', 'b'))
    if settings.rank == 0:
        return None
    return Lora(settings.rank, settings.alpha / settings.rank, ordered(settings.targets), settings.zero)


def ordered(targets) -> tuple[str, ...]:
    """The targets in the order of BLOCKS, each once, so that equal adapters are equal values."""
    return tuple(name for name in BLOCKS if name in targets)


def initializer(lora: Lora, factor: Literal['a', 'b']):
    """`(key, shape) -> array` of one factor `[..., in, out]`: exact zeros, or normal with deviation 1 / sqrt(in).

    With one factor 0 the adapted kernel is the kernel itself, bit for bit, and the gradient reaches that factor. The
    variance of the other keeps what passes through it of the size it had (Hayou et al. 2024, arXiv:2406.08447).
    """

    def draw(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5

    return jax.nn.initializers.zeros if factor == lora.zero else draw


def kernels(architecture: Architecture, lora: Lora) -> tuple[Key, ...]:
    """The kernels that have adapters, in the order of `lora.targets`."""
    by_path = {key.path: key for key in families.keys(architecture)}
    return tuple(by_path[kernel_path(name)] for name in lora.targets)


def kernel_path(target: str) -> tuple[str, ...]:
    """Path of a kernel in the parameter tree."""
    return ('layers', BLOCKS[target], target)


def factor_paths(target: str) -> tuple[tuple[str, ...], ...]:
    """Paths of the factors A and B of a kernel."""
    *block, name = kernel_path(target)
    return tuple((*block, f'{name}{suffix}') for suffix in SUFFIXES)


def init_adapter(architecture: Architecture, lora: Lora, key: jax.Array) -> dict[str, Any]:
    """A fresh adapter tree, float32. What a kernel gets does not depend on which others have adapters."""
    leaves = {}
    for kernel in kernels(architecture, lora):
        layers, rows, columns = kernel.leaf_shape
        target = kernel.path[-1]
        shapes = (layers, rows, lora.rank), (layers, lora.rank, columns)
        own = jax.random.fold_in(key, list(BLOCKS).index(target))
        for path, factor, shape in zip(factor_paths(target), 'ab', shapes):
            leaves[path] = initializer(lora, factor)(own, shape, jnp.float32)
    return families.nest(leaves)


def abstract_adapter(architecture: Architecture, lora: Lora) -> dict[str, Any]:
    """The adapter tree as shapes and dtypes (`jax.ShapeDtypeStruct`), without making any array."""
    return jax.eval_shape(lambda key: init_adapter(architecture, lora, key), jax.random.key(0))


def split(params: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(base, adapter): the leaves that are no factors, and those that are. Neither is copied."""
    leaves = flatten_dict(dict(params))
    adapter = {path: leaf for path, leaf in leaves.items() if path[-1].endswith(SUFFIXES)}
    base = {path: leaf for path, leaf in leaves.items() if path not in adapter}
    return unflatten_dict(base), unflatten_dict(adapter)


def combined(base: Mapping[str, Any], adapter: Mapping[str, Any]) -> dict[str, Any]:
    """One tree with the leaves of both; undoes `split`. InputError where both have a leaf."""
    leaves, more = flatten_dict(dict(base)), flatten_dict(dict(adapter))
    twice = sorted('/'.join(path) for path in leaves.keys() & more.keys())
    if twice:
        raise InputError(f'Base and adapter both have the leaf {twice[0]}: the base has an adapter already.')
    return unflatten_dict(leaves | more)


def merged(params: Mapping[str, Any], lora: Lora) -> dict[str, Any]:
    """The plain tree whose kernels are W + scale * A @ B, of a tree that has base and adapter.

    May be jitted, and sharded as the base is. InputError where the tree's factors are not those of `lora`.
    """
    base, adapter = split(params)
    expected = {path for target in lora.targets for path in factor_paths(target)}
    for fault, paths in (
        ('lack', expected - flatten_dict(adapter).keys()),
        ('also have', flatten_dict(adapter).keys() - expected),
    ):
        if paths:
            raise InputError(f'The parameters {fault} {"/".join(min(paths))}; adapters: {", ".join(lora.targets)}.')
    leaves = flatten_dict(base)
    for target in lora.targets:
        a, b = (families.leaf(adapter, path) for path in factor_paths(target))
        path = kernel_path(target)
        leaves[path] = merged_kernel(families.leaf(base, path), a, b, lora.scale)
    return unflatten_dict(leaves)


def merged_by_leaf(base: Mapping[str, Any], lora: Lora, adapter: Mapping[str, Any], shardings: Any) -> dict[str, Any]:
    """As `merged`, but a kernel at a time, each with its own of `shardings`: `base`'s kernels are used up (donated).

    `adapter` may be whole on the host, the same on every process.
    """
    leaves = flatten_dict(dict(base))
    for target in lora.targets:
        path = kernel_path(target)
        a, b = (families.leaf(adapter, factor) for factor in factor_paths(target))
        merge = jax.jit(merged_kernel, donate_argnums=0, out_shardings=families.leaf(shardings, path))
        leaves[path] = merge(leaves[path], a, b, lora.scale)
    return unflatten_dict(leaves)


def merged_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float | jax.Array) -> jax.Array:
    """W + scale * A @ B of stacked kernels `[L, in, out]`, added up in float32, in the kernel's dtype."""
    delta = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * delta).astype(kernel.dtype)
