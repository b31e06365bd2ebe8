"""A study in a bucket is reported there, in the same bytes as on disk."""

import uuid

import pytest
import tiny_buckets
from study import made_up

from jaxpo import storage
from jaxpo.study.reporting import report

tiny_buckets.skip_where_missing()


@pytest.fixture
def bucket(monkeypatch):
    for name, value in tiny_buckets.environment().items():
        monkeypatch.setenv(name, value)
    return storage.path(f'gs://bucket/{uuid.uuid4().hex[:8]}')


def test_a_study_in_a_bucket_has_the_same_report(tmp_path, bucket, capsys):
    made = made_up.study(('dpo',), seeds=(0, 1), rates=(0.1,))
    local = made_up.write(tmp_path / 'study', made, lambda cell: dict.fromkeys(('selection', 'report'), cell.seed / 7))
    for file in local.rglob('*'):
        if file.is_file() and 'tensorboard' not in file.parts:
            (bucket / file.relative_to(local).as_posix()).write_bytes(file.read_bytes())
    assert report([str(local)]) == report([str(bucket)]) == 0
    assert str(bucket) in capsys.readouterr().out.replace('\n', '')
    files = [file for file in (local / 'report').rglob('*') if file.is_file()]
    assert len(files) > 10
    for file in files:
        assert (bucket / file.relative_to(local).as_posix()).read_bytes() == file.read_bytes()
