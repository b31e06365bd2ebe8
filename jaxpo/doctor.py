"""`jaxpo doctor`: are this machine, its packages, devices and directories fit for a run, and what mends them."""

import dataclasses
import email.utils
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import huggingface_hub.constants
import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape

from jaxpo import health, storage
from jaxpo.console import bytes_text
from jaxpo.errors import InputError

FREE_DISK, FREE_MEMORY = 10 * 2**30, 2 * 2**30  # bytes below which it warns
SECONDS_TO_END = 30.0  # that the check of devices gets beyond its own limit
CLOCK_SECONDS = 60.0  # Google refuses tokens of clocks that are minutes wrong
NAME_WIDTH = 19
EXTRAS = ('', 'tpu', 'cuda12', 'cuda13')  # of jax, whose packages a machine may have
INSTALL = {'cpu': 'jax', 'gpu': 'jax[cuda12]', 'tpu': 'jax[tpu]'}


class Check(NamedTuple):
    """One thing that was looked at."""

    name: str
    ok: bool
    found: str
    mend: str  # what to do where it is not ok


def doctor(arguments: Sequence[str]) -> int:
    """Prints what was found; returns 0 where all is well, 1 where something is to be mended. InputError: bad words."""
    description = 'Are this machine, its packages, devices and directories fit for a run?'
    options = health.options_of('jaxpo doctor', description, arguments)
    directory = storage.path(options.directory or '.')
    # Not the console of runs: it asks JAX for its devices, which this process leaves alone.
    out, checks = Console(highlight=False, soft_wrap=True), []
    for check in _checks(options, directory):
        checks.append(check)
        mark = '[green]ok[/green]   ' if check.ok else '[bold red]FAILS[/bold red]'
        out.print(f'{mark}  {check.name:<{NAME_WIDTH}}  {escape(check.found)}')
        if not check.ok:
            out.print(f'{"":{NAME_WIDTH + 9}}-> {escape(check.mend)}')
    failing = sum(not check.ok for check in checks)
    out.print(f'{failing} of {len(checks)} checks fail.' if failing else 'All is well.')
    return 1 if failing else 0


def _checks(options: health.Options, directory: storage.Path) -> Iterator[Check]:
    yield python()
    yield packages()
    yield accelerator_packages(options.processes.platform)
    yield from devices(options)
    yield round_trip(directory)
    if storage.is_remote(directory):
        yield clock()
    yield disk(directory)
    yield memory()
    yield hugging_face()


def python() -> Check:
    """Python against what the package asks for."""
    wanted = importlib.metadata.metadata('jaxpo')['Requires-Python']
    found = platform.python_version()
    return Check('python', found in SpecifierSet(wanted), found, f'jaxpo needs Python {wanted}: make an environment.')


def packages() -> Check:
    """Every package that jaxpo needs, against its floor."""
    needed = _requirements('jaxpo')
    wrong = [_wrong(one) for one in needed if _wrong(one)]
    mend = 'pip install -U ' + ' '.join(f"'{_bare(one)}'" for one in needed if _wrong(one))
    return Check('packages', not wrong, ', '.join(wrong) or f'all {len(needed)}, as new as jaxpo needs', mend)


def accelerator_packages(asked: str) -> Check:
    """jaxlib, libtpu and the CUDA plugins against what the installed jax goes with."""
    bound = {_bare(one): one for extra in EXTRAS for one in _requirements('jax', extra) if _version(one.name)}
    wrong = [_wrong(one) for one in bound.values() if _wrong(one)]
    if asked == 'tpu' and not _version('libtpu'):
        wrong.append('libtpu is not installed')
    if asked == 'gpu' and not any(name.startswith('jax-cuda') for name in _installed()):
        wrong.append('no CUDA plugin is installed')
    jax = _version('jax')
    others = dict.fromkeys(one.name for one in bound.values() if re.match('jaxlib|libtpu|jax-cuda', one.name))
    found = ', '.join([f'jax {jax}', *(f'{name} {_version(name)}' for name in others)])
    mend = f"pip install '{INSTALL.get(asked, 'jax')}=={jax}', which brings those that belong to it."
    return Check('jax and its backend', not wrong, ', '.join(wrong) or found, mend)


def _requirements(package: str, extra: str = '') -> list[Requirement]:
    """What a package needs, by itself or with one of its extras."""
    needed = map(Requirement, importlib.metadata.requires(package) or [])
    return [one for one in needed if one.marker is None or one.marker.evaluate({'extra': extra})]


def _installed() -> list[str]:
    return [found.metadata['Name'] or '' for found in importlib.metadata.distributions()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _wrong(requirement: Requirement) -> str:
    """What is wrong with the installed version of a package, or nothing."""
    version = _version(requirement.name)
    if version is None:
        return f'{requirement.name} is not installed'
    if not requirement.specifier.contains(version, prereleases=True):
        return f'{requirement.name} {version} is not {requirement.specifier}'
    return ''


def _bare(requirement: Requirement) -> str:
    return f'{requirement.name}{requirement.specifier}'


def devices(options: health.Options) -> Iterator[Check]:
    """Backend, hosts and devices, as another process finds them: one that hangs in a driver can be ended."""
    lines, error = _health(options)
    host = next((line for line in lines if 'backend' in line), None)
    failures = [failure for line in lines for failure in line.get('failures', line.get('summary', {}).get('failures'))]
    absent = next((line['missing'] for line in lines if 'missing' in line), None)
    asked = options.processes.platform
    start = 'Start `jaxpo doctor` on every host at once, and see that the first is reachable from the others.'
    if absent:
        yield Check('hosts', False, f'missing: {", ".join(absent)}', start)
    elif host is None:
        mend = f"Is the device held by another process? Is the backend installed: pip install '{INSTALL.get(asked)}'?"
        if asked == 'any':
            mend = 'Name the backend with --platform cpu, gpu or tpu, to be told what keeps it away.'
        yield Check('backend', False, '; '.join(failures) or error, mend)
    else:
        wanted = '' if asked == 'any' else f', as asked for ({asked})'
        yield Check('backend', True, f'{host["backend"]} ({host["device"]}){wanted}', '')
        what = f'{host["devices"]} on {host["processes"]} host(s), which add up and multiply alike'
        yield Check('devices', not failures, '; '.join(failures) or what, _mend_devices(failures, start))


def _mend_devices(failures: Sequence[str], start: str) -> str:
    if any('hosts answer' in failure for failure in failures):
        return start
    if any('bytes of a device are free' in failure for failure in failures):
        return 'End the process that holds the device.'
    return 'Take the named host or device out of service, or make the slice anew.'


def _health(options: health.Options) -> tuple[list[dict[str, Any]], str]:
    """Lines of JSON of the check of devices in a process of its own, and what it said last besides."""
    try:
        ended = subprocess.run(
            command_of(options), capture_output=True, text=True, timeout=options.seconds + SECONDS_TO_END
        )
    except subprocess.TimeoutExpired:
        return [], f'no answer within {options.seconds + SECONDS_TO_END:.0f} s'
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith('{')]
    said = [line for line in ended.stderr.splitlines() if line.strip()]
    return lines, said[-1].removeprefix('jaxpo: ') if said else f'it ended with code {ended.returncode}'


def command_of(options: health.Options) -> list[str]:
    """The words that start the check of devices with the same options, its directory aside."""
    command = [sys.executable, '-m', 'jaxpo.health', '--seconds', str(options.seconds)]
    command += [] if options.hosts is None else ['--hosts', str(options.hosts)]
    for name, value in dataclasses.asdict(options.processes).items():
        command += [] if value is None else [f'--processes.{name}', str(value)]
    return command


def round_trip(directory: storage.Path) -> Check:
    """A file written, read and deleted, in the part of the directory that exists."""
    place = directory if storage.is_remote(directory) else storage.free_bytes(directory)[0]
    try:
        seconds = storage.round_trip(place)
    except InputError as problem:
        return Check('directory', False, str(problem), 'As it says; then name it again with --directory.')
    took = ', '.join(f'{name} {1000 * value:.0f} ms' for name, value in seconds.items())
    return Check('directory', True, f'{place}: {took}', '')


def clock() -> Check:
    """This machine's clock against that of Google's storage."""
    url = os.environ.get('STORAGE_EMULATOR_HOST', 'https://storage.googleapis.com')
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=10) as answer:
            date = answer.headers['Date']
    except urllib.error.HTTPError as answer:
        date = answer.headers['Date']
    except OSError as error:
        return Check('clock', False, f'{url} does not answer ({error})', 'Does this machine reach the network?')
    apart = time.time() - email.utils.parsedate_to_datetime(date).timestamp()
    mend = "Set this machine's clock: sudo chronyc makestep, or timedatectl set-ntp true."
    return Check('clock', abs(apart) < CLOCK_SECONDS, f'{apart:+.0f} s from that of {url}', mend)


def disk(directory: storage.Path) -> Check:
    """Free room where the run's files lie, or where those of a bucket are copied through."""
    if storage.is_remote(directory):
        directory = pathlib.Path(tempfile.gettempdir())
    existing, free = storage.free_bytes(directory)
    mend = f'Free at least {bytes_text(FREE_DISK)} there, or name another place with --directory (TMPDIR for buckets).'
    return Check('disk', free >= FREE_DISK, f'{bytes_text(free)} free in {existing}', mend)


def memory() -> Check:
    """The host's memory that is free."""
    told = psutil.virtual_memory()
    found = f'{bytes_text(told.available)} free of {bytes_text(told.total)}'
    return Check(
        'memory', told.available >= FREE_MEMORY, found, 'End other processes of this host, or take a larger one.'
    )


def hugging_face() -> Check:
    """Where models and data of the hub are kept."""
    cache = pathlib.Path(huggingface_hub.constants.HF_HUB_CACHE)
    existing, free = storage.free_bytes(cache)
    offline = ', offline' if huggingface_hub.constants.HF_HUB_OFFLINE else ''
    mend = f'Make {existing} writable, or name another cache with HF_HOME.'
    return Check('hub cache', os.access(existing, os.W_OK), f'{cache}: {bytes_text(free)} free{offline}', mend)
