"""worker.sh by itself: one run at a time, stopped by its process id file alone."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

WORKER = pathlib.Path(__file__).parents[2] / 'tpu_setup/worker.sh'


@pytest.fixture
def worker(tmp_path):
    (tmp_path / 'jaxpo').mkdir()

    def call(*words):
        environment = {'HOME': str(tmp_path), 'PATH': '/usr/bin:/bin'}
        command = ['bash', str(WORKER), *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    yield call
    for pid in tmp_path.glob('jaxpo_runs/*/pid'):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), 9)


def state(worker, name='run'):
    return worker('state', name).stdout.split(' ', 2)[2].strip()


def wait_for(worker, wanted):
    for _ in range(200):
        if state(worker) == wanted:
            return
        time.sleep(0.05)
    raise AssertionError(state(worker))


def test_states_of_a_run(worker, tmp_path):
    assert state(worker) == 'none'
    assert worker('start', 'run', 'bash', '-c', 'pwd; until [ -e go ]; do sleep 0.05; done; exit 7').returncode == 0
    assert state(worker) == 'running'
    (tmp_path / 'jaxpo/go').touch()
    wait_for(worker, 'ended 7')
    log = worker('log', 'run', '5').stdout
    assert f': {tmp_path}/jaxpo\n' in log


def test_a_second_start_is_refused_and_the_first_goes_on(worker):
    worker('start', 'run', 'sleep', '600')
    again = worker('start', 'run', 'sleep', '600')
    assert again.returncode == 2 and 'runs already' in again.stderr
    assert worker('start', 'other', 'true').returncode == 0
    assert state(worker) == 'running'


def test_stopping_lets_a_command_save_its_state(worker, tmp_path):
    saves = 'trap "sleep 0.3; exit 75" TERM; touch ready; while :; do sleep 0.05; done'
    worker('start', 'run', 'bash', '-c', saves)
    while not (tmp_path / 'jaxpo/ready').exists():
        time.sleep(0.02)
    assert worker('stop', 'run', '20').stdout.endswith('ended 75\n')


def test_what_does_not_stop_is_killed(worker, tmp_path):
    """And waited for: what holds much memory takes a moment to die, and holds the lock until then."""
    deaf = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)'
    worker(
        'start', 'run', sys.executable, '-c', f'{deaf}; held = b"1" * (1 << 29); open("ready", "w"); time.sleep(600)'
    )
    while not (tmp_path / 'jaxpo/ready').exists():
        time.sleep(0.02)
    assert worker('stop', 'run', '0').stdout.endswith('ended 137\n')
    assert state(worker) == 'ended 137'


def test_stopping_what_does_not_run_stops_nothing(worker, tmp_path):
    """Its process id may be another's by now."""
    worker('start', 'run', 'true')
    wait_for(worker, 'ended 0')
    other = subprocess.Popen(['sleep', '600'], start_new_session=True)
    (tmp_path / 'jaxpo_runs/run/pid').write_text(f'{other.pid}\n')
    assert worker('stop', 'run', '20').stdout.endswith('ended 0\n')
    assert other.poll() is None
    other.kill()
    other.wait()


def test_a_process_left_behind_still_counts_as_running(worker, tmp_path):
    """It would hold the TPU."""
    worker('start', 'run', 'bash', '-c', 'sleep 600 & true')
    while not (tmp_path / 'jaxpo_runs/run/exit').exists():
        time.sleep(0.02)
    assert state(worker) == 'running'
    worker('stop', 'run', '20')
    assert state(worker) == 'ended 0'


def test_a_run_that_was_killed_is_lost(worker, tmp_path):
    worker('start', 'run', 'sleep', '600')
    os.killpg(int((tmp_path / 'jaxpo_runs/run/pid').read_text()), 9)
    wait_for(worker, 'lost')
    assert worker('start', 'run', 'true').returncode == 0


def test_uv_is_fetched_at_its_version_and_told_to_edit_no_start_up_file(tmp_path, repository):
    tools, home = tmp_path / 'tools', tmp_path / 'home'
    uv = '#!/bin/bash\n[ "$1" = --version ] && echo "uv 0.13.9" || true\n'
    # The installer that this curl fetches would write to ~/.bashrc, as uv's does, unless it is told not to.
    installer = f'mkdir -p "${{UV_UNMANAGED_INSTALL:-$HOME/.bashrc}}"\ncp {tools}/uv "$UV_UNMANAGED_INSTALL/uv"\n'
    tools.mkdir()
    home.mkdir()
    (tools / 'installer').write_text(installer)
    for name, text in {'uv': uv, 'curl': f'#!/bin/bash\necho "$*" >{tools}/asked\ncp {tools}/installer "$6"\n'}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    command = ['bash', str(WORKER), 'setup', str(repository[0]), repository[1], '3.12', '0.13.9']
    environment = {'HOME': str(home), 'PATH': f'{tools}:/usr/bin:/bin'}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tools / 'asked').read_text().endswith('https://astral.sh/uv/0.13.9/install.sh\n')
    assert (home / '.local/bin/uv').exists()
    assert {path.name for path in home.iterdir()} == {'.local', 'jaxpo'}


@pytest.mark.parametrize('words', [(), ('dance',), ('start', 'run'), ('stop', 'run'), ('log', 'run', '5')])
def test_wrong_calls_are_refused(worker, words):
    assert worker(*words).returncode == 2
