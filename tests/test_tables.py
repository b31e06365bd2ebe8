"""Tables through the whole loop: a reference read from one is the reference itself, and is computed only once."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_checkpoints
import tiny_runs
from test_train import logged, saved_state, stop_after

from jaxpo import loading, run, scoring, tabulate, train
from jaxpo.config import Data, Mesh, Model, Optimizer, Reference, Rows, Train
from jaxpo.errors import InputError, Interrupted

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
def own_folder(filled, folder, tmp_path):
    """A copy of the folder whose tables are filled, to be changed."""
    for name in ('model', 'other'):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copytree(filled.config.tables, tmp_path / 'tables')
    for path in folder.glob('*.jsonl'):
        shutil.copy(path, tmp_path)
    return tmp_path


def sides_of(experiment):
    """What is scored of every batch of a run, in its order, and the places of its pairs in the data."""
    prepared, pairs, _ = attached(experiment)
    state, models, objective = loading.load_start(prepared), prepared.models, prepared.objective

    @jax.jit
    def score(trained, frozen, batch):
        return jax.lax.map(lambda part: scoring.sides(models, objective, trained, frozen, part), batch)

    schedule = run.Schedule(prepared.config.train, len(pairs.train))
    indices = [schedule.pairs_of(number) for number in range(schedule.steps)]
    batches = [run.make_batch(prepared, [pairs.train[i] for i in chosen]) for chosen in indices]
    return [jax.device_get((score(state.trained, state.frozen, batch), batch.pair_index)) for batch in batches]


@pytest.mark.parametrize(
    'layout, mesh',
    [('shared', Mesh(data=8)), ('padded', Mesh(data=8)), ('packed', Mesh(data=8)), ('shared', Mesh(data=4, fsdp=2))],
)
def test_what_is_scored_is_what_the_model_says(folder, layout, mesh):
    rows = Rows(layout, **ROW_LENGTHS)
    settings = {'objective': EVERYTHING, 'rows': rows, 'mesh': mesh, 'train': Train(batch_pairs=24, epochs=2.0)}
    told = sides_of(measured(folder, names=ALL_NAMES, **settings))
    live = sides_of(measured(folder, table=False, names=ALL_NAMES, **settings))
    assert len(told) == 2 and told[0][1].shape[0] > 1  # more than one microbatch
    for ours, theirs in zip(told, live, strict=True):
        for path, value in jax.tree_util.tree_leaves_with_path(theirs):
            found = dict(jax.tree_util.tree_leaves_with_path(ours))[path]
            np.testing.assert_allclose(found, value, atol=2e-6, err_msg=jax.tree_util.keystr(path))
        assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    chosen, rejected = live[0][0]
    for values in (
        *(chosen.reference_logps[:, place] for place in range(2)),
        chosen.by_reference['reference_entropy'],
        rejected.model_logps['earlier'],
        *(companion.reference_logps for companion in chosen.companions.values()),
    ):
        assert np.abs(values).sum() > 1
    assert set(chosen.companions) == {'mismatched', 'corrupted'}


# What is trained.


@pytest.fixture(scope='module')
def trained(folder):
    """The same run with tables and with the models themselves."""
    runs = {}
    for table in (True, False):
        settings = {'objective': {'mixture': {}, 'dpo': {}, 'rainbow_po': {}}, 'names': ('other', 'initial')}
        runs[table] = measured(folder, table=table, output=str(folder / f'run_{table}'), **settings)
        train.train(runs[table])
    return runs


def test_a_run_with_tables_ends_as_one_with_models(trained):
    (ours, theirs) = (saved_state(trained[table]) for table in (True, False))
    assert ours[0] == theirs[0] == 6
    start = loading.load_start(run.prepare(trained[True]))
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(*map(jax.tree.leaves, (ours[1].params, start.params))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours[1].params, theirs[1].params)
    for ours, theirs in zip(*(logged(trained[table]) for table in (True, False)), strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in theirs.items()}


def test_a_full_table_needs_no_weights(trained, folder, monkeypatch):
    loaded, load = [], loading.load_weights
    monkeypatch.setattr(loading, 'load_weights', lambda run, name, *rest: loaded.append(name) or load(run, name, *rest))
    experiment = dataclasses.replace(trained[True].config, output=str(folder / 'again'))
    experiment = dataclasses.replace(trained[True], config=experiment)
    train.train(experiment)
    assert loaded == [None]  # the policy
    state = loading.load_state(run.prepare(experiment))
    assert state.reference_params == {} and state.average_params == {} and state.base_params == {}
    assert set(loading.load_state(run.prepare(trained[False])).reference_params) == {'other', 'initial'}


def test_an_interrupted_run_with_tables_resumes_bit_for_bit(trained, folder, monkeypatch):
    whole = trained[True]
    halved = dataclasses.replace(whole, config=dataclasses.replace(whole.config, output=str(folder / 'halved')))
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Interrupted, match='after step 3'):
            train.train(halved)
    train.train(halved)
    jax.tree.map(np.testing.assert_array_equal, saved_state(halved)[1], saved_state(whole)[1])
    assert logged(halved) == logged(whole)


# What is computed, and what is found again.


@pytest.fixture(scope='module')
def filled(folder):
    """The experiment, its tables and how many completions were computed."""
    tables = {'tables': str(folder / 'filled')}
    experiment = measured(folder, **tables)
    _, _, (found,) = attached(experiment)
    assert found.computed == found.completions - duplicates(folder) > 50
    return experiment


def sequences(folder):
    """Prompt and completion of every side of every pair, as texts."""
    lines = [line for name in ('train', 'evaluation') for line in (folder / f'{name}.jsonl').read_text().splitlines()]
    return [(row['prompt'], row[side]) for row in map(json.loads, lines) for side in ('chosen', 'rejected')]


def duplicates(folder):
    found = sequences(folder)
    return len(found) - len(set(found))


@pytest.mark.parametrize(
    'changes',
    [
        {'objective': {'ipo': {}}},
        {'objective': {'dpo': {'beta': 0.7}}},
        {'train': Train(batch_pairs=4, epochs=3.0, seed=7)},
        {'optimizer': Optimizer(learning_rate=0.1)},
        {'output': 'elsewhere'},
        {'rows': Rows('packed', lengths=(96,), microbatch=16)},
        {'mesh': Mesh(data=2, fsdp=4)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_run_computes_nothing(filled, folder, changes):
    assert computed(measured(folder, tables=filled.config.tables, **changes)) == [0]


def flip_a_bit(folder):
    path = folder / 'other' / 'model.safetensors'
    content = bytearray(path.read_bytes())
    content[-4] ^= 1  # the least of its last number
    path.write_bytes(content)


def renumber(*names):
    """A change of these models' tokenizers: the tiny one with its words in another order, no id as it was."""
    words = tiny_checkpoints.tiny_tokenizer().get_vocab()
    renumbered = tiny_checkpoints.word_level({word: (place + 7) % len(words) for word, place in words.items()})
    return lambda folder: [renumbered.save_pretrained(folder / name) for name in names]


def change_a_row(folder):
    lines = (folder / 'train.jsonl').read_text().splitlines()
    lines[3] = json.dumps(json.loads(lines[3]) | {'chosen': 'word1 word2 word16 word0'})
    (folder / 'train.jsonl').write_text('\n'.join(lines))


def every(folder):
    return len(set(sequences(folder)))


def cut_at_three(folder):
    """Distinct completions that do not fit into three tokens, of which the last would end them."""
    return len({(prompt, *text.split()[:3]) for prompt, text in sequences(folder) if len(text.split()) > 2})


@pytest.mark.parametrize(
    'change, setting, expected',
    [
        pytest.param(flip_a_bit, {}, every, id='weights'),
        pytest.param(None, {'model': {'dtype': 'bfloat16'}}, every, id='dtype'),
        pytest.param(renumber('model', 'other'), {}, every, id='tokenizer'),
        pytest.param(None, {'data': {'max_completion_tokens': 3}}, cut_at_three, id='truncation'),
        pytest.param(change_a_row, {}, lambda folder: 1, id='row'),
        # The reference reads the same texts with its own tokenizer, as before.
        pytest.param(renumber('model'), {}, lambda folder: 0, id='tokenizer-of-the-policy'),
    ],
)
def test_what_its_numbers_depend_on_is_computed_anew(own_folder, change, setting, expected):
    experiment = measured(own_folder)
    assert to_compute(experiment) == [0]
    if change:
        change(own_folder)
    sections = {
        section: dataclasses.replace(getattr(experiment.config, section), **fields)
        for section, fields in setting.items()
    }
    changed = measured(own_folder, **sections)
    assert to_compute(changed) == [expected(own_folder)]
    if change is change_a_row:
        assert computed(changed) == [1]
        assert computed(changed) == computed(experiment) == [0]


def test_another_chat_template_is_computed_anew(folder, tmp_path):
    conversations = [
        {'prompt': [{'role': 'user', 'content': prompt}], 'chosen': f'word{place}', 'rejected': 'word16'}
        for place, (prompt, _) in enumerate(sequences(folder)[:12:2])
    ]
    write_rows(tmp_path / 'train.jsonl', conversations)
    data = Data(train=str(tmp_path / 'train.jsonl'))

    def experiment(opening):
        """All of both models but the words that a template writes in front of an answer."""
        for name in ('model', 'other'):
            shutil.copytree(folder / name, tmp_path / name, dirs_exist_ok=True)
            tokenizer = tiny_checkpoints.tiny_tokenizer()
            tokenizer.chat_template = TEMPLATE.replace('OPENING', opening)
            tokenizer.save_pretrained(tmp_path / name)
        model = Model(str(tmp_path / 'model'), remat='none')
        references = {'other': Reference(str(tmp_path / 'other'), table=True)}
        return measured(tmp_path, model=model, references=references, data=data)

    assert computed(experiment('word1')) == [12]
    assert computed(experiment('word1')) == [0]
    assert to_compute(experiment('word2')) == [12]


TEMPLATE = (
    "{% for m in messages %}{{ m['role'] == 'assistant' and 'OPENING ' or '' }}{{ m['content'] }} </s>\n{% endfor %}"
    '{% if add_generation_prompt %}OPENING {% endif %}'
)


def test_work_that_was_stopped_goes_on_where_it_was(filled, folder, monkeypatch):
    experiment = measured(folder, tables=str(folder / 'stopped'))
    with monkeypatch.context() as patched:
        patched.setattr(tabulate, 'SECONDS_BETWEEN_SHARDS', 0.0)
        stop_computing_after(1, patched)
        with pytest.raises(KeyboardInterrupt):
            computed(experiment)
    (left,) = to_compute(experiment)
    assert 0 < left < every(folder)
    _, pairs, (found,) = attached(experiment)
    assert found.computed == left
    for ours, theirs in zip(pairs.train, attached(filled)[1].train, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), ours.table, theirs.table)


def stop_computing_after(batches, monkeypatch):
    """The next table is interrupted, as by Ctrl-C, when that many batches of it are computed."""
    computer = tabulate._computer

    def watched_computer(*arguments):
        compute, done = computer(*arguments), []

        def watched(part):
            if len(done) == batches:
                raise KeyboardInterrupt
            done.append(part)
            return compute(part)

        return watched

    monkeypatch.setattr(tabulate, '_computer', watched_computer)


# What is refused, before any model is opened.


@pytest.mark.parametrize(
    'objective, names, message',
    [
        ({'tdpo1': {}}, ('other',), 'references.other.table: tdpo1 needs forward_kl of the model itself'),
        ({'dpo': {}, 'mapo': {}}, ('other',), 'references.other.table: mapo needs forward_kl, activations'),
        ({'sparse_po': {}}, ('other',), 'references.other.table: sparse_po needs forward_kl, hidden states'),
        ({'simpo': {}}, ('other',), 'references.other.table has no effect: simpo reads no log-prob'),
        ({'simpo': {}, 'spo': {}}, ('other', 'earlier'), None),
        ({'simpo': {}}, ('other', 'earlier'), 'references.other.table has no effect'),
    ],
)
def test_a_table_that_cannot_say_what_is_asked_is_refused(folder, monkeypatch, objective, names, message):
    def opened(*arguments):
        raise InputError('a model was opened')

    monkeypatch.setattr(run, 'open_model', opened)
    with pytest.raises(InputError, match=message or 'a model was opened'):
        run.prepare(measured(folder, names=names, objective=objective))
