"""What methods need beyond pairs, through the whole loop: columns, unpaired rows, roles, state and parts."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import tiny_runs
from test_train import logged, saved_state, stop_after

from jaxpo import commands, loading, run, train
from jaxpo.config import Data, Optimizer, Reference, Train
from jaxpo.errors import InputError, Interrupted

pytestmark = pytest.mark.usefixtures('compiled_quickly')

OWN = {'bco': {}, 'sparse_po': {'reward_sparsity': 0.01}}


def rewritten(path, change):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(change(row, index)) + '\n' for index, row in enumerate(rows)))


def experiment_with(folder, change, columns=None, steps=2, **changes):
    """The tiny experiment whose rows are changed, a few steps of it."""
    tiny_runs.experiment(folder)
    for name in ('train', 'evaluation'):
        rewritten(folder / f'{name}.jsonl', change)
    data = Data(str(folder / 'train.jsonl'), str(folder / 'evaluation.jsonl'), columns=columns or {})
    return tiny_runs.experiment(folder, data=data, train=Train(batch_pairs=6, steps=steps), **changes)


def test_state_and_parts_of_a_method_are_saved_resumed_and_evaluated(tmp_path, monkeypatch):
    whole, halved = (tiny_runs.experiment(tmp_path / name, objective=OWN) for name in ('whole', 'halved'))
    train.train(whole)
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Interrupted):
            train.train(halved)
    train.train(halved)
    (_, ours), (_, theirs) = saved_state(halved), saved_state(whole)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert logged(halved) == logged(whole)
    assert theirs.method_state['bco']['count'].tolist() == [36, 36]
    start = loading.load_state(run.prepare(whole)).method_params['sparse_po']['common']
    trained = theirs.method_params['sparse_po']['common']
    assert all(np.any(np.asarray(start[name]) != trained[name]) for name in start)
    assert logged(whole)[1]['method_grad_norm'] > 0

    commands.evaluate(whole)
    found = json.loads((tmp_path / 'whole' / 'run' / 'evaluation_000006.json').read_text())
    assert found['eval/loss'] == pytest.approx(logged(whole)[-1]['eval/loss'], rel=1e-6)


@pytest.mark.parametrize('objective', [{'kto': {}}, {'bco': {'beta': 0.1}, 'apo_zero': {}}])
def test_unpaired_rows_train(tmp_path, objective):
    def unpaired(row, index):
        side = 'chosen' if index % 3 else 'rejected'
        return {'prompt': row['prompt'], 'completion': row[side], 'label': side == 'chosen'}

    experiment = experiment_with(tmp_path, unpaired, steps=12, objective=objective)
    train.train(experiment)
    first, last = logged(experiment)[1], logged(experiment)[-2]
    assert last['loss'] < first['loss']
    assert last['rewards/chosen'] > 0 > last['rewards/rejected']
    assert first['rewards/accuracies'] == 0.5 and last['rewards/accuracies'] == 1


def test_columns_flow_by_name_or_by_another(tmp_path):
    def scored(row, index):
        spans = {f'{side}_segment': [[0, len(row[side].split()[0]), 1.0]] for side in ('chosen', 'rejected')}
        return row | spans | {'better': 2.0 + index, 'worse': 1.0}

    columns = {'chosen_score': 'better', 'rejected_score': 'worse'}
    spec = {'odpo': {'beta': 0.5}, 'sdpo': {}}
    experiment = experiment_with(tmp_path, scored, columns, objective=spec)
    train.train(experiment)
    # At the reference the margin of ODPO is minus log(score difference), which is log(1 + index): each row's own.
    expected = np.mean([np.log1p(1.0 + index) for index in range(6)])
    assert logged(experiment)[0]['eval/loss/odpo'] == pytest.approx(expected, rel=1e-5)
    assert logged(experiment)[0]['eval/loss/sdpo'] == pytest.approx(np.log(2), rel=1e-5)


def test_frozen_models_fill_roles(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    tiny_runs.experiment(folder)
    tensors = tiny_runs.tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG, seed=5)
    tiny_runs.tiny_checkpoints.write_directory(folder / 'liked', tiny_runs.CONFIG, tensors)
    references = {'initial': Reference(), 'positive': Reference(str(folder / 'liked')), 'negative': Reference()}
    spec = {'tis_dpo': {'weights': 'models'}}
    experiment = tiny_runs.experiment(
        folder, objective=spec, references=references, train=Train(batch_pairs=6, steps=2)
    )
    train.train(experiment)
    assert logged(experiment)[-1]['eval/loss'] < logged(experiment)[0]['eval/loss']
    lonely = dataclasses.replace(experiment.config, references={'initial': Reference(), 'positive': Reference()})
    with pytest.raises(InputError, match="tis_dpo reads a frozen model in the role 'negative'"):
        run.prepare(dataclasses.replace(experiment, config=lonely))


def test_a_corrupted_prompt_conditions(tmp_path):
    experiment = experiment_with(
        tmp_path, lambda row, index: row | {'corrupted_prompt': 'word1 word2 word3'}, objective={'mdpo': {}}
    )
    train.train(experiment)
    assert logged(experiment)[0]['eval/loss'] == pytest.approx(3 * np.log(2), rel=1e-5)
    assert logged(experiment)[-1]['eval/loss'] < 3 * np.log(2)


@pytest.mark.parametrize(
    'objective, message',
    [
        ({'odpo': {}}, "no column 'chosen_score'"),
        ({'sdpo': {}}, "no column 'chosen_segment'"),
        ({'mdpo': {}}, "no column 'corrupted_prompt'"),
    ],
)
def test_a_missing_column_is_said_before_training(tmp_path, objective, message):
    experiment = tiny_runs.experiment(tmp_path, objective=objective)
    with pytest.raises(InputError, match=message):
        train.train(experiment)
    assert not pathlib.Path(experiment.config.output).exists()


def test_unpaired_rows_are_refused_where_a_loss_needs_pairs(tmp_path):
    experiment = experiment_with(
        tmp_path, lambda row, index: {'prompt': row['prompt'], 'completion': row['chosen'], 'label': True}
    )
    with pytest.raises(InputError, match='unpaired'):
        train.train(experiment)


def test_a_kl_between_heads_of_different_sizes_is_refused(tmp_path):
    tiny_runs.experiment(tmp_path)
    padded = tiny_runs.CONFIG | {'vocab_size': 24}
    tensors = tiny_runs.tiny_checkpoints.hugging_face_tensors(padded, seed=5)
    tiny_runs.tiny_checkpoints.write_directory(tmp_path / 'padded', padded, tensors)
    references = {'padded': Reference(str(tmp_path / 'padded'))}
    run.prepare(tiny_runs.experiment(tmp_path, references=references))
    with pytest.raises(InputError, match='its head has 24 entries and the policy 20'):
        run.prepare(tiny_runs.experiment(tmp_path, references=references, objective={'tdpo1': {}}))


def test_a_rate_for_parts_that_no_loss_has_is_refused(tmp_path):
    experiment = tiny_runs.experiment(tmp_path, optimizer=Optimizer(method_learning_rate=0.1))
    with pytest.raises(InputError, match='method_learning_rate is set, but dpo trains no parts'):
        train.train(experiment)
