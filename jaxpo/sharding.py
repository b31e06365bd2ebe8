"""The mesh, and which axis of which array is split over it: one table of rules for parameters, one rule for rows."""

import math
import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpo import config
from jaxpo.errors import InputError

AXES = ('replica', 'data', 'fsdp', 'tensor')
ROW_AXES = AXES[:3]  # the last of them splits parameters too
ROWS = P(ROW_AXES)
MICROBATCHES = P(None, ROW_AXES)

# The width D of every matrix is split over `fsdp`; heads, hidden units and the vocabulary over `tensor`; L (layers)
# leads the stacked ones. Adam's moments carry the path and shape of the parameter they belong to, so the same rules
# hold for them; Adafactor's carry its path alone. The first match counts.
PARAMETER_RULES = (
    (r'^opt_state/.*/v(_row|_col)?/', P()),  # a row and a column of each matrix, or a vector: small
    (r'^(method_state|method_params|opt_state/inner_states/method)/', P()),  # small, and not the decoder's
    (r'layers/attention/(query|key|value)$', P(None, 'fsdp', 'tensor')),
    (r'layers/attention/(query|key|value)_bias$', P(None, 'tensor')),
    (r'layers/attention/output$', P(None, 'tensor', 'fsdp')),
    (r'layers/mlp/(gate|up)$', P(None, 'fsdp', 'tensor')),
    (r'layers/mlp/down$', P(None, 'tensor', 'fsdp')),
    (r'layers/(attention|mlp)/(query|key|value|gate|up)_lora_a$', P(None, 'fsdp', None)),
    (r'layers/(attention|mlp)/(query|key|value|gate|up)_lora_b$', P(None, None, 'tensor')),
    (r'layers/(attention|mlp)/(output|down)_lora_a$', P(None, 'tensor', None)),
    (r'layers/(attention|mlp)/(output|down)_lora_b$', P(None, None, 'fsdp')),
    (r'(^|/)(embedding|head)$', P('tensor', 'fsdp')),
    (r'', P()),
)


def make_mesh(settings: config.Mesh, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh `replica x data x fsdp x tensor` over all devices, or those given.

    Where devices lie in several slices, `replica` alone crosses from one to the other. InputError where the sizes and
    the devices do not fit.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(settings, axis) for axis in AXES}
    if any(size < 1 and not (axis == 'data' and size == -1) for axis, size in sizes.items()):
        raise InputError(f'mesh: sizes are at least 1 (data may be -1), not {settings}.')
    others = math.prod(size for axis, size in sizes.items() if axis != 'data')
    if sizes['data'] == -1:
        sizes['data'] = max(1, len(devices) // others)
    if math.prod(sizes.values()) != len(devices):
        product = ' x '.join(map(str, sizes.values()))
        raise InputError(
            f'mesh: {" x ".join(AXES)} is {product}, but there are {len(devices)} devices. With mesh.data -1, '
            f'the product of the others may be {_divisors(len(devices))}.'
        )
    return Mesh(_arranged(tuple(sizes.values()), devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as an array of this shape, neighbours in the hardware near each other."""
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise InputError(f'mesh.replica {shape[0]} must be a multiple of the {slices} slices that the devices lie in.')
    within = (shape[0] // slices, *shape[1:])
    between = (slices, 1, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def _divisors(number: int) -> str:
    return ', '.join(str(n) for n in range(1, number + 1) if number % n == 0)


def row_multiple(mesh: Mesh) -> int:
    """Shares that rows are split into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


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
            hint = ' Set model.vocabulary_multiple to pad it.' if re.search('(embedding|head)$', name) else ''
            raise InputError(
                f'mesh: {name} {leaf.shape} cannot be split over mesh.{axis} {mesh.shape[axis]}: '
                f'{size} is not a multiple of it.{hint * (axis == "tensor")}'
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


def read(tree):
    """Arrays -> host arrays, whole on every process. Where others' devices hold parts, all processes must call it."""
    return jax.tree.map(_read, tree)


def _read(array):
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)
