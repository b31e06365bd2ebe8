import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo import config
from jaxpo.data import rows as rows_module
from jaxpo.data.rows import fill_rows, plan_rows, run_shapes, unfit
from jaxpo.errors import InputError
from jaxpo.types import Pair

LAYOUTS = ('padded', 'packed', 'shared')


def ids(rng, size):
    return rng.integers(0, 90, size).astype(np.int32)


def random_pairs(seed, count, longest=10):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, longest, (count, 3))
    return [
        Pair(ids(rng, p), ids(rng, c), ids(rng, r), index, {'margin': float(index) / 2})
        for index, (p, c, r) in enumerate(sizes)
    ]


def visible(row, place):
    """Places a token attends to, by the words of types.Batch, in order of position."""
    places = [
        other
        for other in range(len(row['tokens']))
        if row['segment'][other] == row['segment'][place]
        and row['positions'][other] <= row['positions'][place]
        and row['branch'][other] in (0, row['branch'][place])
    ]
    return sorted(places, key=lambda other: row['positions'][other])


def read_completion(row, slot, side):
    """The prompt and completion of one slot as the attention sees them; asserts that every context is causal."""
    weights = row[f'{side}_weights'][slot]
    count = int(weights.sum())
    assert weights[:count].tolist() == [1] * count and not weights[count:].any()
    assert not row[side][slot][count:].any()
    scored = row[side][slot][:count]
    assert len(set(scored)) == count
    sources, targets = row['source'][scored], row['target'][scored]
    contexts = [visible(row, place) for place in sources]
    for context, source in zip(contexts, sources):
        assert row['segment'][source] > 0
        assert context[-1] == source
        assert row['positions'][context].tolist() == list(range(len(context)))
        for depth, place in enumerate(context):
            assert visible(row, place) == context[: depth + 1]
    prompt = row['tokens'][contexts[0]].tolist()
    for shorter, longer in zip(contexts, contexts[1:]):
        assert longer[:-1] == shorter  # one copy of the prompt, the same for every token
    for done, context in enumerate(contexts):
        assert row['tokens'][context].tolist() == prompt + targets[:done].tolist()
    branch = {'chosen': 1, 'rejected': 2}[side]
    assert row['branch'][contexts[0]].tolist() == [0] * len(prompt)
    assert {int(row['branch'][context[-1]]) for context in contexts[1:]} <= {branch}
    return prompt, targets.tolist()


def read_batch(batch):
    """Pairs of a batch by index, read slowly; asserts what types.Batch says of empty places."""
    arrays = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    columns = arrays.pop('columns')
    found = {}
    for micro, number in np.ndindex(*arrays['tokens'].shape[:2]):
        row = {name: array[micro, number] for name, array in arrays.items()}
        padding = row['segment'] == 0
        for name in ('tokens', 'positions', 'branch'):
            assert not row[name][padding].any()
        for slot, weight in enumerate(row['pair_weight']):
            index = int(row['pair_index'][slot])
            if weight == 0:
                assert index == -1 and not row['chosen'].weights[slot].any()
                assert not row['rejected'].weights[slot].any()
                continue
            assert weight == 1 and index not in found
            chosen, rejected = (read_completion(row, slot, side) for side in ('chosen', 'rejected'))
            assert chosen[0] == rejected[0]
            margin = float(columns['margin'][micro, number, slot])
            found[index] = (chosen[0], chosen[1], rejected[1], margin)
    return found


def as_lists(pairs):
    return {
        pair.index: (pair.prompt.tolist(), pair.chosen.tolist(), pair.rejected.tolist(), pair.columns['margin'])
        for pair in pairs
    }


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.sampled_from([(64,), (40, 64), (64, 50, 90)]),
    st.sampled_from([(4, 1), (4, 2), (8, 8), (1, 1)]),
    st.integers(1, 4),
)
def test_attention_sees_every_pair_whole(layout, seed, count, lengths, rows, pairs_per_row):
    microbatch, row_multiple = rows
    pairs = random_pairs(seed, count)
    settings_ = config.Rows(layout=layout, lengths=lengths, microbatch=microbatch, pairs_per_row=pairs_per_row)
    batch = fill_rows(pairs, settings_, row_multiple=row_multiple)
    assert read_batch(batch) == as_lists(pairs)
    microbatches, count_rows, length = batch.tokens.shape
    assert count_rows % row_multiple == 0 and count_rows <= microbatch and length in lengths
    assert (microbatches - 1) * microbatch < (batch.pair_weight.sum(-1) > 0).sum() or layout != 'padded'
    assert batch.pair_weight.sum() == count
    assert (batch.pair_weight.sum(-1) <= pairs_per_row).all()
    assert batch.chosen.weights.sum() == sum(pair.chosen.size for pair in pairs)
    assert batch.rejected.weights.sum() == sum(pair.rejected.size for pair in pairs)
    tokens = sum((1 if layout == 'shared' else 2) * pair.prompt.size for pair in pairs)
    tokens += sum(pair.chosen.size + pair.rejected.size for pair in pairs)
    assert (batch.segment > 0).sum() == tokens


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_reader_notices_a_wrong_batch(layout):
    pairs = random_pairs(1, 3)
    batch = fill_rows(pairs, config.Rows(layout=layout, lengths=(128,)))

    def broken(**changes):
        try:
            return read_batch(batch.replace(**changes)) != as_lists(pairs)
        except AssertionError:
            return True

    assert not broken()
    assert broken(chosen=batch.rejected, rejected=batch.chosen)
    assert broken(source=batch.source + 1)
    assert broken(target=np.roll(batch.target, 1, axis=-1))
    assert broken(branch=batch.branch * 0)
    assert broken(segment=np.minimum(batch.segment, 1))
    assert broken(positions=batch.positions * 0 + np.arange(128))
    assert broken(pair_index=batch.pair_index[..., ::-1] + 1)


def test_dtypes_and_shapes():
    pairs = random_pairs(2, 7)
    batch = fill_rows(pairs, config.Rows(layout='packed', lengths=(64,), microbatch=2, pairs_per_row=3))
    shape, _ = plan_rows(
        rows_module.lengths_of(pairs), config.Rows(layout='packed', lengths=(64,), microbatch=2, pairs_per_row=3)
    )
    lead = (shape.microbatches, shape.rows)
    assert batch.tokens.shape == (*lead, 64) and batch.source.shape == (*lead, shape.scored)
    assert batch.chosen.place.shape == batch.rejected.weights.shape == (*lead, 3, shape.tokens)
    assert batch.pair_weight.shape == batch.columns['margin'].shape == (*lead, 3)
    floats = ('chosen_weights', 'rejected_weights', 'pair_weight')
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if field.name != 'columns':
            assert value.dtype == (np.float32 if field.name in floats else np.int32), field.name
    assert batch.columns['margin'].dtype == np.float32


def test_shared_prompts_take_less_room():
    pairs = random_pairs(3, 40)
    sizes = {}
    for layout in LAYOUTS:
        shape = fill_rows(pairs, config.Rows(layout=layout, lengths=(64,), microbatch=64)).tokens.shape
        sizes[layout] = int(np.prod(shape))
    assert sizes['shared'] < sizes['packed'] < sizes['padded']


def test_the_cheapest_length_that_holds_the_longest_pair_is_taken():
    def length(sizes, lengths, **options):
        settings_ = config.Rows(layout='shared', lengths=lengths, microbatch=8, **options)
        return plan_rows(np.array(sizes), settings_)[0][:3]

    assert length([[2, 3, 3]], (8, 16, 32)) == (1, 1, 8)
    assert length([[2, 3, 4]], (32, 16, 8)) == (1, 1, 16)
    assert length([[2, 3, 3], [2, 3, 3]], (8, 16)) == (1, 2, 8)  # a tie: the shorter
    assert length([[3, 3, 3], [3, 3, 3], [3, 3, 3]], (10, 27)) == (1, 1, 27)  # 27 tokens, not 30
    assert length([[1, 1, 1], [1, 1, 1], [1, 3, 3], [1, 3, 3]], (10,)) == (1, 2, 10)  # the longest pairs first
    assert length([[2, 3, 3]] * 9, (8,)) == (2, 5, 8)  # even microbatches
    assert length([[2, 3, 3]] * 9, (16,), pairs_per_row=1) == (2, 5, 16)


@pytest.mark.parametrize('scored, expected', [(16, 16), (17, 32), (33, 48), (49, 64), (63, 64)])
def test_scored_tokens_come_in_quarters(scored, expected):
    shape, _ = plan_rows(np.array([[1, scored - 1, 1]]), config.Rows(layout='shared', lengths=(64,)))
    assert shape.scored == expected


def test_scored_tokens_are_a_multiple_of_eight():
    shape, _ = plan_rows(np.array([[1, 3, 3]]), config.Rows(layout='shared', lengths=(50,)))
    assert shape.scored == 16


def test_row_counts_are_few():
    shapes = {
        plan_rows(np.array([[1, 1, 1]] * count), config.Rows(layout='padded', lengths=(8,), microbatch=64))[0]
        for count in range(1, 65)
    }
    assert sorted(shape.rows for shape in shapes) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32] + [
        40, 48, 56, 64
    ]  # fmt: skip


def test_filling_is_deterministic_and_the_plan_is_what_is_filled():
    pairs = random_pairs(4, 30)
    settings_ = config.Rows(layout='shared', lengths=(32, 64), microbatch=4, pairs_per_row=3)
    first, second = (fill_rows(pairs, settings_, row_multiple=2) for _ in range(2))
    for name in ('tokens', 'source', 'chosen', 'pair_index'):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()
    batches = [np.arange(0, 10), np.arange(10, 30), np.arange(10, 30)]
    shapes = run_shapes(rows_module.lengths_of(pairs), batches, settings_, row_multiple=2)
    assert sum(shapes.values()) == 3
    for batch in batches:
        filled = fill_rows([pairs[place] for place in batch], settings_, row_multiple=2)
        shape = (*filled.tokens.shape, filled.source.shape[-1], filled.chosen.shape[-2])
        assert shape in shapes


def test_a_pair_fits_exactly_or_not():
    pair = random_pairs(5, 1)[0]
    for layout in LAYOUTS:
        need = (1 if layout == 'shared' else 2) * pair.prompt.size + pair.chosen.size + pair.rejected.size
        assert not unfit(pair, config.Rows(layout=layout, lengths=(1, need)))
        assert unfit(pair, config.Rows(layout=layout, lengths=(need - 1, 1)))
        with pytest.raises(InputError, match='longest row'):
            fill_rows([pair], config.Rows(layout=layout, lengths=(need - 1,)))


@pytest.mark.parametrize(
    'settings_, row_multiple, words',
    [
        (config.Rows(lengths=(64,), microbatch=6), 4, 'multiple of the 4 devices.*such as 8'),
        (config.Rows(lengths=(64,), microbatch=0), 1, 'microbatch'),
        (config.Rows(lengths=()), 1, 'lengths'),
        (config.Rows(lengths=(64, 0)), 1, 'lengths'),
        (config.Rows(lengths=(64,), pairs_per_row=0), 1, 'pairs_per_row'),
    ],
)
def test_impossible_settings_are_refused(settings_, row_multiple, words):
    with pytest.raises(InputError, match=words):
        fill_rows(random_pairs(0, 1), settings_, row_multiple=row_multiple)


def test_no_pairs_are_refused():
    with pytest.raises(InputError, match='at least one pair'):
        fill_rows([], config.Rows())
