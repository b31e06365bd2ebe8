"""Meshes of some of the virtual devices."""

import math

import jax

from jaxpo import config, sharding


def mesh(data=1, fsdp=1, tensor=1, replica=1):
    """The first replica * data * fsdp * tensor devices as a mesh."""
    count = math.prod((replica, data, fsdp, tensor))
    settings = config.Mesh(replica=replica, data=data, fsdp=fsdp, tensor=tensor)
    return sharding.make_mesh(settings, jax.devices()[:count])
