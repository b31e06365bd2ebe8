"""A bucket on loopback: gs:// for real, its server in a process of its own."""

import functools
import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid

import pytest

MODULES = ('gcp_storage_emulator', 'gcsfs')

# gcsfs asks for a bucket's kind by gRPC, which the emulator does not speak. Read when gcsfs is imported.
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'


def skip_where_missing():
    """Leaves a module's tests out where the emulator is not installed."""
    if not all(importlib.util.find_spec(module) for module in MODULES):
        pytest.skip("needs pip install 'jaxpo[test]'", allow_module_level=True)


@functools.cache
def environment() -> dict[str, str]:
    """What a process needs to find the emulator, which is started once and lives as long as this process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    start = (
        'import sys, threading, os\n'
        'from gcp_storage_emulator.server import create_server\n'
        f'server = create_server("127.0.0.1", {port}, in_memory=True, default_bucket="bucket")\n'
        'server.start()\n'
        'sys.stdin.read()\n'  # ends with the process that holds the other end
        'os._exit(0)\n'
    )
    server = subprocess.Popen([sys.executable, '-c', start], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    url = f'http://127.0.0.1:{port}'
    deadline = time.monotonic() + 30
    while not _answers(f'{url}/storage/v1/b/bucket'):
        assert server.poll() is None and time.monotonic() < deadline, 'the emulator did not start'
        time.sleep(0.05)
    environment.server = server  # kept: its standard input ends when this process does
    return {
        'STORAGE_EMULATOR_HOST': url,
        'TENSORSTORE_GCS_HTTP_URL': url,
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x',
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
        'FSSPEC_GCS_TOKEN': 'anon',
        'FSSPEC_GCS_PROJECT': 'test',
    }


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope='module')
def bucket():
    """`gs://bucket/NAME`, a place nobody else writes to; this process finds it."""
    import fsspec

    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment().items():
            patched.setenv(name, value)
        patched.setitem(fsspec.config.conf, 'gcs', {'token': 'anon', 'project': 'test'})
        yield f'gs://bucket/{uuid.uuid4().hex[:8]}'
