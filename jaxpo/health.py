"""Whether the devices of all hosts work together: counted, added up, multiplied, compared, and their memory free.

`python3 tpu_setup/health_check.py` on every host prints a line of JSON each, and a summary on process 0. Exit code 0
where all is well, 1 where something is not, 2 for bad input.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import socket
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpo import config, failures, processes, roll_call, storage
from jaxpo.errors import InputError

SEED = 0
SIZE, ROUNDS = 512, 8  # of the matrices that are multiplied
FREE_SHARE = 0.9  # of a device's memory, before anything of ours is there
CLOCK_SECONDS = 5.0  # hosts' clocks may differ by this much
# Devices of one accelerator type, TYPE-N: N over this. Some count cores, of which a device has two.
PER_DEVICE = {'v2': 1, 'v3': 1, 'v4': 2, 'v5p': 2, 'v5litepod': 1, 'v5e': 1, 'v6e': 1}


@dataclasses.dataclass(frozen=True)
class Options:
    platform: Literal['any', 'cpu', 'gpu', 'tpu'] = 'any'
    """Backend that must be there; `any` takes what JAX finds."""
    hosts: int | None = None
    """Processes that must be there, one a host; None: as many as the slice, SLURM or `processes` say."""
    directory: str | None = None
    """Directory to write to, read from and delete in on every host: gs://BUCKET/DIRECTORY, or a local one."""
    seconds: int = 300
    """All must be over by then."""
    processes: config.Processes = config.Processes()


def options_of(program: str, description: str, arguments: Sequence[str]) -> Options:
    """The options, read from words of a command line. InputError where they contradict each other."""
    options = tyro.cli(Options, prog=program, description=description, args=list(arguments))
    for name in ('hosts', 'seconds'):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise InputError(f'{name} must be at least 1, not {getattr(options, name)}.')
    ours, theirs = options.platform, options.processes.platform
    if 'any' not in (ours, theirs) and ours != theirs:
        raise InputError(f'platform {ours} and processes.platform {theirs} contradict each other.')
    # Half of the time for all to come, so that there is time to say who did not.
    seconds = min(options.processes.start_seconds, max(1, options.seconds // 2))
    asked = dataclasses.replace(options.processes, platform=theirs if ours == 'any' else ours, start_seconds=seconds)
    processes.launcher_of(asked, {}, in_tpu_vm=False)  # raises where they do not belong together
    return dataclasses.replace(options, processes=asked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks this host with all others; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = options_of('health_check.py', 'Do the devices of all hosts work together?', words)
        with _over_within(options.seconds):
            return _check(options)
    except InputError as problem:
        _say({'ok': False, 'failures': [str(problem)]})
        failures.end(2, str(problem))
        return 2


def _check(options: Options) -> int:
    place = roll_call.place_of(options.processes, options.processes.start_seconds)
    if place is not None:
        absent = roll_call.missing(place, roll_call.call(place, options.processes.start_seconds))
        if absent:
            failure = f'{len(absent)} of {place.count} hosts are missing: {", ".join(absent)}'
            _say({'process': place.index, 'ok': False, 'missing': absent, 'failures': [failure]})
            return 1
    processes.start(options.processes)
    line = _this_host(options)
    _say(line)
    found = _of_all(line)
    faults = _disagreements(found, options)
    if jax.process_index() == 0:
        _say({'summary': {**_counts(), 'failures': faults}, 'ok': not faults})
    processes.wait_for_all('health checked')
    if failures.started():
        jax.distributed.shutdown()
    return 1 if faults else 0


def _this_host(options: Options) -> dict[str, Any]:
    """What this host finds on its own and together with the others."""
    memory = [_memory(device) for device in jax.local_devices()]
    faults = []
    for free in memory:
        if free is not None and free['free'] < FREE_SHARE * free['limit']:
            faults.append(f'only {free["free"]} of {free["limit"]} bytes of a device are free')
    checksums = [_checksum(device) for device in jax.local_devices()]
    total = _sum_over_devices()
    if total != jax.device_count():
        faults.append(f'the devices add up to {total}, and are {jax.device_count()}')
    trip = None
    if options.directory is not None:
        try:
            trip = storage.round_trip(storage.path(options.directory))
        except InputError as problem:
            faults.append(str(problem))
    return {
        'host': socket.gethostname(),
        'process': jax.process_index(),
        **_counts(),
        'local_devices': [device.id for device in jax.local_devices()],
        'sum': total,
        'checksums': checksums,
        'memory': memory,
        'directory_seconds': trip,
        'failures': faults,
        'ok': not faults,
    }


def _counts() -> dict[str, Any]:
    return {
        'backend': jax.default_backend(),
        'device': jax.devices()[0].device_kind,
        'devices': jax.device_count(),
        'processes': jax.process_count(),
    }


def _memory(device: jax.Device) -> dict[str, int] | None:
    """Bytes of a device's memory, where its backend tells."""
    told = device.memory_stats() or {}
    if 'bytes_limit' not in told:
        return None
    return {'limit': told['bytes_limit'], 'free': told['bytes_limit'] - told['bytes_in_use']}


def _checksum(device: jax.Device) -> int:
    """CRC-32 of a product of bfloat16 matrices that is the same on all devices of a kind."""
    random = np.random.Generator(np.random.Philox(SEED))
    first, second = (random.standard_normal((SIZE, SIZE), np.float32).astype(jnp.bfloat16) for _ in range(2))
    product = _multiplied(jax.device_put(first, device), jax.device_put(second, device))
    return zlib.crc32(np.asarray(product).tobytes())


@jax.jit
def _multiplied(first: jax.Array, second: jax.Array) -> jax.Array:
    """`first` times `second` ROUNDS times, scaled to keep its size."""
    return jax.lax.fori_loop(0, ROUNDS, lambda _, product: (product @ second) * (SIZE**-0.5), first)


def _sum_over_devices() -> int:
    """One from each device of all hosts, added up by the devices."""
    mesh = Mesh(np.array(jax.devices()), ('all',))
    split = NamedSharding(mesh, P('all'))
    ones = jax.make_array_from_callback((mesh.size,), split, lambda index: np.ones(mesh.size, np.int32)[index])
    added = jax.shard_map(functools.partial(jax.lax.psum, axis_name='all'), mesh=mesh, in_specs=P('all'), out_specs=P())
    return int(jax.jit(added)(ones)[0])


def _of_all(line: dict[str, Any]) -> list[dict[str, Any]]:
    """The part of every host's line that is compared. All must call it."""
    told = {'host': line['host'], 'checksums': line['checksums'], 'failures': line['failures'], 'clock': time.time()}
    if jax.process_count() == 1:
        return [told]
    text = np.frombuffer(json.dumps(told).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(text.size))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: text.size] = text
    told_by_all = multihost_utils.process_allgather(padded)
    return [json.loads(row[:size].astype(np.uint8).tobytes()) for row, size in zip(told_by_all, sizes)]


def _disagreements(found: list[dict[str, Any]], options: Options) -> list[str]:
    """What is wrong, over all hosts."""
    faults = [f'{one["host"]}: {failure}' for one in found for failure in one['failures']]
    if options.hosts is not None and options.hosts != len(found):
        faults.append(f'{len(found)} hosts answer, and {options.hosts} were expected')
    expected = _expected_devices()
    if expected is not None and expected != jax.device_count():
        faults.append(f'{jax.device_count()} devices answer, and this slice has {expected}')
    if len({len(one['checksums']) for one in found}) > 1:
        held = ', '.join(f'{one["host"]} {len(one["checksums"])}' for one in found)
        faults.append(f'hosts differ in their number of devices: {held}')
    usual, _ = collections.Counter(sum for one in found for sum in one['checksums']).most_common(1)[0]
    for one in found:
        faults += [
            f'{one["host"]}: device {place} of the host multiplies to {checksum}, and most to {usual}'
            for place, checksum in enumerate(one['checksums'])
            if checksum != usual
        ]
    apart = max(one['clock'] for one in found) - min(one['clock'] for one in found)
    if apart > CLOCK_SECONDS:
        faults.append(f'clocks of hosts differ by {apart:.0f} s')
    return faults


def _expected_devices() -> int | None:
    """Devices of the accelerator type that the environment names, over all slices; None where it names none."""
    named = os.environ.get('TPU_ACCELERATOR_TYPE') or roll_call.told('ACCELERATOR_TYPE') or ''
    kind, _, number = named.partition('-')
    if kind not in PER_DEVICE or not number.isdigit():
        return None
    return int(number) // PER_DEVICE[kind] * int(roll_call.told('MEGASCALE_NUM_SLICES') or 1)


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


@contextlib.contextmanager
def _over_within(seconds: float) -> Iterator[None]:
    """Ends the process where the block takes longer: a host that waits for another one cannot be interrupted."""

    def give_up():
        failure = f'no answer within {seconds} s: is the check running on every host, and does none hang?'
        _say({'ok': False, 'failures': [failure]})
        os._exit(1)

    with failures.overdue(seconds, give_up):
        yield


if __name__ == '__main__':
    sys.exit(main())
