"""How processes find each other and their devices, what they agree on, and that none waits for one that is gone."""

import pathlib
import socket

import pytest
import tiny_processes
import tiny_runs

from jaxpo import failures, processes
from jaxpo.config import Processes
from jaxpo.errors import InputError

SLURM = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'node[1-2]',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1',
    'SLURM_LOCALID': '0',
}
# A process that jaxpo's command line would be: it tells what it fails of, and all others.
MEMBER = """\
import os, signal, sys, time
import jax
from jaxpo import config, failures, processes
from jaxpo.errors import InputError

what, coordinator, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
settings = config.Processes(coordinator=coordinator, count=2, index=index, start_seconds=100, heartbeat_seconds=10)
found = {'numbers': [1, 2.5, None], 'text': '\\u00fc' * 99}

def look():
    assert jax.process_index() == 0
    if what == 'first refuses':
        raise InputError('a bad setting')
    return found

try:
    processes.start(settings)
    assert jax.device_count() == 8
    assert processes.decide(look) == found and processes.agree(index) == 0
    if what == 'second refuses' and index == 1:
        raise InputError('a bad setting')
    if what == 'second dies' and index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    processes.wait_for_all('the end')
    print('done')
except Exception as problem:
    print('problem', problem, file=sys.stderr)
    failures.end(2 if isinstance(problem, InputError) else 1, str(problem))
"""


def members(what):
    coordinator = f'localhost:{tiny_processes.free_port()}'
    return tiny_processes.run_together([['-c', MEMBER, what, coordinator, index] for index in range(2)], timeout=120)


def test_processes_agree_on_what_process_0_finds():
    ended = members('nothing')
    assert [(one.code, one.out.splitlines()[-1]) for one in ended] == [(0, 'done')] * 2, ended


@pytest.mark.parametrize('what, other', [('first refuses', 1), ('second refuses', 0)])
def test_an_error_of_one_ends_both_with_its_message_and_code(what, other):
    ended = members(what)
    assert [one.code for one in ended] == [2, 2], ended
    assert f'jaxpo: process {1 - other}: a bad setting' in ended[other].error
    assert 'problem a bad setting' in ended[1 - other].error


def test_one_that_dies_without_a_word_leaves_no_other_waiting():
    first, second = members('second dies')
    assert second.code == -9 and first.code != 0
    assert first.seconds - second.seconds < tiny_processes.HEARTBEAT + failures.SECONDS_TO_LEAVE + 5


@pytest.mark.parametrize(
    'settings, environment, in_tpu_vm, launcher',
    [
        ({}, {}, False, None),
        ({'coordinator': 'here:8000', 'count': 2, 'index': 1}, SLURM, False, 'settings'),
        ({}, SLURM, False, 'slurm'),
        ({}, SLURM | {'SLURM_NTASKS': '1'}, False, None),
        ({}, {'SLURM_NTASKS': '2', 'SLURM_JOB_ID': '7'}, False, None),  # in an allocation, but not run by srun
        ({}, {'TPU_WORKER_HOSTNAMES': 'a,b'}, True, 'tpu'),
        ({}, {'TPU_WORKER_HOSTNAMES': 'localhost'}, True, None),
        ({}, {'TPU_PROCESS_ADDRESSES': 'a:1,b:1', 'TPU_WORKER_HOSTNAMES': 'a'}, True, 'tpu'),
        ({}, {'TPU_WORKER_HOSTNAMES': 'a', 'MEGASCALE_NUM_SLICES': '2'}, True, 'tpu'),
        ({}, {}, True, 'tpu'),  # only its metadata say how many
        ({}, {'TPU_SKIP_MDS_QUERY': '1'}, True, None),
        ({}, {'JAX_PLATFORMS': 'cpu', 'TPU_WORKER_HOSTNAMES': 'a,b'}, True, None),
        ({}, {'JAX_PLATFORMS': '', 'TPU_WORKER_HOSTNAMES': 'a,b'}, True, 'tpu'),
        ({'platform': 'cpu'}, {'TPU_WORKER_HOSTNAMES': 'a,b'}, True, None),
    ],
)
def test_who_says_which_processes_there_are(settings, environment, in_tpu_vm, launcher):
    assert processes.launcher_of(Processes(**settings), environment, in_tpu_vm=in_tpu_vm) == launcher


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'count': 2}, 'processes.count needs processes.coordinator and processes.index too'),
        ({'coordinator': 'here:8000', 'count': 2}, 'needs processes.index too'),
        ({'coordinator': 'here:8000', 'count': 2, 'index': 2}, 'counts from 0 to 1'),
        ({'coordinator': 'here:8000', 'count': 2, 'index': -1}, 'counts from 0 to 1'),
        ({'coordinator': 'here:8000', 'count': 0, 'index': 0}, 'processes.count must be at least 1'),
        ({'coordinator': 'here', 'count': 2, 'index': 0}, 'is HOST:PORT'),
        ({'coordinator': 'here:99999', 'count': 2, 'index': 0}, 'is HOST:PORT'),
        ({'heartbeat_seconds': 0}, 'processes.heartbeat_seconds must be at least 1'),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        processes.start(Processes(**settings))


def test_a_platform_that_jax_was_told_not_to_use_is_refused():
    with pytest.raises(InputError, match='platform is tpu, but JAX_PLATFORMS=cpu asks for another'):
        processes.start(Processes(platform='tpu'))


def has_accelerator():
    return any(pathlib.Path(f'/dev/{name}').exists() for name in ('nvidia0', 'accel0', 'vfio/0', 'kfd'))


@pytest.mark.skipif(has_accelerator(), reason='there may be what is asked for')
def test_no_command_falls_back_to_the_cpu(tmp_path):
    path = tiny_runs.write_module(tmp_path)
    commands = [['-m', 'jaxpo', 'train', path, '--processes.platform', name] for name in ('tpu', 'gpu')]
    ended = tiny_processes.run_together(commands, [{'JAX_PLATFORMS': ''}] * 2, timeout=120)
    for name, extra, one in zip(('tpu', 'gpu'), ('jaxpo[tpu]', 'jaxpo[cuda]'), ended):
        assert one.code == 2, one.error
        missing = extra in one.error or "Unable to initialize backend '" in one.error
        assert name in one.error and missing and 'Traceback' not in one.error
    assert not (tmp_path / 'run').exists()


START = """\
import sys, time
import jax
from jaxpo import config, processes
from jaxpo.errors import InputError
settings = {}
if sys.argv[1] == 'hang':
    processes.SECONDS_TO_START = 1
    jax.default_backend = lambda: time.sleep(60)  # as a driver whose device another process holds
if sys.argv[1] == 'late':
    settings = dict(coordinator=sys.argv[2], count=2, index=1, start_seconds=2)
try:
    processes.start(config.Processes(**settings))
except InputError as problem:
    print(problem, file=sys.stderr)
    sys.exit(2)
"""


@pytest.mark.skipif(has_accelerator(), reason='there may be what is asked for')
def test_what_is_not_there_ends_a_start_with_2_and_a_reason():
    cases = {
        'JAX_PLATFORMS=cuda,cpu': ({'JAX_PLATFORMS': 'cuda,cpu'}, 'gpu was asked for'),
        'JAX_PLATFORMS=tpu': ({'JAX_PLATFORMS': 'tpu'}, 'tpu'),
        'JAX_PLATFORMS=cup': ({'JAX_PLATFORMS': 'cup'}, "Unable to initialize backend 'cup'"),
        'hang': ({}, 'the cpu did not answer within 1 s'),
        'late': ({}, 'had arrived after 2 s'),
    }
    coordinator = f'localhost:{tiny_processes.free_port()}'
    ended = tiny_processes.run_together(
        [['-c', START, name, coordinator] for name in cases], [environment for environment, _ in cases.values()]
    )
    for name, (_, message), one in zip(cases, cases.values(), ended):
        assert one.code == (75 if name == 'late' else 2) and message in one.error, (name, one)
        assert one.seconds < 60


def test_a_port_that_is_taken_is_named():
    with socket.socket() as taken:
        taken.bind(('', 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f'port {port} of this machine cannot be used'):
            processes.start(Processes(coordinator=f'localhost:{port}', count=2, index=0))
