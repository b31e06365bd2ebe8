"""Reduce-scatter along a mesh axis, in the steps that the wires have.

Over all devices of a torus at once, a compiler for TPUs writes a sum that every device takes in whole, and then a slice
of it. Along one side of the torus after the other it writes reduce-scatters (seen ahead of time for v5e, v6e and v5p):
half of the traffic.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

Groups = tuple[tuple[int, ...], ...]  # places along the axis of devices that exchange with one another


def rings(mesh: Mesh, axis: str) -> tuple[Groups, ...]:
    """The stages of a reduce-scatter along a mesh axis: the sides of the torus that its devices fill, the outer first.

    Empty, for a single stage, where devices have no coordinates or do not fill a box in its order.
    """
    place = mesh.axis_names.index(axis)
    lines = np.moveaxis(mesh.devices, place, -1).reshape(-1, mesh.shape[axis])
    found = {_sides([_coordinates(device) for device in line]) for line in lines}
    sides = found.pop()
    if found or sides is None or len(sides) < 2:
        return ()
    places = np.arange(mesh.shape[axis]).reshape(sides)
    return tuple(_groups(places, side) for side in range(len(sides)))


def reduce_scatter(values: jax.Array, axis: str, dimension: int, stages: Sequence[Groups]) -> jax.Array:
    """The share of this device of the sum of `values` over a mesh axis, split along `dimension` (`lax.psum_scatter`).

    Within `jax.shard_map`; `stages` are those of `rings`.
    """
    if not stages:
        return lax.psum_scatter(values, axis, scatter_dimension=dimension, tiled=True)
    for groups in stages:
        values = lax.psum_scatter(values, axis, scatter_dimension=dimension, axis_index_groups=groups, tiled=True)
    return values


def _groups(places: np.ndarray, side: int) -> Groups:
    return tuple(map(tuple, np.moveaxis(places, side, -1).reshape(-1, places.shape[side]).tolist()))


def _coordinates(device: jax.Device) -> tuple[int, ...]:
    coordinates = getattr(device, 'coords', None)
    return () if coordinates is None else (*coordinates, getattr(device, 'core_on_chip', 0))


def _sides(line: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """Lengths of the sides of the box that a line of devices fills in order, the outer first; None if it is no box."""
    coordinates = np.array(line)
    if not coordinates.size:
        return None
    varying = [side for side in range(coordinates.shape[1]) if len(set(coordinates[:, side])) > 1]
    # The side that changes last is the outer one.
    first_change = {side: int(np.argmax(coordinates[:, side] != coordinates[0, side])) for side in varying}
    varying.sort(key=lambda side: -first_change[side])
    ranks = [np.unique(coordinates[:, side], return_inverse=True)[1] for side in varying]
    sides = tuple(int(rank.max()) + 1 for rank in ranks)
    if not sides or np.prod(sides) != len(line) or (np.ravel_multi_index(ranks, sides) != np.arange(len(line))).any():
        return None
    return sides
