"""Several processes that are one run: how they find each other, and what process 0 decides for all.

Every process runs the same program. Files are written by process 0, and what is decided from files is decided by it.
How they end together is told in `failures`.
"""

import contextlib
import importlib.util
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax.experimental import multihost_utils

from jaxpo import config, failures
from jaxpo.errors import InputError

Value = TypeVar('Value')

SECONDS_TO_START = 25.0  # for the backend of a lone process; several wait for each other as long as `start_seconds`
NAMES = {'cpu': ('cpu',), 'gpu': ('gpu', 'cuda', 'rocm'), 'tpu': ('tpu',)}  # as JAX_PLATFORMS has them
CUDA_PLUGINS = ('jax_cuda12_plugin', 'jax_cuda13_plugin')

_SLURM = ('SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_NTASKS', 'SLURM_PROCID', 'SLURM_LOCALID')


def start(settings: config.Processes, *, saves_when_told: bool = False) -> None:
    """Joins the other processes, where there are any, and the backend asked for. Before anything asks for devices.

    Args:
      saves_when_told: whether the command asks `interrupted`: SIGTERM to any process then ends none at once.

    Raises:
      InputError: contradictory settings, or a backend that is not there. One that does not answer, and processes that
        do not arrive, end this process with exit code 2 and a message.
    """
    launcher = launcher_of(settings, os.environ, in_tpu_vm=running_in_cloud_tpu_vm)
    asked = _ask_for(settings.platform)
    if launcher is not None and not failures.started():
        _join(settings, launcher, saves_when_told)
    _bring_up(asked, settings.start_seconds if launcher else SECONDS_TO_START)


def launcher_of(
    settings: config.Processes, environment: Mapping[str, str], *, in_tpu_vm: bool
) -> Literal['settings', 'slurm', 'tpu'] | None:
    """Who says which processes there are: the settings, SLURM, a TPU pod; or None, where there is just this one.

    InputError where the settings contradict each other. A TPU's metadata server is asked only in a TPU's machine.
    """
    _check(settings)
    if settings.coordinator is not None:
        return 'settings'
    if all(name in environment for name in _SLURM) and int(environment['SLURM_NTASKS']) > 1:
        return 'slurm'
    if settings.platform not in ('any', 'tpu') or (environment.get('JAX_PLATFORMS') or 'tpu').split(',')[0] != 'tpu':
        return None
    if int(environment.get('MEGASCALE_NUM_SLICES') or 1) > 1:
        return 'tpu'
    hosts = environment.get('TPU_PROCESS_ADDRESSES') or environment.get('TPU_WORKER_HOSTNAMES')
    if hosts:
        return 'tpu' if ',' in hosts else None
    return 'tpu' if in_tpu_vm and not environment.get('TPU_SKIP_MDS_QUERY') else None


def _check(settings: config.Processes) -> None:
    given = {name: getattr(settings, name) for name in ('coordinator', 'count', 'index')}
    absent = [f'processes.{name}' for name, value in given.items() if value is None]
    if absent and len(absent) < len(given):
        there = ', '.join(f'processes.{name}' for name, value in given.items() if value is not None)
        raise InputError(f'{there} needs {" and ".join(absent)} too: coordinator, count and index go together.')
    for name in ('start_seconds', 'heartbeat_seconds'):
        if getattr(settings, name) < 1:
            raise InputError(f'processes.{name} must be at least 1, not {getattr(settings, name)}.')
    if absent:
        return
    if settings.count < 1:
        raise InputError(f'processes.count must be at least 1, not {settings.count}.')
    if not 0 <= settings.index < settings.count:
        raise InputError(
            f'processes.index counts from 0 to {settings.count - 1} (processes.count {settings.count}), '
            f'not {settings.index}.'
        )
    host, _, port = settings.coordinator.rpartition(':')
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f'processes.coordinator is HOST:PORT of process 0, not {settings.coordinator!r}.')


def _ask_for(platform: str) -> str | None:
    """Tells JAX which backend to bring up; gives its name, or None where any will do."""
    named = (jax.config.jax_platforms or '').split(',')[0]
    asked = next((name for name, spellings in NAMES.items() if named in spellings), None)
    if platform == 'any':
        platform = asked
    if named and asked != platform:
        raise InputError(
            f'processes.platform is {platform}, but JAX_PLATFORMS={jax.config.jax_platforms} asks for another. '
            'Unset one of them.'
        )
    if platform is not None and named != 'rocm':
        _check_installed(platform)
    if platform is not None and not named:
        # Named, a backend that does not come up says why; unnamed, JAX would go on with the CPU.
        names = {'cpu': 'cpu', 'gpu': 'cuda,cpu', 'tpu': 'tpu,cpu'}
        jax.config.update('jax_platforms', names[platform])
    return platform


def _check_installed(platform: str) -> None:
    if platform == 'tpu' and not _installed('libtpu') and 'TPU_LIBRARY_PATH' not in os.environ:
        raise InputError("The tpu was asked for, but libtpu is not installed: pip install 'jaxpo[tpu]'.")
    if platform == 'gpu' and not any(map(_installed, CUDA_PLUGINS)):
        raise InputError("The gpu was asked for, but JAX has no CUDA plugin: pip install 'jaxpo[cuda]'.")


def _installed(module: str) -> bool:
    found = importlib.util.find_spec(module)
    return found is not None and found.origin is not None  # a mere folder of that name has none


def _join(settings: config.Processes, launcher: str, saves_when_told: bool) -> None:
    """Waits until all processes are there, and from then on looks whether one of them has failed."""
    where: dict[str, Any] = {}
    if launcher == 'settings':
        if settings.index == 0:
            _check_port(settings.coordinator)
        where = {
            'coordinator_address': settings.coordinator,
            'num_processes': settings.count,
            'process_id': settings.index,
            'cluster_detection_method': 'deactivate',
        }
    elif launcher == 'slurm':
        where = {'cluster_detection_method': 'slurm'}
    told = f'{settings.count} at {settings.coordinator}' if launcher == 'settings' else f'as {launcher} has them'
    late = (
        f'processes: not all of them ({told}) had arrived after {settings.start_seconds} s (processes.start_seconds). '
        'Is each started, with its own processes.index, and does it reach the first?'
    )
    # Where nobody asks for it, a SIGTERM that is only noted would keep the process alive until it is killed.
    jax.config.update('jax_enable_preemption_service', saves_when_told)
    with _within(settings.start_seconds, late, code=75):  # as who comes late may come the next time
        jax.distributed.initialize(
            **where,
            # Ours ends first: JAX would end the process with a stack trace in place of a message.
            initialization_timeout=settings.start_seconds + 60,
            heartbeat_timeout_seconds=settings.heartbeat_seconds,
        )
    failures.watch()


def _check_port(coordinator: str) -> None:
    """InputError where the port is taken: the processes would otherwise talk to whoever has it."""
    port = int(coordinator.rpartition(':')[2])
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(('', port))
        except OSError as error:
            raise InputError(
                f'processes.coordinator: port {port} of this machine cannot be used ({error.strerror}).'
            ) from None


def _bring_up(asked: str | None, seconds: float) -> None:
    """Starts the backend. InputError where it is not the one asked for."""
    what = f'the {asked}' if asked else 'a device'
    late = (
        f'processes: {what} did not answer within {seconds:.0f} s. Another process may hold it: end that one first, '
        'or choose another with processes.platform or JAX_PLATFORMS.'
    )
    with _within(seconds, late, code=2):
        try:
            found = jax.default_backend()
        except (RuntimeError, AssertionError) as error:
            # JAX asserts, without a word, that there is any of the backends it was told to use.
            reason = str(error) or 'no plugin of that name is installed'
            raise InputError(f'JAX_PLATFORMS={jax.config.jax_platforms}: {reason}') from None
    if asked and found != asked:
        raise InputError(f'The {asked} was asked for, but JAX found only the {found}: is there one, and its plugin?')


@contextlib.contextmanager
def _within(seconds: float, message: str, code: int) -> Iterator[None]:
    """Ends the process with `code` where the block takes longer: it may wait in a driver, beyond any exception."""

    def give_up():
        failures.say(message)
        os._exit(code)

    with failures.overdue(seconds, give_up):
        yield


def agree(value: Value) -> Value:
    """What process 0 has of a value that JSON can hold, on every process. All must call it."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(1 << max(size - 1, 0).bit_length(), np.uint8)  # few shapes, few compilations
    if jax.process_index() == 0:
        padded[:size] = text
    return json.loads(multihost_utils.broadcast_one_to_all(padded)[:size].astype(np.uint8).tobytes())


def decide(function: Callable[[], Value]) -> Value:
    """What `function` gives process 0, which alone calls it, on every process. Its errors end all (`failures.end`)."""
    return agree(function() if jax.process_index() == 0 else None)


def wait_for_all(name: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def interrupted(step: int) -> bool:
    """Whether all processes stop after `step`, as one of them was sent SIGTERM. To be asked at every step, by all."""
    return multihost_utils.reached_preemption_sync_point(step)
