"""What is broken is named, with what mends it; what hangs ends by itself; and a healthy machine is called well."""

import http.server
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from jaxpo import cli, config, doctor, failures, health, roll_call

CPU = config.Processes(platform='cpu')


def free_address():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{probe.getsockname()[1]}'


def called(indices, count, seconds, names=()):
    """What each of these processes is told, of `count` that there should be."""
    address, told = free_address(), {}

    def call(index):
        told[index] = roll_call.call(roll_call.Place(address, count, index, names), seconds)

    threads = [threading.Thread(target=call, args=(index,)) for index in indices]
    for thread in threads:
        thread.start()
    if 0 in indices:
        knock(address)
    for thread in threads:
        thread.join()
    return told


def knock(address):
    """Somebody else at the door, who says nothing that is understood, and somebody who belongs elsewhere."""
    host, port = address.split(':')
    said, deadline = [b'GET / HTTP/1.1\n', b'[99, "stranger"]\n'], time.monotonic() + 10
    while said and time.monotonic() < deadline:
        try:
            with socket.create_connection((host, int(port))) as line:
                line.sendall(said.pop())
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_all_who_come_are_known_to_all():
    everyone = {index: socket.gethostname() for index in range(3)}
    assert called([2, 0, 1], 3, seconds=20) == {0: everyone, 1: everyone, 2: everyone}


def test_who_does_not_come_is_named():
    place = roll_call.Place('', 4, 0, ('a', 'b', 'c', 'd'))
    told = called([0, 2], 4, seconds=1, names=place.names)
    assert told[0] == told[2]
    assert roll_call.missing(place, told[0]) == ['process 1 (b)', 'process 3 (d)']
    assert roll_call.missing(place._replace(names=()), told[2]) == ['process 1', 'process 3']


def test_the_first_is_named_where_it_does_not_answer():
    assert called([1], 2, seconds=0.5) == {1: None}
    assert roll_call.missing(roll_call.Place('', 2, 1, ()), None) == ['process 0']


def test_a_process_alone_has_no_place():
    assert roll_call.place_of(CPU, 1) is None
    placed = config.Processes(coordinator='here:1', count=3, index=2)
    assert roll_call.place_of(placed, 1) == roll_call.Place('here:1', 3, 2, ())


def checked(capsys, *words):
    """The exit code of a health check, and its lines."""
    code = health.main(words)
    return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_healthy_devices_are_called_so(capsys, tmp_path):
    code, (host, summary) = checked(capsys, '--platform', 'cpu', '--directory', str(tmp_path), '--hosts', '1')
    assert code == 0 and host['ok'] and summary['ok'] and not list(tmp_path.iterdir())
    assert host['sum'] == host['devices'] == len(host['local_devices']) == jax.device_count()
    assert len(set(host['checksums'])) == 1 and len(host['checksums']) == jax.device_count()
    assert set(host['directory_seconds']) == {'write', 'read', 'delete'}


@pytest.fixture(scope='module')
def computed():
    """What the devices really compute, so that the tests below need not."""
    return health._checksum(jax.devices()[0])


def test_a_device_that_multiplies_otherwise_is_named(capsys, monkeypatch, computed):
    monkeypatch.setattr(health, '_checksum', lambda device: computed + (device.id == 3))
    code, (_, summary) = checked(capsys)
    assert code == 1
    assert summary['summary']['failures'] == [
        f'{socket.gethostname()}: device 3 of the host multiplies to {computed + 1}, and most to {computed}'
    ]


def test_a_checksum_is_of_every_bit(computed, monkeypatch):
    monkeypatch.setattr(health, '_multiplied', jax.jit(lambda first, second: first.at[7, 9].set(0)))
    one = health._checksum(jax.devices()[0])
    monkeypatch.setattr(health, '_multiplied', jax.jit(lambda first, second: first))
    assert len({one, health._checksum(jax.devices()[0]), computed}) == 3


def test_what_is_missing_or_held_is_said(capsys, monkeypatch, computed, tmp_path):
    monkeypatch.setattr(health, '_checksum', lambda device: computed)
    monkeypatch.setattr(health, '_memory', lambda device: {'limit': 100, 'free': 89 if device.id == 1 else 90})
    monkeypatch.setattr(health, '_sum_over_devices', lambda: 7)
    monkeypatch.setenv('ACCELERATOR_TYPE', 'v5p-32')
    monkeypatch.setattr(roll_call, 'running_in_cloud_tpu_vm', True)
    monkeypatch.setenv('MEGASCALE_NUM_SLICES', '2')
    code, (host, summary) = checked(capsys, '--hosts', '4', '--directory', str(tmp_path / 'none'))
    assert code == 1 and not host['ok']
    assert host['failures'][:2] == [
        'only 89 of 100 bytes of a device are free',
        'the devices add up to 7, and are 8',
    ]
    assert 'cannot write a file there' in host['failures'][2] and len(host['failures']) == 3
    assert summary['summary']['failures'][3:] == [
        '1 hosts answer, and 4 were expected',
        '8 devices answer, and this slice has 32',
    ]


def test_hosts_that_differ_are_said():
    found = [
        {'host': 'a', 'checksums': [1, 1], 'failures': [], 'clock': 100.0},
        {'host': 'b', 'checksums': [1], 'failures': [], 'clock': 107.0},
    ]
    assert health._disagreements(found, health.Options()) == [
        'hosts differ in their number of devices: a 2, b 1',
        'clocks of hosts differ by 7 s',
    ]


def test_a_host_that_is_alone_ends_by_itself(capsys):
    words = ['--seconds', '2', '--processes.coordinator', free_address(), '--processes.count', '2']
    started = time.monotonic()
    code, (line,) = checked(capsys, *words, '--processes.index', '0')
    assert code == 1 and line['missing'] == ['process 1'] and time.monotonic() - started < 10
    assert not failures.started()


def test_a_check_that_hangs_is_ended(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(os, '_exit', lambda code: ended.set() if code == 1 else None)
    with health._over_within(0.05):
        assert ended.wait(10)
    assert json.loads(capsys.readouterr().out)['failures'][0].startswith('no answer within 0.05 s')
    ended.clear()
    with health._over_within(0.1):
        pass
    assert not ended.wait(0.3)


def test_two_hosts_find_each_other(tmp_path):
    environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
    words = ['--processes.coordinator', free_address(), '--processes.count', '2', '--directory', str(tmp_path)]
    script = os.path.join(os.path.dirname(os.path.dirname(__file__)), 'tpu_setup', 'health_check.py')
    started = [
        subprocess.Popen(
            [sys.executable, script, *words, '--processes.index', str(index)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    said = [one.communicate(timeout=200) for one in started]
    assert [one.returncode for one in started] == [0, 0], said
    first, second = ([json.loads(line) for line in out.splitlines() if line.startswith('{')] for out, _ in said)
    assert first[0]['sum'] == second[0]['sum'] == 4 and first[0]['checksums'] == second[0]['checksums']
    assert [line['process'] for line in (first[0], second[0])] == [0, 1] and len(second) == 1
    assert first[1] == {'summary': {'backend': 'cpu', 'device': 'cpu', 'devices': 4, 'processes': 2, 'failures': []},
                        'ok': True}  # fmt: skip


@pytest.mark.parametrize(
    'words',
    [
        ('--hosts', '0'),
        ('--seconds', '0'),
        ('--platform', 'cpu', '--processes.platform', 'tpu'),
        ('--processes.count', '2'),
        ('--directory', 's3://bucket'),
    ],
)
def test_bad_words_end_with_code_2(words, monkeypatch, capsys):
    monkeypatch.setattr(doctor, '_health', lambda options: pytest.fail('started'))
    assert cli.main(['doctor', *words]) == 2
    assert 'jaxpo:' in capsys.readouterr().err


def test_a_healthy_machine_is_called_well(capsys, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    monkeypatch.setattr(doctor, 'FREE_DISK', 1)
    monkeypatch.setattr(doctor, 'FREE_MEMORY', 1)
    assert doctor.doctor(['--platform', 'cpu', '--seconds', '200']) == 0
    said = capsys.readouterr().out
    assert 'cpu (cpu), as asked for (cpu)' in said and 'add up and multiply alike' in said and 'All is well.' in said
    assert f'jax {jax.__version__}, jaxlib' in said and 'hf_secret' not in said


def test_what_fails_is_said_with_what_mends_it(capsys, monkeypatch):
    monkeypatch.setattr(doctor, '_checks', lambda *_: [doctor.Check('one', True, 'fine', ''),
                                                       doctor.Check('two', False, '[odd]', 'mend it')])  # fmt: skip
    assert cli.main(['doctor']) == 1
    assert capsys.readouterr().out.splitlines() == [
        f'ok     {"one":19}  fine',
        f'FAILS  {"two":19}  [odd]',
        f'{"":28}-> mend it',
        '1 of 2 checks fail.',
    ]


def installed(monkeypatch, **versions):
    """These packages in other versions, or (None) not at all."""
    real = importlib.metadata.version

    def version(package):
        found = versions[package] if package in versions else real(package)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(importlib.metadata, 'version', version)


def test_packages_are_held_to_their_floors(monkeypatch):
    assert doctor.python().ok and doctor.packages().ok
    installed(monkeypatch, optax='0.0.1', rich=None)
    check = doctor.packages()
    assert not check.ok and 'optax 0.0.1 is not >=' in check.found and 'rich is not installed' in check.found
    assert check.mend.startswith("pip install -U 'optax>=") and "'rich>=" in check.mend and 'jax>' not in check.mend
    monkeypatch.setattr(doctor.platform, 'python_version', lambda: '3.9.1')
    assert not doctor.python().ok


def test_jax_goes_with_what_belongs_to_it(monkeypatch):
    assert doctor.accelerator_packages('cpu').ok
    check = doctor.accelerator_packages('tpu') if doctor._version('libtpu') is None else None
    assert check is None or (not check.ok and 'libtpu is not installed' in check.found)
    installed(monkeypatch, libtpu='0.0.1')
    for platform in ('any', 'tpu'):
        check = doctor.accelerator_packages(platform)
        assert not check.ok and 'libtpu 0.0.1 is not ==' in check.found
    assert f"'jax[tpu]=={jax.__version__}'" in check.mend
    installed(monkeypatch, jaxlib='0.1')
    assert 'jaxlib 0.1 is not' in doctor.accelerator_packages('any').found


def devices(monkeypatch, *lines, error='', platform='tpu'):
    monkeypatch.setattr(doctor, '_health', lambda options: (list(lines), error))
    return list(doctor.devices(health.Options(processes=config.Processes(platform=platform))))


def test_hosts_and_devices_are_told_apart(monkeypatch):
    (hosts,) = devices(monkeypatch, {'ok': False, 'missing': ['process 1 (b)'], 'failures': ['1 of 2']})
    assert hosts.name == 'hosts' and hosts.found == 'missing: process 1 (b)' and 'every host at once' in hosts.mend
    (backend,) = devices(monkeypatch, error='the tpu did not answer')
    assert not backend.ok and backend.found == 'the tpu did not answer' and 'jax[tpu]' in backend.mend
    (backend,) = devices(monkeypatch, {'ok': False, 'failures': ['no plugin']}, platform='any')
    assert backend.found == 'no plugin' and '--platform' in backend.mend
    host = {'backend': 'tpu', 'device': 'TPU v5e', 'devices': 8, 'processes': 2, 'failures': []}
    backend, found = devices(monkeypatch, host, {'summary': host, 'ok': True})
    assert backend.ok and found.ok and found.found.startswith('8 on 2 host(s)')
    summary = {'summary': host | {'failures': ['1 hosts answer, and 2 were expected']}, 'ok': False}
    backend, found = devices(monkeypatch, host, summary)
    assert backend.ok and not found.ok and 'every host' in found.mend


def test_the_check_of_devices_is_given_the_same_settings():
    options = health.options_of('jaxpo doctor', '', ['--platform', 'tpu', '--seconds', '30', '--hosts', '3'])
    words = doctor.command_of(options)
    assert health.options_of('health', '', words[3:]) == health.Options(
        hosts=3, seconds=30, processes=config.Processes(platform='tpu', start_seconds=15)
    )


def test_a_process_of_devices_that_cannot_begin_says_why():
    options = health.options_of('jaxpo doctor', '', ['--platform', 'tpu', '--seconds', '30'])
    lines, error = doctor._health(options)
    assert any('tpu' in failure.lower() for line in lines for failure in line['failures']) or 'tpu' in error.lower()


def test_room_and_clock_are_held_to_what_a_run_needs(monkeypatch, tmp_path):
    for check, limit in ((lambda: doctor.disk(tmp_path), 'FREE_DISK'), (doctor.memory, 'FREE_MEMORY')):
        monkeypatch.setattr(doctor, limit, 0)
        assert check().ok
        monkeypatch.setattr(doctor, limit, 2**70)
        assert not check().ok
    monkeypatch.setattr(doctor.huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    assert doctor.hugging_face().ok
    monkeypatch.setattr(os, 'access', lambda *_: False)
    assert not doctor.hugging_face().ok and str(tmp_path) in doctor.hugging_face().mend


@pytest.mark.parametrize(('hours', 'ok'), [(0, True), (1, False), (-1, False), (None, False)])
def test_the_clock_is_held_to_that_of_the_storage(monkeypatch, hours, ok):
    class Storage(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(400)

        def date_time_string(self, timestamp=None):
            return super().date_time_string(time.time() + 3600 * hours)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(('127.0.0.1', 0), Storage) as server:
        monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{server.server_port}')
        if hours is None:
            server.server_close()
        else:
            threading.Thread(target=server.handle_request).start()
        check = doctor.clock()
    assert check.ok == ok and ('does not answer' in check.found) == (hours is None)


def test_a_directory_that_cannot_be_written_is_said(monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    assert doctor.round_trip(tmp_path / 'not' / 'yet').ok
    check = doctor.round_trip(tmp_path / 'file')
    assert not check.ok and 'cannot write' in check.found
