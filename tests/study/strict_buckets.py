"""The bucket of tiny_buckets, which heeds preconditions: the emulator itself answers every request whatever it asks.

A server of its own, as the other tests need none. As Cloud Storage has it: a request that names a generation succeeds
where the object that stands there has that one (0: where there is none), and is answered with 412 otherwise.
"""

import functools
import socket
import subprocess
import sys
import time

import tiny_buckets

START = """
import http, os, sys
from gcp_storage_emulator import exceptions, server

def strict(handler):
    def answer(request, response, storage, *rest):
        wanted = request.query.get('ifGenerationMatch')
        if wanted is None:
            return handler(request, response, storage, *rest)
        name = request.params.get('object_id') or request.data['meta']['name']
        try:
            there = storage.get_file_obj(request.params['bucket_name'], name)['generation']
        except exceptions.NotFound:
            there = '0'
        if wanted == [there]:
            return handler(request, response, storage, *rest)
        response.status = http.HTTPStatus.PRECONDITION_FAILED
        response.json({'error': {'code': 412, 'message': 'conditionNotMet'}})
    return answer

server.HANDLERS = [
    (place, {method: strict(handler) for method, handler in handlers.items()}) for place, handlers in server.HANDLERS
]
server.create_server('127.0.0.1', int(sys.argv[1]), in_memory=True, default_bucket='bucket').start()
sys.stdin.read()  # ends with the process that holds the other end
os._exit(0)
"""


@functools.cache
def environment() -> dict[str, str]:
    """What a process needs to find the server, which is started once and lives as long as this process."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, '-c', START, str(port)], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    url = f'http://127.0.0.1:{port}'
    deadline = time.monotonic() + 30
    while not tiny_buckets._answers(f'{url}/storage/v1/b/bucket'):
        assert server.poll() is None and time.monotonic() < deadline, 'the emulator did not start'
        time.sleep(0.05)
    environment.server = server  # kept: its standard input ends when this process does
    return {
        'STORAGE_EMULATOR_HOST': url,
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
        'FSSPEC_GCS_TOKEN': 'anon',
        'FSSPEC_GCS_PROJECT': 'test',
    }
