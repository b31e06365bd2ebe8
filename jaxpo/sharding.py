"""The mesh, and which axis of which array is split over it: one table of rules for parameters, one rule for rows."""

import math
import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpo import config
from jaxpo.errors import InputError

ROWS = P(('data', 'fsdp'))
MICROBATCHES = P(None, ('data', 'fsdp'))

# The width D of every matrix is split over `fsdp`; L (layers) leads the stacked ones. Optimizer moments carry the
# same path as the parameter they belong to, so the same rules hold for them. The first match counts.
PARAMETER_RULES = (
    (r'(^|/)method(_state|_params)?/', P()),  # small, and not the decoder's
    (r'layers/attention/(query|key|value)$', P(None, 'fsdp', None)),
    (r'layers/attention/output$', P(None, None, 'fsdp')),
    (r'layers/mlp/(gate|up)$', P(None, 'fsdp', None)),
    (r'layers/mlp/down$', P(None, None, 'fsdp')),
    (r'layers/(attention|mlp)/(query|key|value|gate|up)_lora_a$', P(None, 'fsdp', None)),
    (r'layers/(attention|mlp)/(output|down)_lora_b$', P(None, None, 'fsdp')),
    (r'(^|/)(embedding|head)$', P(None, 'fsdp')),
    (r'', P()),
)


def make_mesh(settings: config.Mesh) -> Mesh:
    """The mesh `data x fsdp` over all devices. InputError where the devices do not divide."""
    devices = jax.device_count()
    if settings.fsdp < 1 or settings.data < -1 or settings.data == 0:
        raise InputError(f'mesh: sizes are at least 1 (data may be -1), not {settings}.')
    data = devices // settings.fsdp if settings.data == -1 else settings.data
    if data * settings.fsdp != devices:
        raise InputError(
            f'mesh: data x fsdp is {data} x {settings.fsdp}, but there are {devices} devices. '
            f'mesh.fsdp may be {_divisors(devices)}, with mesh.data -1.'
        )
    return jax.make_mesh((data, settings.fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)


def _divisors(number: int) -> str:
    return ', '.join(str(n) for n in range(1, number + 1) if number % n == 0)


def parameter_shardings(tree, mesh: Mesh):
    """NamedShardings for parameters, gradients, optimizer state or a whole TrainState, by `PARAMETER_RULES`.

    `tree` holds arrays or ShapeDtypeStructs. InputError where a dimension does not divide over its axis.
    """
    return jax.tree.map_with_path(lambda path, leaf: _sharding(_name(path), leaf, mesh), tree)


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator='/')


def _sharding(name, leaf, mesh):
    spec = next(spec for pattern, spec in PARAMETER_RULES if re.search(pattern, name))
    for size, axis in zip(leaf.shape, spec):
        if axis is not None and size % mesh.shape[axis]:
            raise InputError(
                f'mesh: {name} {leaf.shape} cannot be split over mesh.{axis} {mesh.shape[axis]}: '
                f'{size} is not a multiple of it.'
            )
    return NamedSharding(mesh, spec)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def bytes_per_device(tree, shardings) -> int:
    """Bytes that the arrays of `tree` (or their shapes) take on one device."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings))
    return sum(math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf, sharding in leaves)


def put(tree, mesh: Mesh, spec: P):
    """Host arrays, the same on every process, -> global arrays split by `spec`."""
    sharding = NamedSharding(mesh, spec)

    def place(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)
