"""What of a table is computed, what is found again, and what is refused before a model is opened."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny_checkpoints
from tiny_tables import attached, computed, make_folder, measured, sequences, to_compute, write_rows

from jaxpo import opening, run, tabulate
from jaxpo.config import Data, Mesh, Model, Optimizer, Reference, Rows, Train
from jaxpo.errors import InputError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('tables'))


@pytest.fixture(scope='module')
def filled(folder):
    """The experiment, its tables and how many completions were computed."""
    tables = {'tables': str(folder / 'filled')}
    experiment = measured(folder, **tables)
    _, _, (found,) = attached(experiment)
    assert found.computed == found.completions - duplicates(folder) > 50
    return experiment


def duplicates(folder):
    found = sequences(folder)
    return len(found) - len(set(found))


@pytest.fixture
def own_folder(filled, folder, tmp_path):
    """A copy of the folder whose tables are filled, to be changed."""
    for name in ('model', 'other'):
        shutil.copytree(folder / name, tmp_path / name)
    shutil.copytree(filled.config.tables, tmp_path / 'tables')
    for path in folder.glob('*.jsonl'):
        shutil.copy(path, tmp_path)
    return tmp_path


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

    monkeypatch.setattr(opening, 'open_model', opened)
    with pytest.raises(InputError, match=message or 'a model was opened'):
        run.prepare(measured(folder, names=names, objective=objective))
