import dataclasses
import operator

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo import config
from jaxpo.data import rows as rows_module
from jaxpo.data.rows import fill_rows, plan_rows, run_shapes, unfit
from jaxpo.errors import InputError
from jaxpo.types import Pair, Sequence

LAYOUTS = ('padded', 'packed', 'shared')


def ids(rng, size):
    return rng.integers(0, 90, size).astype(np.int32)


def table_of(rng, completion):
    """What the tables of two references say of a completion."""
    logps, entropy, far = rng.normal(size=(3, completion.size)).astype(np.float32)
    return {
        'near': {'logps': logps, 'entropy': entropy},
        'far': {'logps': far, 'length': float(3 * completion.size) / 2},
    }


def random_pairs(seed, count, longest=10, *, unpaired=False, companions=(), tokens=False, table=False):
    """Pairs with a margin; where asked for, some with one completion, each with companions, token columns, tables."""
    rng = np.random.default_rng(seed)
    pairs = []
    for index, (prompt, chosen, rejected) in enumerate(rng.integers(1, longest, (count, 3))):
        kind = rng.integers(3) if unpaired else 0
        sides = {'chosen': ids(rng, chosen * (kind != 1)), 'rejected': ids(rng, rejected * (kind != 2))}
        columns = {'margin': float(index) / 2}
        if tokens:
            columns |= {f'{side}_segment': rng.normal(size=a.size).astype(np.float32) for side, a in sides.items()}
        others = {name: Sequence(*(ids(rng, size) for size in rng.integers(1, longest, 2))) for name in companions}
        if 'corrupted' in others:
            others['corrupted'] = dataclasses.replace(others['corrupted'], completion=sides['chosen'])
        completions = sides | {name: other.completion for name, other in others.items()}
        found = {name: table_of(rng, completion) for name, completion in completions.items()} if table else {}
        pairs.append(Pair(ids(rng, prompt), **sides, index=index, columns=columns, companions=others, table=found))
    return pairs


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


def read_completion(row, places, slot, branch):
    """The prompt, the completion and its places in S of one slot as the attention sees them; None where it has none.

    Asserts that every context is causal.
    """
    weights, place = places.weights[slot], places.place[slot]
    count = int(weights.sum())
    assert weights[:count].tolist() == [1] * count and not weights[count:].any()
    assert not place[count:].any()
    if not count:
        return None
    scored = place[:count]
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
    assert row['branch'][contexts[0]].tolist() == [0] * len(prompt)
    assert {int(row['branch'][context[-1]]) for context in contexts[1:]} <= {branch}
    return prompt, targets.tolist(), scored.tolist()


def read_slot(row, slot):
    """One pair as `as_lists` has it."""
    sides = {
        'chosen': read_completion(row, row['chosen'], slot, 1),
        'rejected': read_completion(row, row['rejected'], slot, 2),
    }
    there = [side for side in sides.values() if side]
    assert there and there[0][0] == there[-1][0]
    others = {name: read_completion(row, places, slot, 1) for name, places in row['companions'].items()}
    found = [place for one in [*sides.values(), *others.values()] if one for place in one[2]]
    assert len(set(found)) == len(found)  # no token is scored twice
    for other in others.values():
        if other:  # alone in its segment
            segment = row['segment'][row['source'][other[2][0]]]
            last_token = len(other[0]) + len(other[1])
            assert (row['segment'] == segment).sum() == last_token
    columns = {name: values[slot] for name, values in row['columns'].items()}
    for name, side in (('chosen_segment', sides['chosen']), ('rejected_segment', sides['rejected'])):
        if name in columns:
            count = len(side[1]) if side else 0
            assert not columns[name][count:].any()
            columns[name] = columns[name][:count]
    completions = [side[1] if side else [] for side in sides.values()]
    counts = {name: len(one[1]) if one else 0 for name, one in {**sides, **others}.items()}
    table = {name: read_table(found, slot, counts[name]) for name, found in row['table'].items()}
    others = {name: other[:2] if other else None for name, other in others.items()}
    return there[0][0], *completions, {name: value.tolist() for name, value in columns.items()}, others, table


def read_table(references, slot, count):
    """What a row's table says of one completion of `count` tokens, as lists."""
    values = jax.tree.map(operator.itemgetter(slot), references)
    assert not any(value[count:].any() for value in jax.tree.leaves(values) if value.ndim)
    return jax.tree.map(lambda value: value[:count].tolist() if value.ndim else value.tolist(), values)


def read_batch(batch):
    """Pairs of a batch by index, read slowly; asserts what types.Batch says of empty places."""
    found = {}
    for micro, number in np.ndindex(*batch.tokens.shape[:2]):
        one = jax.tree.map(operator.itemgetter((micro, number)), batch)
        row = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
        padding = row['segment'] == 0
        for name in ('tokens', 'positions', 'branch'):
            assert not row[name][padding].any()
        for slot, weight in enumerate(row['pair_weight']):
            index = int(row['pair_index'][slot])
            if weight == 0:
                places = [row['chosen'], row['rejected'], *row['companions'].values()]
                assert index == -1 and not any(one.weights[slot].any() for one in places)
                assert not any(values[slot].any() for values in jax.tree.leaves((row['columns'], row['table'])))
                continue
            assert weight == 1 and index not in found
            found[index] = read_slot(row, slot)
    return found


def as_lists(pairs):
    def sequence(other):
        return (other.prompt.tolist(), other.completion.tolist()) if other.completion.size else None

    return {
        pair.index: (
            pair.prompt.tolist(),
            pair.chosen.tolist(),
            pair.rejected.tolist(),
            {name: np.asarray(value).tolist() for name, value in pair.columns.items()},
            {name: sequence(other) for name, other in pair.companions.items()},
            jax.tree.map(lambda value: np.asarray(value).tolist(), pair.table),
        )
        for pair in pairs
    }


EXTRAS = {'companions': ('mismatched', 'corrupted'), 'tokens': True, 'unpaired': True, 'table': True}


def tokens_in_row(pair, layout):
    sides = [side for side in (pair.chosen, pair.rejected) if side.size]
    tokens = pair.prompt.size * (1 if layout == 'shared' else len(sides)) + sum(side.size for side in sides)
    others = [other for other in pair.companions.values() if other.completion.size]
    return tokens + sum(other.prompt.size + other.completion.size for other in others)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.sampled_from([(64,), (40, 64), (64, 50, 90)]),
    st.sampled_from([(4, 1), (4, 2), (8, 8), (1, 1)]),
    st.integers(1, 4),
    st.fixed_dictionaries({}, optional={name: st.just(value) for name, value in EXTRAS.items()}),
)
def test_attention_sees_every_pair_whole(layout, seed, count, lengths, rows, pairs_per_row, extras):
    microbatch, row_multiple = rows
    pairs = random_pairs(seed, count, 7 if 'companions' in extras else 10, **extras)
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
    sizes = [tokens_in_row(pair, layout) for pair in pairs]
    assert (batch.segment > 0).sum() == sum(sizes)
    assert rows_module.row_tokens(rows_module.lengths_of(pairs), layout).tolist() == sizes


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_reader_notices_a_wrong_batch(layout):
    pairs = random_pairs(1, 3, companions=EXTRAS['companions'], tokens=True, table=True)
    batch = fill_rows(pairs, config.Rows(layout=layout, lengths=(128,)))
    mismatched, corrupted = batch.companions['mismatched'], batch.companions['corrupted']

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
    assert broken(companions={'mismatched': corrupted, 'corrupted': mismatched})
    assert broken(companions={'mismatched': mismatched, 'corrupted': batch.chosen})
    assert broken(companions={'mismatched': mismatched, 'corrupted': corrupted.replace(weights=mismatched.weights)})
    for name, values in batch.columns.items():
        assert broken(columns={**batch.columns, name: values * 0})
        assert broken(columns={**batch.columns, name: values + 1})
    for name in ('chosen_segment', 'rejected_segment'):
        assert broken(columns={**batch.columns, name: np.roll(batch.columns[name], 1, axis=-1)})
    table = batch.table
    assert broken(table={**table, 'chosen': table['rejected'], 'rejected': table['chosen']})
    assert broken(table={**table, 'mismatched': table['corrupted'], 'corrupted': table['mismatched']})
    for name, references in table.items():
        for change in (np.zeros_like, lambda values: values + 1, lambda values: np.roll(values, 1, axis=-1)):
            changed = jax.tree.map(change, references)
            assert broken(table={**table, name: {**references, 'near': changed['near']}})
            assert broken(
                table={
                    **table,
                    name: {**references, 'far': {**references['far'], 'logps': 0 * changed['far']['logps']}},
                }
            )


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_tables_numbers_lie_at_the_tokens_they_are_of(layout):
    """Numbers that are made of the tokens are found at the places where the row's targets are these tokens."""
    pairs = [with_table_of_tokens(pair) for pair in random_pairs(8, 11, unpaired=True, companions=('corrupted',))]
    settings_ = config.Rows(layout=layout, lengths=(64,), microbatch=2, pairs_per_row=3)
    batch = fill_rows(pairs, settings_, row_multiple=2)
    assert batch.tokens.shape[0] > 1
    sides = {'chosen': batch.chosen, 'rejected': batch.rejected, **batch.companions}
    assert set(batch.table) == set(sides)
    for name, places in sides.items():
        found = batch.table[name]['big']
        target = np.take_along_axis(batch.target[:, :, None], places.place, axis=-1)
        assert found['logps'].dtype == found['length'].dtype == np.float32
        assert np.array_equal(found['logps'], (-0.5 - target) * places.weights)
        assert np.array_equal(found['length'], 2 * places.weights.sum(axis=-1))
        assert places.weights.any() and (places.weights == 0).any()


def with_table_of_tokens(pair):
    completions = {'chosen': pair.chosen, 'rejected': pair.rejected}
    completions |= {name: other.completion for name, other in pair.companions.items()}
    table = {
        name: {'big': {'logps': (-0.5 - ids_).astype(np.float32), 'length': 2 * ids_.size}}
        for name, ids_ in completions.items()
    }
    return dataclasses.replace(pair, table=table)


def test_pairs_of_one_batch_have_the_same_table():
    first, second = random_pairs(1, 2, table=True)
    settings_ = config.Rows(lengths=(64,))

    def refused(words, **table):
        with pytest.raises(InputError, match=words):
            fill_rows([first, dataclasses.replace(second, table={**second.table, **table})], settings_)

    chosen = second.table['chosen']
    refused(
        r"Pair 1 has the table \[.*'chosen.other.logps\[\]'.*but pair 0 has", chosen={**chosen, 'other': chosen['near']}
    )
    refused('Pair 1 has the table', chosen={'near': chosen['near']})
    refused('Pair 1 has the table', chosen={**chosen, 'near': {'logps': chosen['near']['logps']}})
    refused('Pair 1 has the table', chosen={**chosen, 'far': {**chosen['far'], 'length': chosen['far']['logps']}})
    longer = {**chosen['near'], 'entropy': np.append(chosen['near']['entropy'], np.float32(1))}
    size = second.chosen.size
    refused(
        f'Pair 1.* {size + 1} entropy of chosen by near, which has {size} tokens', chosen={**chosen, 'near': longer}
    )
    with pytest.raises(InputError, match='Pair 1 has the table.*but pair 0 has'):
        fill_rows([first, dataclasses.replace(second, table={})], settings_)
    for pair in (first, second):
        pair.table['chosne'] = pair.table['chosen']
    with pytest.raises(InputError, match="table of pair 0 'chosne'. Did you mean 'chosen'"):
        fill_rows([first, second], settings_)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_the_reader_notices_a_completion_that_is_not_there(layout):
    pairs = random_pairs(3, 4, unpaired=True)
    batch = fill_rows(pairs, config.Rows(layout=layout, lengths=(128,)))
    whole = fill_rows(random_pairs(3, 4), config.Rows(layout=layout, lengths=(128,)))
    assert read_batch(batch) == as_lists(pairs) and read_batch(whole) != as_lists(pairs)
    swapped = [dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen) for pair in pairs]
    assert read_batch(batch) != as_lists(swapped)


def test_a_companion_has_a_segment_of_its_own_in_every_layout():
    for layout in LAYOUTS:
        pair = random_pairs(1, 1, companions=('corrupted',))[0]
        batch = fill_rows([pair], config.Rows(layout=layout, lengths=(128,)))
        assert batch.segment.max() == (2 if layout == 'shared' else 3)
        corrupted = pair.companions['corrupted']
        assert (batch.segment == batch.segment.max()).sum() == corrupted.prompt.size + corrupted.completion.size


def test_pairs_of_one_batch_have_the_same_columns_and_companions():
    first, second = random_pairs(1, 2)
    settings_ = config.Rows(lengths=(64,))
    with pytest.raises(InputError, match=r"Pair 1 has the columns \['weight'\], but pair 0 has \['margin'\]"):
        fill_rows([first, dataclasses.replace(second, columns={'weight': 1.0})], settings_)
    other = dataclasses.replace(second, companions={'corrupted': Sequence(second.prompt, second.chosen)})
    with pytest.raises(InputError, match='Pair 1 has the companions'):
        fill_rows([first, other], settings_)


def test_dtypes_and_shapes():
    pairs = random_pairs(2, 7, 6, companions=('mismatched',), tokens=True, table=True)
    settings_ = config.Rows(layout='packed', lengths=(64,), microbatch=2, pairs_per_row=3)
    batch = fill_rows(pairs, settings_)
    shape, _ = plan_rows(rows_module.lengths_of(pairs), settings_)
    lead = (shape.microbatches, shape.rows)
    completions = (*lead, 3, shape.tokens)
    assert batch.tokens.shape == (*lead, 64) and batch.source.shape == (*lead, shape.scored)
    assert set(batch.companions) == {'mismatched'}
    for places in (batch.chosen, batch.rejected, batch.companions['mismatched']):
        assert places.place.shape == places.weights.shape == completions
        assert places.place.dtype == np.int32 and places.weights.dtype == np.float32
    assert batch.pair_weight.shape == batch.pair_index.shape == (*lead, 3)
    assert {name: values.shape for name, values in batch.columns.items()} == {
        'margin': (*lead, 3), 'chosen_segment': completions, 'rejected_segment': completions
    }  # fmt: skip
    assert set(batch.table) == {'chosen', 'rejected', 'mismatched'}
    for references in batch.table.values():
        assert jax.tree.map(np.shape, references) == {
            'near': {'logps': completions, 'entropy': completions}, 'far': {'logps': completions, 'length': (*lead, 3)}
        }  # fmt: skip
    numbers = (batch.pair_weight, *jax.tree.leaves((batch.columns, batch.table)))
    assert all(values.dtype == np.float32 for values in numbers)
    for name in ('tokens', 'positions', 'segment', 'branch', 'source', 'target', 'pair_index'):
        assert getattr(batch, name).dtype == np.int32


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
    pairs = random_pairs(4, 30, 6, **EXTRAS)
    settings_ = config.Rows(layout='shared', lengths=(48, 64), microbatch=4, pairs_per_row=3)
    first, second = (fill_rows(pairs, settings_, row_multiple=2) for _ in range(2))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, second)))
    batches = [np.arange(0, 10), np.arange(10, 30), np.arange(10, 30)]
    shapes = run_shapes(rows_module.lengths_of(pairs), batches, settings_, row_multiple=2)
    assert sum(shapes.values()) == 3
    for batch in batches:
        filled = fill_rows([pairs[place] for place in batch], settings_, row_multiple=2)
        shape = (*filled.tokens.shape, filled.source.shape[-1], filled.chosen.place.shape[-2])
        assert shape in shapes


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('extras', [{}, EXTRAS], ids=['plain', 'extras'])
def test_a_pair_fits_exactly_or_not(layout, extras):
    for pair in random_pairs(5, 6, **extras):
        need = tokens_in_row(pair, layout)
        exact = config.Rows(layout=layout, lengths=(1, need))
        assert not unfit(pair, exact) and fill_rows([pair], exact).tokens.shape[-1] == need
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
