"""Devices that are described and not there: what a program can be compiled for on any CPU."""

import importlib.util
import os
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from jaxpo.errors import InputError
from jaxpo.plan.chips import Topology
from jaxpo.plan.gpus import TARGETS

# libtpu asks a machine's metadata for these; here there is none, and describing needs no lock on a chip.
_QUIET = {
    'TPU_SKIP_MDS_QUERY': '1',
    'TPU_WORKER_HOSTNAMES': 'localhost',
    'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}


def describe(topology: Topology) -> Sequence[jax.Device]:
    """The devices of a topology. InputError where the compiler for them is not installed, or refuses the topology."""
    jax.config.update('jax_platforms', 'cpu')
    if topology.chip.platform == 'tpu':
        return _describe_tpu(topology)
    return _describe_gpu(topology)


def _describe_tpu(topology: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec('libtpu') is None:
        raise InputError("jaxpo plan compiles for TPUs with libtpu, which is not installed: pip install 'jaxpo[plan]'")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    options = {'num_slices': topology.slices} if topology.slices > 1 else {}
    if topology.sides == (1, 1):
        options['chips_per_host_bounds'] = [1, 1, 1]
    try:
        described = topologies.get_topology_desc(platform='tpu', topology_name=topology.name, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f'--topology {topology.name}: libtpu refuses it: {_first_line(error)}') from None
    return described.devices


def _describe_gpu(topology: Topology) -> Sequence[jax.Device]:
    if importlib.util.find_spec('jax_cuda12_plugin') is None:
        raise InputError(
            "jaxpo plan compiles for GPUs with JAX's CUDA plugin, which is not installed: pip install 'jaxpo[plan-gpu]'"
        )
    # Tuning a kernel means to time it, on a device.
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_gpu_autotune_level=0'.strip()
    shape = 'x'.join(map(str, topology.sides))
    try:
        described = topologies.get_topology_desc(
            topology_name=topology.kind, platform='cuda', topology=shape, target_config=TARGETS[topology.kind]
        )
    except (RuntimeError, ValueError) as error:
        raise InputError(f'--topology {topology.name}: the CUDA plugin refuses it: {_first_line(error)}') from None
    return described.devices


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
