"""Pairs -> rows of a batch: the one place that knows how pairs are laid out.

Shapes are few and static, since each one compiles: the row length T is one of `lengths`; scored tokens S come in
quarters of T; completions have room for all of T (C = T: they are scalars); rows R are a multiple of `row_multiple` up
to `microbatch`.
"""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxpo import config
from jaxpo.errors import InputError, unknown
from jaxpo.types import Batch, Pair, Places


class Shape(NamedTuple):
    """Sizes of a batch: microbatches A, rows R, tokens T, scored tokens S, pair slots P."""

    microbatches: int
    rows: int
    tokens: int
    scored: int
    slots: int


def lengths_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of each pair, then of each companion's prompt and completion.

    [N, 3 + 2 companions] int64. A completion that is not there has 0; nothing is written for it.
    """
    if not pairs or not pairs[0].companions:
        lengths = [(pair.prompt.size, pair.chosen.size, pair.rejected.size) for pair in pairs]
        return np.asarray(lengths, np.int64).reshape(-1, 3)
    return np.asarray([_lengths(pair) for pair in pairs], np.int64)


def _lengths(pair: Pair) -> list[int]:
    further = (size for other in pair.companions.values() for size in (other.prompt.size, other.completion.size))
    return [pair.prompt.size, pair.chosen.size, pair.rejected.size, *further]


def row_tokens(lengths: np.ndarray, layout: str) -> np.ndarray:
    """Tokens [N] a pair takes in its row: its prompt once where shared, else for each completion; all companions."""
    sides, prompts, completions = lengths[:, 1:3], lengths[:, 3::2], lengths[:, 4::2]
    copies = 1 if layout == 'shared' else (sides > 0).sum(axis=1)
    return lengths[:, 0] * copies + _scored(lengths) + (prompts * (completions > 0)).sum(axis=1)


def _scored(lengths: np.ndarray) -> np.ndarray:
    """Completion tokens [N] of a pair and its companions."""
    return lengths[:, 1:3].sum(axis=1) + lengths[:, 4::2].sum(axis=1)


def unfit(pair: Pair, rows: config.Rows) -> bool:
    """Whether a pair, companions included, is longer than the longest row."""
    return int(row_tokens(lengths_of([pair]), rows.layout)[0]) > max(rows.lengths)


def check_rows(rows: config.Rows, row_multiple: int = 1) -> None:
    """InputError for settings no batch can have. row_multiple: number of devices rows are split over."""
    if not rows.lengths or min(rows.lengths) < 1:
        raise InputError(f'rows.lengths must be positive row lengths, not {rows.lengths!r}.')
    if rows.pairs_per_row < 1:
        raise InputError(f'rows.pairs_per_row must be at least 1, not {rows.pairs_per_row!r}.')
    if rows.microbatch < 1 or rows.microbatch % row_multiple:
        nearest = max(1, round(rows.microbatch / row_multiple)) * row_multiple
        raise InputError(
            f'rows.microbatch {rows.microbatch} must be a multiple of the {row_multiple} devices that rows are '
            f'split over, such as {nearest}.'
        )


def plan_rows(lengths: np.ndarray, rows: config.Rows, row_multiple: int = 1) -> tuple[Shape, np.ndarray]:
    """Shape of the batch that holds pairs of `lengths` (`lengths_of`), and the row [N] of each pair.

    The row length is the one with the fewest tokens in all that holds the longest pair; of equals, the shorter.
    """
    check_rows(rows, row_multiple)
    sizes = row_tokens(lengths, rows.layout)
    if not len(sizes):
        raise InputError('A batch needs at least one pair.')
    candidates = [length for length in sorted(set(rows.lengths)) if length >= sizes.max()]
    if not candidates:
        raise InputError(f'A pair of {sizes.max()} tokens is longer than the longest row, {max(rows.lengths)}.')
    slots = 1 if rows.layout == 'padded' else rows.pairs_per_row
    plans = []
    for length in candidates:
        row_of = np.arange(len(sizes)) if slots == 1 else _first_fit_decreasing(sizes, length, slots)
        microbatches, count = _row_counts(int(row_of.max()) + 1, rows.microbatch, row_multiple)
        plans.append((microbatches * count * length, length, microbatches, count, row_of))
    _, length, microbatches, count, row_of = min(plans, key=lambda plan: plan[:2])
    fullest = int(np.bincount(row_of, weights=_scored(lengths)).max())
    scored = -(-_quarters(fullest, length) // 8) * 8
    return Shape(microbatches, count, length, scored, slots), row_of


def _row_counts(used: int, microbatch: int, row_multiple: int) -> tuple[int, int]:
    """Microbatches, and rows of each, for `used` rows: as few microbatches as do, all of one size.

    Above 4 times `row_multiple`, sizes come in quarters of a power of two (5, 6, 7, 8, 10, 12, 14, 16, 20, ...),
    so that batches of nearly the same size share a shape.
    """
    microbatches = -(-used // microbatch)
    units = -(-used // (microbatches * row_multiple))
    step = 2 ** max(0, (units - 1).bit_length() - 3)
    return microbatches, min(microbatch, -(-units // step) * step * row_multiple)


def _quarters(count: int, length: int) -> int:
    """The smallest of a quarter, a half, three quarters and all of `length` (rounded up) that holds `count`."""
    return next(size for size in (-(-length * part // 4) for part in (1, 2, 3, 4)) if size >= count)


def _first_fit_decreasing(sizes: np.ndarray, length: int, slots: int) -> np.ndarray:
    """Row of each pair: pairs by falling size (ties in order), each into the first row with room for it."""
    row_of = np.zeros(len(sizes), np.int64)
    room = np.full(len(sizes), length)
    left = np.full(len(sizes), slots)
    opened = 0
    for pair in np.argsort(-sizes, kind='stable'):
        row = int(np.argmax(room[: opened + 1] >= sizes[pair]))
        room[row] -= sizes[pair]
        left[row] -= 1
        if left[row] == 0:
            room[row] = 0
        opened = max(opened, row + 1)
        row_of[pair] = row
    return row_of


def run_shapes(
    lengths: np.ndarray, batches: Iterable[np.ndarray], rows: config.Rows, *, row_multiple: int = 1
) -> collections.Counter[Shape]:
    """How many batches have each shape, for pairs of `lengths` (`lengths_of`) and the indices of each batch."""
    return collections.Counter(plan_rows(lengths[batch], rows, row_multiple)[0] for batch in batches)


def fill_rows(pairs: Sequence[Pair], rows: config.Rows, *, row_multiple: int = 1) -> Batch:
    """Pairs in rows: every array of types.Batch as numpy, with a leading axis of microbatches: [A, R, ...].

    A pair lies within one row, a slot without a pair has weight 0. InputError: a pair longer than every row, with
    other columns, companions or table than the first, or with a table of other lengths than its completions have.
    """
    _check_names(pairs)
    for pair in pairs:
        _check_table(pair)
    shape, row_of = plan_rows(lengths_of(pairs), rows, row_multiple)
    batch = _empty(shape, pairs[0])
    spots = [_Spot(row) for row in range(shape.microbatches * shape.rows)]
    for pair, row in zip(pairs, row_of):
        _write_pair(batch, pair, spots[row], shared=rows.layout == 'shared')
    return _split_rows(batch, shape)


def _check_names(pairs: Sequence[Pair]) -> None:
    for kind, names_of in (('columns', list), ('companions', list), ('table', _table_names)):
        first = names_of(getattr(pairs[0], kind)) if pairs else []
        for pair in pairs:
            names = names_of(getattr(pair, kind))
            if names != first:
                raise InputError(f'Pair {pair.index} has the {kind} {names}, but pair {pairs[0].index} has {first}.')


def _table_names(table: dict) -> list[str]:
    """What a pair's table holds, sorted: `chosen.big.logps`, and `[]` behind it where it is a number a token."""
    return sorted(
        f'{completion}.{reference}.{statistic}{"[]" if np.ndim(value) else ""}'
        for completion, references in table.items()
        for reference, statistics in references.items()
        for statistic, value in statistics.items()
    )


def _check_table(pair: Pair) -> None:
    """InputError for a table of completions the pair does not know, or with another number of tokens than they have.

    A completion that is not there has empty vectors.
    """
    others = {name: other.completion for name, other in pair.companions.items()}
    completions = {'chosen': pair.chosen, 'rejected': pair.rejected, **others}
    for name, references in pair.table.items():
        if name not in completions:
            raise unknown(f'completion of the table of pair {pair.index}', name, completions)
        for reference, statistics in references.items():
            for statistic, value in statistics.items():
                if np.ndim(value) and np.shape(value) != completions[name].shape:
                    raise InputError(
                        f'Pair {pair.index}: its table has {np.size(value)} {statistic} of {name} by {reference}, '
                        f'which has {completions[name].size} tokens.'
                    )


@dataclasses.dataclass
class _Spot:
    """The first free token, scored token, slot and segment of a row."""

    row: int
    token: int = 0
    scored: int = 0
    slot: int = 0
    segment: int = 1


def _empty(shape: Shape, pair: Pair) -> Batch:
    """A batch without pairs, its rows not yet split into microbatches, for pairs with numbers such as `pair` has."""
    count = shape.microbatches * shape.rows
    tokens, scored, slots = (count, shape.tokens), (count, shape.scored), (count, shape.slots)
    completions = (*slots, shape.tokens)

    def numbers(value: float | np.ndarray) -> np.ndarray:
        return np.zeros(completions if np.ndim(value) else slots, np.float32)

    return Batch(
        **{name: np.zeros(tokens, np.int32) for name in ('tokens', 'positions', 'segment', 'branch')},
        **{name: np.zeros(scored, np.int32) for name in ('source', 'target')},
        **{name: _nowhere(completions) for name in ('chosen', 'rejected')},
        companions={name: _nowhere(completions) for name in pair.companions},
        pair_weight=np.zeros(slots, np.float32),
        pair_index=np.full(slots, -1, np.int32),
        columns=jax.tree.map(numbers, pair.columns),
        table=jax.tree.map(numbers, pair.table),
    )


def _nowhere(shape: tuple[int, ...]) -> Places:
    return Places(np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def _split_rows(batch: Batch, shape: Shape) -> Batch:
    def split(array: np.ndarray) -> np.ndarray:
        return array.reshape(shape.microbatches, shape.rows, *array.shape[1:])

    return jax.tree.map(split, batch)


def _write_pair(batch: Batch, pair: Pair, spot: _Spot, *, shared: bool) -> None:
    """Writes a pair behind what is in its row, and moves `spot` behind the pair."""
    sides = ((batch.chosen, pair.chosen, 1), (batch.rejected, pair.rejected, 2))
    there = [side for side in sides if side[1].size]
    for completions in [there] if shared else [[side] for side in there]:
        _write_segment(batch, spot, pair.prompt, completions)
    for name, other in pair.companions.items():
        if other.completion.size:
            _write_segment(batch, spot, other.prompt, [(batch.companions[name], other.completion, 1)])
    batch.pair_weight[spot.row, spot.slot] = 1
    batch.pair_index[spot.row, spot.slot] = pair.index
    for array, value in zip(*(jax.tree.leaves((holder.columns, holder.table)) for holder in (batch, pair))):
        if np.ndim(value):
            array[spot.row, spot.slot, : value.size] = value
        else:
            array[spot.row, spot.slot] = value
    spot.slot += 1


def _write_segment(
    batch: Batch, spot: _Spot, prompt: np.ndarray, completions: Sequence[tuple[Places, np.ndarray, int]]
) -> None:
    """Writes a prompt and completions of it, each with its Places and branch, into a segment of their own."""
    row, start = spot.row, spot.token
    spot.token += prompt.size
    batch.tokens[row, start : spot.token] = prompt
    batch.positions[row, start : spot.token] = np.arange(prompt.size)
    prompt_end = spot.token
    for places, completion, branch in completions:
        _write_completion(batch, spot, places, prompt_end, prompt.size, completion, branch)
    batch.segment[row, start : spot.token] = spot.segment
    spot.segment += 1


def _write_completion(
    batch: Batch, spot: _Spot, places: Places, prompt_end: int, prompt_size: int, completion: np.ndarray, branch: int
) -> None:
    """Writes a completion whose first token is predicted by the last of its prompt, before `prompt_end`."""
    row, size, start, first = spot.row, completion.size, spot.token, spot.scored
    end, last = start + size, first + size
    batch.tokens[row, start:end] = completion
    batch.positions[row, start:end] = np.arange(prompt_size, prompt_size + size)
    batch.branch[row, start:end] = branch
    batch.source[row, first:last] = np.arange(start - 1, end - 1)
    batch.source[row, first] = prompt_end - 1
    batch.target[row, first:last] = completion
    places.place[row, spot.slot, :size] = np.arange(first, last)
    places.weights[row, spot.slot, :size] = 1
    spot.token, spot.scored = end, last
