"""A study's directory: its design may be added to and not changed; each cell is written once, and shown once."""

import dataclasses
import json
import math
import threading

import pytest
import tiny_workers
from tensorboardX.proto import plugin_hparams_pb2
from test_metrics import events

from jaxpo import storage
from jaxpo.errors import InputError
from jaxpo.study import records
from jaxpo.study.design import Method, expand
from jaxpo.study.records import DIVERGED, FINISHED, STATES

VERSIONS = {'jaxpo': 'this'}


def claimed(folder, **changes):
    study = dataclasses.replace(tiny_workers.study(folder), **changes)
    root = storage.path(study.base.output)
    records.claim(root, study, expand(study))
    return root, study


def test_a_design_comes_back_as_it_was_said(tmp_path):
    root, study = claimed(tmp_path, question='Is it so?')
    design, extensions = records.read_design(root)
    assert extensions == [] and len(design['cells']) == 24
    assert design['question'] == 'Is it so?' and design['baseline'] == 'dpo' and design['seeds'] == [0, 1, 2, 3]
    assert design['methods']['ipo']['trials'] == [{'objective.ipo.tau': 0.1}, {'objective.ipo.tau': 0.3}]
    assert design['cells'][0] == {
        'id': expand(study)[0].id,
        'method': 'dpo',
        'setting': {'objective.dpo.beta': 0.1},
        'repeat': 0,
        'seed': 0,
    }
    before = (root / 'study.json').read_bytes()
    records.claim(root, dataclasses.replace(study, cells_per_program=8), expand(study))
    assert (root / 'study.json').read_bytes() == before


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'seeds': (0, 1)}, '12 of its cells are not in the new one'),
        ({'methods': {'dpo': Method({'dpo': {}}, {'objective.dpo.beta': (0.1, 0.3)})}}, '8 of its cells'),
        ({'metric': 'loss'}, "metric was 'rewards/accuracies' and is 'loss'"),
        ({'higher_is_better': False}, 'higher_is_better was True and is False'),
        ({'selection_share': 0.25}, 'selection_share was 0.5 and is 0.25'),
        ({'confidence': 0.9}, 'confidence was 0.95 and is 0.9'),
        ({'baseline': 'ipo'}, "baseline was 'dpo' and is 'ipo'"),
    ],
)
def test_another_design_is_refused_with_what_is_other(tmp_path, changes, message):
    root, _ = claimed(tmp_path)
    before = (root / 'study.json').read_bytes()
    with pytest.raises(InputError) as refused:
        claimed(tmp_path, **changes)
    assert message in str(refused.value) and 'name a new directory' in str(refused.value)
    assert (root / 'study.json').read_bytes() == before


def test_what_is_added_is_said_with_what_was_known_then(tmp_path):
    root, study = claimed(tmp_path)
    for cell in expand(study)[:5]:
        records.write(root, cell, tiny_workers.outcome(cell), VERSIONS)
    _, more = claimed(tmp_path, methods={**study.methods, 'hinge': Method({'hinge': {}}, {'train.steps': (3, 4)})})
    design, (extension,) = records.read_design(root)
    assert extension['cells_done_before'] == 5
    assert extension['cells_added'] == [cell.id for cell in expand(more) if cell.method == 'hinge']
    assert len(design['cells']) == 32
    assert [record.method for record in records.read(root)] == ['dpo'] * 5
    # With more seeds, those of the baseline's second arm move on, and its cells of before are the baseline's own.
    claimed(tmp_path, methods=more.methods, seeds=(0, 1, 2, 3, 4))
    assert len(records.read_design(root)[1]) == 2


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / 'study').mkdir()
    claimed(tmp_path)
    with pytest.raises(InputError, match='holds no study: there is no study.json'):
        records.read_design(storage.path(tmp_path))
    (tmp_path / 'other' / 'study').mkdir(parents=True)
    (tmp_path / 'other' / 'study' / 'thesis.txt').write_text('all of it')
    with pytest.raises(InputError, match='not empty and holds no study'):
        claimed(tmp_path / 'other')


def test_workers_that_start_at_once_agree(tmp_path):
    """None finds half a design, or takes another's for something else."""
    study = tiny_workers.study(tmp_path)
    cells, problems = expand(study), []

    def claim(start, root):
        start.wait()
        try:
            records.check(root, study, cells)
            records.claim(root, study, cells)
        except Exception as problem:
            problems.append(problem)

    for number in range(40):
        root, start = storage.path(tmp_path / f'study{number}'), threading.Barrier(4)
        threads = [threading.Thread(target=claim, args=(start, root)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [path.name for path in root.iterdir()] == ['study.json']
    assert problems == []


def test_a_cell_has_ended_when_all_of_it_is_there(tmp_path, monkeypatch):
    root, study = claimed(tmp_path)
    first, second = expand(study)[:2]
    files = root / 'cells' / first.id
    seen = []
    monkeypatch.setattr(records, '_write_tensorboard', lambda *given: seen.append(records.states(root)))
    records.write(root, first, tiny_workers.outcome(first), VERSIONS)
    assert seen == [{}] and records.states(root) == {first.id: 'finished'}
    assert {path.name for path in files.iterdir()} == {'run.json', 'metrics.jsonl', 'pairs.jsonl'}
    broken = dataclasses.replace(tiny_workers.outcome(second), state=DIVERGED, pairs={}, error='step 2: loss')
    records.write(root, second, broken, VERSIONS)
    records.write(root, first, dataclasses.replace(tiny_workers.outcome(first), state='error'), VERSIONS)
    assert records.states(root) == {first.id: 'error', second.id: 'diverged'}
    assert len(list((root / 'done').iterdir())) == 2
    (root / 'done' / 'something.else').touch()
    assert len(records.states(root)) == 2 and {*STATES} > {*records.states(root).values()}


def test_a_cell_comes_back_as_it_was_written(tmp_path):
    root, study = claimed(tmp_path)
    cell = expand(study)[3]
    outcome = tiny_workers.outcome(cell)
    records.write(root, cell, outcome, VERSIONS)
    (record,) = records.read(root)
    assert (record.id, record.method, record.setting) == (cell.id, cell.method, cell.setting)
    assert (record.repeat, record.seed, record.state) == (cell.repeat, cell.seed, FINISHED)
    assert record.compute == outcome.compute and record.versions == VERSIONS
    assert record.lines == outcome.lines
    assert record.config == json.loads(json.dumps(dataclasses.asdict(cell.config)))
    for split, numbers in outcome.pairs.items():
        assert record.pairs[split] == {name: values.tolist() for name, values in vars(numbers).items()}


def sessions(directory):
    """What TensorBoard's HParams view is told of a cell: settings and state at the start, how it ended."""
    starts, ends, scalars = [], [], {}
    for event in events(directory):
        for value in event.summary.value:
            content = value.metadata.plugin_data.content
            if value.tag == '_hparams_/session_start_info':
                found = plugin_hparams_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
                starts.append({key: getattr(held, held.WhichOneof('kind')) for key, held in dict(found).items()})
            elif value.tag == '_hparams_/session_end_info':
                ends.append(plugin_hparams_pb2.HParamsPluginData.FromString(content).session_end_info.status)
            elif value.HasField('simple_value'):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return starts, ends, scalars


def test_every_cell_is_in_the_view_of_hyperparameters_once(tmp_path):
    root, study = claimed(tmp_path)
    for cell in expand(study):
        for _ in range(2 if cell.repeat == 1 else 1):  # as where a first attempt failed or was killed
            records.write(root, cell, tiny_workers.outcome(cell), VERSIONS)
    for cell in expand(study):
        starts, ends, scalars = sessions(root / 'cells' / cell.id / 'tensorboard')
        (name,) = cell.setting
        assert len(starts) == len(ends) == 1
        assert starts[0] | {'seed': int(starts[0]['seed'])} == {
            'method': cell.method,
            'seed': cell.seed,
            'state': 'finished',
            name: cell.setting[name],
        }
        outcome = tiny_workers.outcome(cell)
        beside = sessions(root / 'cells' / cell.id / 'tensorboard' / 'hparams')[2]
        for line in outcome.lines:
            for metric in ('loss', 'rewards/accuracies'):
                name = f'{line["split"]}/{metric}'
                assert (line['step'], pytest.approx(line[metric], rel=1e-6, abs=1e-7)) in scalars[name]
                if line['step'] == 3:
                    assert [value for _, value in beside[name]] == [pytest.approx(line[metric], rel=1e-6, abs=1e-7)]


def test_what_is_not_finite_is_not_drawn(tmp_path):
    root, study = claimed(tmp_path)
    cell = expand(study)[0]
    outcome = dataclasses.replace(tiny_workers.outcome(cell), lines=[{'step': 2, 'loss': math.nan, 'grad_norm': 1.0}])
    records.write(root, cell, outcome, VERSIONS)
    scalars = sessions(root / 'cells' / cell.id / 'tensorboard')[2]
    assert 'grad_norm' in scalars and 'loss' not in scalars
