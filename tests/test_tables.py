"""Tables through the whole loop: a reference read from one is the reference itself, and is computed only once."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny_checkpoints
import tiny_runs

from jaxpo import loading, run, scoring, tabulate
from jaxpo.config import Mesh, Reference, Rows, Train

# All that a table can hold: two sides, two companions, entropies, and a model in a role of its own.
EVERYTHING = {
    'mixture': {'mix': 'geometric', 'other': 2.0},
    'kto': {},
    'mdpo': {},
    'rainbow_po': {},
    'spo': {},
}
ALL_NAMES = ('other', 'initial', 'earlier')
ROW_LENGTHS = {'lengths': (64,), 'microbatch': 8, 'pairs_per_row': 2}


def write_model(path, seed, layers=2, tokenizer=None):
    config = tiny_runs.CONFIG | {'num_hidden_layers': layers}
    tensors = tiny_checkpoints.hugging_face_tensors(config, seed=seed)
    tiny_checkpoints.write_directory(path, config, tensors)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return path


def make_folder(folder):
    """The tiny experiment with another model to be measured against, and prompts that are corrupted."""
    tiny_runs.experiment(folder)
    write_model(folder / 'other', 5, layers=3)
    for name in ('train', 'evaluation'):
        rows = [json.loads(line) for line in (folder / f'{name}.jsonl').read_text().splitlines()]
        write_rows(folder / f'{name}.jsonl', [row | {'corrupted_prompt': 'word1 word2 word3'} for row in rows])
    return folder


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def measured(folder, table=True, names=('other',), **changes):
    """The experiment in `folder` with those references; all but the policy's own are the other model."""
    references = {name: Reference(str(folder / 'other'), table=table) for name in names}
    if 'initial' in names:
        references['initial'] = Reference(table=table)
    return tiny_runs.experiment(folder, **{'references': references, 'tables': str(folder / 'tables'), **changes})


def attached(experiment):
    prepared = run.prepare(experiment)
    return prepared, *tabulate.attach(prepared, run.read_pairs(prepared))


def computed(experiment):
    """Completions that were computed for each reference of a run."""
    return [one.computed for one in attached(experiment)[2]]


def to_compute(experiment):
    prepared = run.prepare(experiment)
    return [one.computed for one in tabulate.missing(prepared, run.read_pairs(prepared))]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('tables'))


@pytest.fixture
def own_folder(folder, tmp_path):
    """A copy of the folder and of its tables, to be changed."""
    for name in ('model', 'other', 'tables'):
        if (folder / name).exists():
            shutil.copytree(folder / name, tmp_path / name)
    for path in folder.glob('*.jsonl'):
        shutil.copy(path, tmp_path)
    return tmp_path


def sides_of(experiment):
    """What is scored of every batch of a run, in its order."""
    prepared, pairs, _ = attached(experiment)
    state, models, objective = loading.load_start(prepared), prepared.models, prepared.objective

    @jax.jit
    def score(trained, frozen, batch):
        return jax.lax.map(lambda part: scoring.sides(models, objective, trained, frozen, part), batch)

    schedule = run.Schedule(prepared.config.train, len(pairs.train))
    indices = [schedule.pairs_of(number) for number in range(schedule.steps)]
    batches = [run.make_batch(prepared, [pairs.train[i] for i in chosen]) for chosen in indices]
    return [jax.device_get(score(state.trained, state.frozen, batch)) for batch in batches]


@pytest.mark.parametrize(
    'layout, mesh',
    [('shared', Mesh(data=8)), ('padded', Mesh(data=8)), ('packed', Mesh(data=8)), ('shared', Mesh(data=4, fsdp=2))],
)
def test_what_is_scored_is_what_the_model_says(folder, layout, mesh):
    rows = Rows(layout, **ROW_LENGTHS)
    settings = {'objective': EVERYTHING, 'rows': rows, 'mesh': mesh, 'train': Train(batch_pairs=24, epochs=2.0)}
    told = sides_of(measured(folder, names=ALL_NAMES, **settings))
    live = sides_of(measured(folder, table=False, names=ALL_NAMES, **settings))
    assert len(told) == 2 and told[0][0].weights.shape[0] > 1  # more than one microbatch
    for ours, theirs in zip(told, live, strict=True):
        for path, value in jax.tree_util.tree_leaves_with_path(theirs):
            found = dict(jax.tree_util.tree_leaves_with_path(ours))[path]
            np.testing.assert_allclose(found, value, atol=2e-6, err_msg=jax.tree_util.keystr(path))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chosen, rejected = live[0]
    for values in (
        *(chosen.reference_logps[:, place] for place in range(2)),
        chosen.by_reference['reference_entropy'],
        rejected.model_logps['earlier'],
        *(companion.reference_logps for companion in chosen.companions.values()),
    ):
        assert np.abs(values).sum() > 1
    assert set(chosen.companions) == {'mismatched', 'corrupted'}
