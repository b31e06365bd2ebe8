"""Sides of a torus are found in the order of its devices, and scattering along them is scattering."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_meshes
from jax import lax
from jax.sharding import PartitionSpec as P

from jaxpo.rings import reduce_scatter, rings


class Device(NamedTuple):
    """What a mesh of TPUs tells of one of them."""

    coords: tuple[int, ...] | None
    core_on_chip: int = 0


class Mesh(NamedTuple):
    """What `rings` reads of a mesh."""

    devices: np.ndarray
    axis_names: tuple[str, ...]

    @property
    def shape(self):
        return dict(zip(self.axis_names, self.devices.shape))


def mesh_of(shape, coordinates):
    devices = np.empty(len(coordinates), object)
    for place, one in enumerate(coordinates):
        devices[place] = Device(one)
    return Mesh(devices.reshape(shape), ('data', 'fsdp'))


def test_both_sides_of_a_square_are_stages():
    square = [(x, y, 0) for x in range(2) for y in range(3)]
    outer, inner = rings(mesh_of((1, 6), square), 'fsdp')
    assert outer == ((0, 3), (1, 4), (2, 5)) and inner == ((0, 1, 2), (3, 4, 5))
    turned = [(x, y, 0) for y in range(3) for x in range(2)]
    assert rings(mesh_of((1, 6), turned), 'fsdp')[0] == ((0, 2, 4), (1, 3, 5))


@pytest.mark.parametrize(
    'shape, coordinates',
    [
        ((2, 3), [(x, y, 0) for x in range(2) for y in range(3)]),  # one side is all of the axis
        ((1, 4), [(0, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 0)]),  # a snake
        ((1, 3), [(0, 0, 0), (0, 1, 0), (1, 0, 0)]),  # no box
        ((1, 4), [None] * 4),  # no torus
    ],
)
def test_else_there_is_one_stage(shape, coordinates):
    assert rings(mesh_of(shape, coordinates), 'fsdp') == ()


def test_devices_here_have_no_sides():
    assert rings(tiny_meshes.mesh(1, 8), 'fsdp') == ()


@pytest.mark.parametrize('sides', [(2, 4), (4, 2), (2, 2, 2)])
@pytest.mark.parametrize('dimension', [0, 1])
def test_in_stages_as_at_once(sides, dimension):
    """Each device's share is the very chunk that it gets at once: the order of chunks is that of devices."""
    box = [(*place, 0) for place in np.ndindex(sides)]
    stages = rings(mesh_of((1, 8), box), 'fsdp')
    assert len(stages) == len(sides)
    values = np.random.default_rng(0).integers(-9, 9, (8 * 16, 24)).astype(np.float32)  # sums of integers are exact

    def scattered(function):
        spec = P('fsdp') if dimension == 0 else P(None, 'fsdp')
        mapped = jax.shard_map(
            function, mesh=tiny_meshes.mesh(1, 8), in_specs=P('fsdp'), out_specs=spec, check_vma=False
        )
        return np.asarray(jax.jit(mapped)(jnp.asarray(values)))

    at_once = scattered(functools.partial(lax.psum_scatter, axis_name='fsdp', scatter_dimension=dimension, tiled=True))
    ours = scattered(functools.partial(reduce_scatter, axis='fsdp', dimension=dimension, stages=stages))
    np.testing.assert_array_equal(ours, at_once)
    np.testing.assert_array_equal(ours, values.reshape(8, 16, 24).sum(axis=0))
