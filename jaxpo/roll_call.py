"""Which processes are there, asked before JAX is: it waits for all of them, and cannot say who is missing.

Process 0 listens at the coordinator's address; the others come, say who they are, and are told who came. Afterwards
the address is free, and JAX's own coordinator takes it.
"""

import contextlib
import json
import os
import socket
import time
from typing import NamedTuple

from jax._src import clusters  # who is in a slice: JAX has no public name for it
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.clusters import cloud_tpu_cluster

from jaxpo import config, processes
from jaxpo.errors import InputError

LONGEST = 2**20  # bytes of a message
SECONDS_BETWEEN_CALLS = 0.2


class Place(NamedTuple):
    """This process among those of a run."""

    coordinator: str  # HOST:PORT
    count: int
    index: int
    names: tuple[str, ...]  # of the machines, by index; empty where nobody tells


def place_of(settings: config.Processes, seconds: int) -> Place | None:
    """What the settings, SLURM or the slice say of this process; None where it is alone. Starts nothing."""
    launcher = processes.launcher_of(settings, os.environ, in_tpu_vm=running_in_cloud_tpu_vm)
    if launcher is None:
        return None
    if launcher == 'settings':
        return Place(settings.coordinator, settings.count, settings.index, ())
    cluster = next(
        (one for one in clusters.ClusterEnv._cluster_types if not one.opt_in_only_method and one.is_env_present()), None
    )
    if cluster is None:
        raise InputError(f'processes: nothing here says who belongs to this run ({launcher}).')
    names = tuple(cluster._get_worker_list_in_slice()) if hasattr(cluster, '_get_worker_list_in_slice') else ()
    count = cluster.get_process_count()
    address = cluster.get_coordinator_address(seconds, None)
    return Place(address, count, cluster.get_process_id(), names if len(names) == count else ())


def told(name: str) -> str | None:
    """What a TPU's machine is told of its slice, such as ACCELERATOR_TYPE; None elsewhere."""
    if not running_in_cloud_tpu_vm or os.environ.get('TPU_SKIP_MDS_QUERY'):
        return os.environ.get(name)
    return cloud_tpu_cluster.get_tpu_env_value(name)


def call(place: Place, seconds: float) -> dict[int, str] | None:
    """The names of the machines that came within `seconds`, by index; None where process 0 did not answer."""
    deadline = time.monotonic() + seconds
    return _listen(place, deadline) if place.index == 0 else _report(place, deadline)


def missing(place: Place, present: dict[int, str] | None) -> list[str]:
    """Those that did not come, as people know them."""
    absent = [0] if present is None else [index for index in range(place.count) if index not in present]
    return [f'process {index}' + (f' ({place.names[index]})' if place.names else '') for index in absent]


def _listen(place: Place, deadline: float) -> dict[int, str]:
    present, callers = {0: socket.gethostname()}, []
    port = int(place.coordinator.rpartition(':')[2])
    try:
        server = socket.create_server(('', port))
    except OSError as error:
        raise InputError(f'processes.coordinator: port {port} of this machine cannot be used ({error}).') from None
    with server, contextlib.ExitStack() as open_ones:
        while len(present) < place.count and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, TypeError):  # whoever else knocks is none of ours
                caller = open_ones.enter_context(server.accept()[0])
                caller.settimeout(5.0)
                index, name = _receive(caller)
                if 0 < int(index) < place.count:
                    present[int(index)] = str(name)
                    callers.append(caller)
        for caller in callers:
            with contextlib.suppress(OSError):
                _send(caller, sorted(present.items()))
    return present


def _report(place: Place, deadline: float) -> dict[int, str] | None:
    host, _, port = place.coordinator.rpartition(':')
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(OSError, ValueError), socket.create_connection((host, int(port)), left) as line:
            _send(line, [place.index, socket.gethostname()])
            line.settimeout(left + 5.0)  # process 0 may have begun later
            return {int(index): name for index, name in _receive(line)}
        time.sleep(SECONDS_BETWEEN_CALLS)
    return None


def _send(line: socket.socket, value) -> None:
    line.sendall(json.dumps(value).encode() + b'\n')


def _receive(line: socket.socket):
    with line.makefile('rb') as file:
        return json.loads(file.readline(LONGEST))
