"""The log is the truth, TensorBoard its view: whole lines only, each step once after a resume."""

import json
import pathlib
import struct

from tensorboardX.proto import event_pb2

from jaxpo.metrics import flatten, open_metrics, read_metrics


def events(directory: pathlib.Path):
    """All events of a directory, in the order they were written."""
    for path in sorted(directory.glob('**/events*'), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack('<Q', data[place : place + 8])
            event = event_pb2.Event()
            event.ParseFromString(data[place + 12 : place + 12 + length])
            place += 16 + length
            yield event


def shown(directory):
    """Scalar steps as TensorBoard shows them: a session that starts at a step discards what lies beyond it."""
    steps = []
    for event in events(directory):
        if event.HasField('session_log') and event.session_log.status == event_pb2.SessionLog.START:
            steps = [step for step in steps if step < event.step]
        steps += [event.step for value in event.summary.value if value.tag == 'loss']
    return steps


def test_a_resumed_log_has_each_step_once(tmp_path):
    with open_metrics(tmp_path, 0) as log:
        for step in range(1, 6):
            log.write(step, {'loss': 1.0 / step})
    with (tmp_path / 'metrics.jsonl').open('a') as lines:
        lines.write('{"step": 6, "lo')
    with open_metrics(tmp_path, 3) as log:
        for step in range(4, 8):
            log.write(step, {'loss': 10.0 + step})
    assert [line['step'] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    assert read_metrics(tmp_path)[3]['loss'] == 14.0
    assert shown(tmp_path / 'tensorboard') == [1, 2, 3, 4, 5, 6, 7]


def test_text_and_hyperparameters_reach_tensorboard(tmp_path):
    with open_metrics(tmp_path, 0) as log:
        log.write_text(0, 'samples/0', '**hello**')
        log.write_hyperparameters(
            flatten({'train': {'seed': 3}, 'objective': {'dpo': {'beta': 0.1}}}), {'eval/loss': 0.5}
        )
    tags = {value.tag for event in events(tmp_path / 'tensorboard') for value in event.summary.value}
    assert any(tag.startswith('samples/0') for tag in tags)
    assert '_hparams_/session_start_info' in tags and 'eval/loss' in tags


def test_flatten_keeps_numbers_and_spells_out_the_rest():
    tree = {'a': {'b': 1.5, 'c': None}, 'd': [1, 2], 'e': True}
    assert flatten(tree) == {'a.b': 1.5, 'a.c': 'None', 'd': '[1, 2]', 'e': True}
    assert json.dumps(flatten(tree))
