"""gs:// paths on an emulator: what is written there is whole, found again, and the same as on a local disk."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.request
import uuid

import jax
import numpy as np
import pytest
import tiny_buckets
import tiny_runs

from jaxpo import checkpoint, commands, loading, metrics, run, storage, tabulate, train
from jaxpo.config import Reference, Train
from jaxpo.errors import InputError
from jaxpo.metrics import open_metrics, read_metrics
from jaxpo.references import table_files
from jaxpo.references.table import open_table, sequence_key

tiny_buckets.skip_where_missing()
bucket = tiny_buckets.bucket

IDENTITY = {'model': 'tiny', 'dtype': 'float32'}


@pytest.mark.parametrize('text', ['s3://bucket/run', 'gs:/bucket/run', 'gs://', 'gs:///run', 'gs://Bucket/run'])
def test_what_is_no_place_is_refused(text):
    with pytest.raises(InputError, match='gs://BUCKET/DIRECTORY'):
        storage.path(text)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(storage.PACKAGES, 'missing_module.part', 'missing-package')
    with pytest.raises(InputError, match=r"missing-package: pip install 'jaxpo\[gcs\]'"):
        storage.path('gs://bucket/run')
    assert storage.path('runs/one') == pathlib.Path('runs/one')


def test_a_bucket_stays_one_where_a_path_is_made_absolute(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = storage.path(bucket) / 'run'
    assert str(storage.absolute(place)) == f'{bucket}/run'
    assert storage.absolute(storage.path('run')) == tmp_path / 'run'


@pytest.mark.parametrize('remote', [True, False])
def test_a_round_trip_leaves_nothing(bucket, tmp_path, remote):
    place = storage.path(f'{bucket}/trip') if remote else tmp_path
    assert set(storage.round_trip(place)) == {'write', 'read', 'delete'}
    assert not place.exists() or not list(place.iterdir())


def test_what_others_write_is_seen(bucket):
    place = storage.path(f'{bucket}/shared')
    (place / 'ours').write_text('1')
    assert [path.name for path in place.iterdir()] == ['ours'] and not (place / 'theirs').exists()
    name = f'{place}/theirs'.removeprefix('gs://bucket/')
    url = f'{os.environ["STORAGE_EMULATOR_HOST"]}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}'
    urllib.request.urlopen(urllib.request.Request(url, data=b'2', method='POST')).close()
    assert sorted(path.name for path in place.iterdir()) == ['ours', 'theirs']
    assert [path.name for path in place.glob('th*')] == ['theirs'] and (place / 'theirs').read_text() == '2'


def test_what_cannot_be_written_is_said_before_training(bucket, tmp_path):
    experiment = tiny_runs.experiment(tmp_path, output='gs://nobodys-bucket/run')
    with pytest.raises(InputError, match='gs://nobodys-bucket/run: cannot write a file there .*gcloud storage buckets'):
        train.train(experiment)


def test_tables_in_a_bucket_that_is_not_there_are_said_before_anything_is_computed(bucket):
    with pytest.raises(InputError, match='gs://nobodys-bucket/tables: cannot be read .*gcloud storage buckets'):
        open_table('gs://nobodys-bucket/tables', IDENTITY, 'logps')


def test_tables_in_a_bucket_that_takes_nothing_are_said_before_anything_is_computed(root, monkeypatch, tmp_path):
    def refuse(path, content):
        raise PermissionError('Forbidden')

    tables = {'references': {'initial': Reference(table=True)}, 'tables': root}
    prepared = run.prepare(tiny_runs.experiment(tmp_path, **tables))
    monkeypatch.setattr(type(storage.path(root)), 'write_bytes', refuse)
    monkeypatch.setattr(tabulate, '_computer', None)
    with pytest.raises(InputError, match='cannot write a file there .*Forbidden'):
        tabulate.attach(prepared, run.read_pairs(prepared))


def rows(count, first=0):
    ids = [np.arange(number + 1, dtype=np.int32) for number in range(first, first + count)]
    return [sequence_key(one[:1], one) for one in ids], [-np.linspace(0, 1, one.size, dtype=np.float32) for one in ids]


@pytest.fixture
def root(bucket):
    return f'{bucket}/{uuid.uuid4().hex[:8]}'


def shards(table):
    return table_files.shard_names(table.directory)


def test_rows_are_read_by_another_process_as_they_were_written(root):
    reader = open_table(root, IDENTITY, 'logps')
    keys, values = rows(5)
    assert reader.missing(keys) == keys
    writer = open_table(root, IDENTITY, 'logps')
    writer.write(keys[:3], values[:3])
    assert reader.missing(keys) == keys[3:]
    writer.write(keys, values)
    assert not reader.missing(keys)
    for found, expected in zip(reader.read(keys), values, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert len(shards(reader)) == 2
    assert open_table(root, IDENTITY | {'dtype': 'bfloat16'}, 'logps').missing(keys) == keys


def test_writers_that_meet_leave_one_shard_where_they_agree_and_two_where_they_differ(root):
    keys, values = rows(3)
    table = open_table(root, IDENTITY, 'logps')
    table.write(keys, values)
    table_files.write_shard(table.directory, keys, values)
    assert len(shards(table)) == 1
    table_files.write_shard(table.directory, keys, [value - 1e-5 for value in values])
    assert len(shards(table)) == 2
    assert not open_table(root, IDENTITY, 'logps').missing(keys)


def test_a_shard_exists_when_its_manifest_does(root, monkeypatch):
    keys, values = rows(3)
    table, copy = open_table(root, IDENTITY, 'logps'), storage.copy

    def copy_all_but_the_last(source, target):
        if target.name == table_files.MANIFEST:
            raise OSError('the network is gone')
        copy(source, target)

    monkeypatch.setattr(storage, 'copy', copy_all_but_the_last)
    with pytest.raises(OSError, match='network'):
        table.write(keys, values)
    monkeypatch.undo()
    assert len(list(table.directory.glob('shard-*/*.arrow'))) == 1
    assert open_table(root, IDENTITY, 'logps').missing(keys) == keys
    table.write(keys, values)
    assert len(open_table(root, IDENTITY, 'logps')) == 3


@pytest.mark.parametrize(
    ('file', 'harm', 'what'),
    [
        ('data-00000-of-00001.arrow', 'flip', 'not as it was written'),
        ('data-00000-of-00001.arrow', 'lose', 'is missing'),
        ('state.json', 'flip', 'not as it was written'),
        ('shard.json', 'cut', 'cannot be read'),
        ('shard.json', 'lead away', 'names files elsewhere'),
    ],
)
def test_a_damaged_object_is_found(root, file, harm, what):
    table = open_table(root, IDENTITY, 'logps')
    table.write(*rows(3))
    path = table.directory / shards(table)[0] / file
    content = path.read_bytes()
    if harm == 'flip':
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif harm == 'cut':
        path.write_bytes(content[:-9])
    elif harm == 'lose':
        path.unlink()
    else:
        path.write_bytes(content.replace(b'state.json', b'../../x.js'))
    with pytest.raises(InputError, match=f'{path.parent} is damaged: .*{what}'):
        open_table(root, IDENTITY, 'logps')


def test_a_log_in_a_bucket_is_whole_whenever_it_is_published(bucket, monkeypatch):
    directory = storage.path(f'{bucket}/log')
    with open_metrics(directory, 0) as log:
        for step in range(1, 4):
            log.write(step, {'loss': 1.0 / step})
        assert not (directory / 'metrics.jsonl').exists()
        log.publish()
        assert [line['step'] for line in read_metrics(directory)] == [1, 2, 3]
        with monkeypatch.context() as patched:
            patched.setattr(storage, 'copy', None)  # nothing has changed
            log.publish()
        log.write(4, {'loss': 0.25})
        assert len(read_metrics(directory)) == 3
        monkeypatch.setattr(metrics, 'SECONDS_BETWEEN_COPIES', 0.0)
        log.write(5, {'loss': 0.2})
        assert len(read_metrics(directory)) == 5
        monkeypatch.undo()
        log.write(6, {'loss': 0.1})
    assert [line['step'] for line in read_metrics(directory)] == [1, 2, 3, 4, 5, 6]
    with open_metrics(directory, 4) as log:
        log.write(5, {'loss': 5.0})
    assert [line['step'] for line in read_metrics(directory)] == [1, 2, 3, 4, 5]
    assert read_metrics(directory)[-1]['loss'] == 5.0
    events = sorted(path.name for path in (directory / 'tensorboard').iterdir())
    assert len(events) == 2 and events[0].endswith('.0') and events[1].endswith('.4')


def test_what_is_exported_to_a_bucket_has_its_config_last(bucket, tmp_path, monkeypatch):
    written, copy = [], storage.copy
    monkeypatch.setattr(storage, 'copy', lambda source, target: (written.append(target.name), copy(source, target)))
    experiment = tiny_runs.experiment(tmp_path, output=f'{bucket}/exported')
    commands.export(experiment)
    assert written[-1] == 'config.json' and 'model.safetensors' in written
    target = storage.path(f'{bucket}/exported/export')
    assert sorted(written) == sorted(path.name for path in target.iterdir())
    with pytest.raises(InputError, match='exists and is not empty'):
        commands.export(experiment)


CHANGES = {
    'references': {'initial': Reference(table=True)},
    'train': Train(batch_pairs=6, steps=4, checkpoint_every=2),
}
TIMES = ('seconds', 'tokens_per_second', 'eval/seconds')


def trained(experiment):
    """The state in the newest checkpoint, and the log without its timings."""
    prepared = run.prepare(experiment)
    shapes, _ = loading.abstract_state(prepared)
    with checkpoint.open_checkpoints(prepared.directory / 'checkpoints', 2) as checkpoints:
        state = jax.device_get(checkpoints.restore(checkpoints.latest(), shapes, {'reference_params': {}}))
    lines = [
        {name: value for name, value in line.items() if name not in TIMES} for line in read_metrics(prepared.directory)
    ]
    return state, lines


def test_a_run_in_a_bucket_that_was_killed_ends_as_one_on_a_disk(bucket, tmp_path, compiled_quickly):
    local = tiny_runs.experiment(tmp_path, tables=str(tmp_path / 'tables'), **CHANGES)
    train.train(local)
    folder = tmp_path / 'killed.py'
    folder.write_text(
        'import pathlib, tiny_runs, test_storage\n'
        'def get_config():\n'
        f'    places = dict(output="{bucket}/run", tables="{bucket}/run_tables")\n'
        f'    return tiny_runs.experiment(pathlib.Path("{tmp_path}"), **places, **test_storage.CHANGES).config\n'
    )
    environment = os.environ | tiny_buckets.environment()
    environment |= {'PYTHONPATH': str(pathlib.Path(__file__).parent), 'JAX_NUM_CPU_DEVICES': '8'}
    environment |= {'JAX_DISABLE_MOST_OPTIMIZATIONS': 'True'}
    process = subprocess.Popen([sys.executable, '-m', 'jaxpo', 'train', str(folder)], env=environment)
    committed, deadline = storage.path(f'{bucket}/run/checkpoints'), time.monotonic() + 120
    while not list(committed.glob('2/commit_success.txt')):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    remote = tiny_runs.experiment(tmp_path, output=f'{bucket}/run', tables=f'{bucket}/run_tables', **CHANGES)
    train.train(remote)
    (ours, our_log), (theirs, their_log) = trained(remote), trained(local)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert our_log == their_log
    assert [line['step'] for line in our_log] == [0, 1, 2, 3, 4, 4]
    commands.evaluate(remote)
    found = json.loads(storage.path(f'{bucket}/run/evaluation_000004.json').read_text())
    assert found['eval/loss'] == pytest.approx(our_log[-1]['eval/loss'], rel=1e-6)
