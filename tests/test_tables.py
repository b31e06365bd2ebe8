"""Tables through the whole loop: a reference read from one is the reference itself, and is computed only once."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import tiny_checkpoints
import tiny_runs
import tokenizers
from test_train import logged, saved_state, stop_after
from tiny_tables import attached, make_folder, measured, to_compute

from jaxpo import commands, loading, run, scoring, train
from jaxpo.config import Mesh, Reference, Rows, Train
from jaxpo.errors import InputError, Interrupted
from jaxpo.models.checkpoint import load_params
from jaxpo.models.decoder import Decoder, head_weight
from jaxpo.models.source import open_model

pytestmark = pytest.mark.usefixtures('compiled_quickly')

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


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp('tables'))


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
    for place in range(2):
        assert np.abs(rejected.reference_logps[:, place] - rejected.model_logps['earlier']).max() > 1


# What is trained.


SHORT = Train(batch_pairs=6, steps=4, checkpoint_every=2)


@pytest.fixture(scope='module')
def trained(folder):
    """The same run with a table and with the model itself."""
    runs = {}
    for table in (True, False):
        settings = {'objective': {'rainbow_po': {}, 'dpo': {}}, 'train': SHORT}
        runs[table] = measured(folder, table=table, output=str(folder / f'run_{table}'), **settings)
        train.train(runs[table])
    return runs


def test_a_run_with_tables_ends_as_one_with_models(trained):
    (ours, theirs) = (saved_state(trained[table]) for table in (True, False))
    assert ours[0] == theirs[0] == 4
    start = loading.load_start(run.prepare(trained[True]))
    assert any(np.abs(a - b).max() > 0.01 for a, b in zip(*map(jax.tree.leaves, (ours[1].params, start.params))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours[1].params, theirs[1].params)
    for ours, theirs in zip(*(logged(trained[table]) for table in (True, False)), strict=True):
        assert ours == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in theirs.items()}


def test_a_full_table_needs_no_weights_and_a_resumed_run_goes_on_bit_for_bit(trained, folder, monkeypatch):
    loaded, load = [], loading.load_weights
    monkeypatch.setattr(loading, 'load_weights', lambda run, name, *rest: loaded.append(name) or load(run, name, *rest))
    whole = trained[True]
    halved = dataclasses.replace(whole, config=dataclasses.replace(whole.config, output=str(folder / 'halved')))
    with monkeypatch.context() as patched:
        stop_after(3, patched)
        with pytest.raises(Interrupted, match='after step 3'):
            train.train(halved)
    train.train(halved)
    assert loaded == [None]  # the policy, once
    jax.tree.map(np.testing.assert_array_equal, saved_state(halved)[1], saved_state(whole)[1])
    assert logged(halved) == logged(whole)


def test_no_state_holds_the_weights_of_a_table(trained):
    for table, names in ((True, set()), (False, {'other'})):
        prepared = run.prepare(trained[table])
        assert set(loading.abstract_state(prepared)[0].reference_params) == names
        assert set(loading.load_state(prepared).reference_params) == names


# A model with another tokenizer.

DIGITS = tiny_checkpoints.word_level(
    {word: place for place, word in enumerate(['</s>', *'9876543210', 'word', '<unk>', '<s>'])},
    [tokenizers.pre_tokenizers.Digits(individual_digits=True)],
)


@pytest.fixture(scope='module')
def foreign(folder):
    """A third model, which reads `word12` as three tokens."""
    config = tiny_runs.CONFIG | {'vocab_size': 14, 'eos_token_id': 0}
    path = folder / 'foreign'
    tiny_checkpoints.write_directory(path, config, tiny_checkpoints.hugging_face_tensors(config, seed=7))
    DIGITS.save_pretrained(path)
    return path


@functools.cache
def said_by(path, texts):
    """Log-probability, in nats, and tokens of completions behind their prompts, by a model with its own tokenizer."""
    opened = open_model(str(path))
    tokenizer, architecture = opened.load_tokenizer(), opened.architecture
    params = load_params(opened, tiny_checkpoints.on_one_device(architecture))
    prompts = [tokenizer(prompt)['input_ids'] for prompt, _ in texts]
    completions = [[*tokenizer(completion)['input_ids'], tokenizer.eos_token_id] for _, completion in texts]
    tokens = np.zeros((len(texts), 64), np.int32)
    for row, ids in enumerate(zip(prompts, completions)):
        tokens[row, : sum(map(len, ids))] = np.concatenate(ids)
    places = np.broadcast_to(np.arange(64), tokens.shape)
    whole = np.ones_like(tokens)
    apply = jax.jit(Decoder(architecture, dtype=np.float32).apply)
    hidden = apply({'params': params}, tokens, places, whole, 0 * whole)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head_weight(params), np.float64).T
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    sums = [
        sum(logps[row, len(prompt) + place - 1, token] for place, token in enumerate(completion))
        for row, (prompt, completion) in enumerate(zip(prompts, completions))
    ]
    return np.array(sums), np.array([len(completion) for completion in completions])


def texts_of(folder, name, side):
    rows = map(json.loads, (folder / f'{name}.jsonl').read_text().splitlines())
    return tuple((row['prompt'], row[side]) for row in rows)


def with_foreign(folder, mix, table=True, **changes):
    references = {'initial': Reference(), 'foreign': Reference(str(folder / 'foreign'), table=table)}
    settings = {'objective': {'mixture': {'mix': mix}, 'dpo': {}}, 'output': str(folder / mix), 'train': SHORT}
    return measured(folder, **{'references': references, **settings, **changes})


def test_another_tokenizer_is_refused_without_a_table(folder, foreign):
    with pytest.raises(InputError, match='references.foreign: its tokenizer differs.*set references.foreign.table'):
        run.prepare(with_foreign(folder, 'harmonic', table=False))


def test_another_tokenizer_gives_its_own_sums_and_lengths(folder, foreign):
    told = sides_of(with_foreign(folder, 'harmonic'))
    assert len(told) == 4
    for place, side in enumerate(('chosen', 'rejected')):
        sums, lengths = said_by(foreign, texts_of(folder, 'train', side))
        initial, words = said_by(folder / 'model', texts_of(folder, 'train', side))
        assert (lengths > words).all()
        for sides, index in told:
            index = index.reshape(index.shape[0], -1)
            kept, found = index >= 0, sides[place].reference_logps.sum(axis=-1)
            pairs = index[kept]
            np.testing.assert_allclose(found[:, 1][kept], sums[pairs], rtol=1e-5)
            np.testing.assert_allclose(found[:, 0][kept], initial[pairs], rtol=1e-5)
            np.testing.assert_array_equal(sides[place].reference_lengths[:, 1][kept], lengths[pairs])
            np.testing.assert_array_equal(sides[place].reference_lengths[:, 0][kept], words[pairs])


MIXES = {
    'geometric': lambda one, other: (one + other) / 2,
    'harmonic': lambda one, other: -np.logaddexp(-one, -other) + np.log(2),
}


@pytest.mark.parametrize('mix', MIXES)
def test_another_tokenizer_is_mixed_with_the_policys(folder, foreign, mix):
    experiment = with_foreign(folder, mix)
    commands.evaluate(experiment)
    found = json.loads((folder / mix / 'evaluation_000000.json').read_text())
    sides = [texts_of(folder, 'evaluation', side) for side in ('chosen', 'rejected')]
    initial, others = ([said_by(path, texts)[0] for texts in sides] for path in (folder / 'model', foreign))
    chosen, rejected = (policy - MIXES[mix](policy, other) for policy, other in zip(initial, others))
    assert found['eval/loss'] == pytest.approx(np.logaddexp(0, -0.1 * (chosen - rejected)).mean(), rel=1e-5)


def test_a_mixture_with_another_tokenizer_trains(folder, foreign):
    experiment = with_foreign(folder, 'harmonic', output=str(folder / 'mixed'))
    train.train(experiment)
    assert logged(experiment)[-1]['eval/loss'] < logged(experiment)[0]['eval/loss']
    assert to_compute(experiment) == [0]
