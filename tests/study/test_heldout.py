"""Held-out pairs: two splits that share no prompt, by the prompt alone, and batches that padding does not change."""

import jax
import numpy as np
import pytest

from jaxpo.config import Rows
from jaxpo.errors import InputError
from jaxpo.study import heldout
from jaxpo.study.measures import metrics_of
from jaxpo.types import Pair

ROWS = Rows(lengths=(32, 64), microbatch=8, pairs_per_row=3)


def pairs(count, prompts=None, seed=0, first=0):
    """Pairs of few prompts, of unequal lengths."""
    random = np.random.default_rng(seed)
    known = [random.integers(3, 20, random.integers(1, 9)) for _ in range(prompts or count)]

    def one(index):
        sides = (random.integers(3, 20, random.integers(1, 12)) for _ in range(2))
        return Pair(known[index % len(known)], *sides, index=first + index)

    return [one(index) for index in range(count)]


def prompts_of(members):
    return {pair.prompt.tobytes() for pair in members}


def test_splits_cover_all_pairs_and_share_no_prompt():
    given = pairs(300, prompts=90)
    held = heldout.hold_out(ROWS, given, [], 0.3)
    selection, report = held.pairs['selection'], held.pairs['report']
    assert not prompts_of(selection) & prompts_of(report)
    assert sorted(pair.index for pair in (*selection, *report)) == list(range(300))
    share = len(prompts_of(selection)) / len(prompts_of(given))
    assert 0.15 < share < 0.45


def test_the_split_of_a_prompt_depends_on_nothing_else():
    given = pairs(60)
    whole = heldout.hold_out(ROWS, given, [], 0.5).pairs
    fewer = heldout.hold_out(ROWS, given[::-1][:40], pairs(9, seed=1), 0.5).pairs
    for split in ('selection', 'report'):
        assert prompts_of(fewer[split]) <= prompts_of(whole[split])
    # The same whatever the integers' type, and larger with a larger share.
    wide = [heldout.split_of(pair.prompt.astype(np.int64), 0.5) for pair in given]
    assert wide == [heldout.split_of(pair.prompt.astype(np.int32), 0.5) for pair in given]
    more = [heldout.split_of(pair.prompt, 0.8) for pair in given]
    assert all(now == 'selection' for before, now in zip(wide, more) if before == 'selection') and more != wide


def test_pairs_with_a_side_missing_are_left_out():
    given = pairs(40)
    given[5] = Pair(given[5].prompt, given[5].chosen, np.zeros(0, int), index=5)
    held = heldout.hold_out(ROWS, given, given[:10], 0.5)
    assert sum(len(held.pairs[split]) for split in ('selection', 'report')) == 39
    assert [pair.index for pair in held.pairs['train']] == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_as_many_training_pairs_as_are_reported():
    held = heldout.hold_out(ROWS, pairs(30), pairs(200, seed=1, first=1000), 0.5)
    assert [pair.index for pair in held.pairs['train']] == list(range(1000, 1000 + len(held.pairs['report'])))


def test_a_split_without_pairs_is_refused():
    with pytest.raises(InputError, match='none of the 8 held-out pairs is in the selection split'):
        heldout.hold_out(ROWS, pairs(8), [], 1e-6)
    assert heldout.hold_out(ROWS, [], pairs(8), 0.5).batches == {'selection': [], 'report': [], 'train': []}


def test_all_batches_have_one_shape_and_hold_each_pair_once():
    held = heldout.hold_out(ROWS, pairs(200, prompts=150), pairs(300, seed=1), 0.2, row_multiple=4)
    shapes = {heldout.shape_of(batch) for batches in held.batches.values() for batch in batches}
    assert len(shapes) == 1 and next(iter(shapes)).rows % 4 == 0
    assert len(held.batches['report']) > 1
    for split, batches in held.batches.items():
        places = np.concatenate([batch.pair_index.reshape(-1) for batch in batches])
        assert sorted(places[places >= 0]) == list(range(len(held.pairs[split])))
        weights = np.concatenate([batch.pair_weight.reshape(-1) for batch in batches])
        np.testing.assert_array_equal(weights > 0, places >= 0)


def test_batches_of_one_shape_leave_little_of_it_empty():
    held = heldout.hold_out(ROWS, pairs(120), pairs(200, seed=1), 0.45)
    sizes = [(batch.pair_index >= 0).sum() for batches in held.batches.values() for batch in batches]
    assert max(sizes) <= heldout.PAIRS_OF_A_BATCH < max(map(len, held.pairs.values()))
    assert sum(sizes) > 0.85 * len(sizes) * max(sizes)


def lengths_of(batch):
    """Numbers by pair that tell its tokens: what a program would say of it, on two cells."""
    weights = {side: getattr(batch, side).weights for side in ('chosen', 'rejected')}
    target = np.broadcast_to(batch.target[..., None, :], (*batch.pair_weight.shape, batch.target.shape[-1]))
    found = {'loss': batch.pair_weight * 0.5}
    for side, weight in weights.items():
        tokens = np.take_along_axis(target, getattr(batch, side).place, axis=-1)
        found[f'{side}_logps'] = -(tokens * weight).sum(axis=-1)
        found[f'{side}_reward'] = weight.sum(axis=-1)
    return {name: np.stack([values.reshape(-1), 2 * values.reshape(-1)]) for name, values in found.items()}


def test_numbers_come_back_by_pair_however_batches_are_padded():
    held = heldout.hold_out(ROWS, pairs(90, prompts=50), [], 0.2)
    shape = heldout.shape_of(held.batches['report'][0])
    larger = type(shape)(*(size + 3 for size in shape))
    padded = [heldout.padded(batch, larger) for batch in held.batches['report']]
    assert heldout.shape_of(padded[0]) == larger
    assert jax.tree.structure(padded[0]) == jax.tree.structure(held.batches['report'][0])
    members = held.pairs['report']
    for batches in (held.batches['report'], padded):
        again = heldout.HeldOut(0.2, held.pairs, {'report': batches})
        first, second = heldout.measure(again, 'report', lengths_of, [])
        np.testing.assert_array_equal(first.chosen_logps, [-pair.chosen.sum() for pair in members])
        np.testing.assert_array_equal(second.rejected_logps, [-2 * pair.rejected.sum() for pair in members])
        np.testing.assert_array_equal(first.rejected_reward, [pair.rejected.size for pair in members])
        np.testing.assert_array_equal(first.rejected_tokens, [pair.rejected.size for pair in members])
        np.testing.assert_array_equal(first.pair, [pair.index for pair in members])
        same = [[a.prompt.tobytes() == b.prompt.tobytes() for a in members] for b in members]
        np.testing.assert_array_equal(first.prompt[:, None] == first.prompt, same)


def test_later_numbers_keep_the_start_and_are_measured_against_it():
    held = heldout.hold_out(ROWS, pairs(40), [], 0.5)
    starts = heldout.measure(held, 'report', lengths_of, [])

    def later(batch):
        return {name: values + 1.5 * (values != 0) for name, values in lengths_of(batch).items()}

    now = heldout.measure(held, 'report', later, starts)
    for start, numbers in zip(starts, now):
        np.testing.assert_array_equal(start.chosen_start_logps, start.chosen_logps)
        np.testing.assert_array_equal(numbers.chosen_start_logps, start.chosen_logps)
        assert metrics_of(start)['log_ratios/chosen'] == 0 and metrics_of(start)['chosen_falling'] == 0
        assert metrics_of(numbers)['log_ratios/chosen'] == pytest.approx(1.5)
        assert metrics_of(start)['log_ratios/accuracies'] == 0.5
