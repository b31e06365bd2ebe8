"""Pairs -> rows of a batch: the one place that knows how pairs are laid out.

Shapes are few and static, since each one compiles: the row length T is one of `lengths`; scored tokens S come in
quarters of T; completions have room for all of T (C = T: they are scalars); rows R are a multiple of `row_multiple` up
to `microbatch`.
"""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxpo import config
from jaxpo.errors import InputError
from jaxpo.types import Batch, Pair, Places


class Shape(NamedTuple):
    """Sizes of a batch: microbatches A, rows R, tokens T, scored tokens S, pair slots P."""

    microbatches: int
    rows: int
    tokens: int
    scored: int
    slots: int


def lengths_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Tokens of prompt, chosen and rejected of each pair: [N, 3] int64."""
    lengths = [(pair.prompt.size, pair.chosen.size, pair.rejected.size) for pair in pairs]
    return np.asarray(lengths, np.int64).reshape(-1, 3)


def row_tokens(lengths: np.ndarray, layout: str) -> np.ndarray:
    """Tokens [N] a pair takes in its row: its prompt once where shared, else twice."""
    return lengths @ np.array([1 if layout == 'shared' else 2, 1, 1])


def unfit(pair: Pair, rows: config.Rows) -> bool:
    """Whether a pair is longer than the longest row."""
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
    """Shape of the batch that holds pairs of `lengths` [N, 3], and the row [N] of each pair.

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
    fullest = int(np.bincount(row_of, weights=lengths[:, 1] + lengths[:, 2]).max())
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
    """How many batches have each shape, for pairs of `lengths` [N, 3] and the pair indices of each batch."""
    return collections.Counter(plan_rows(lengths[batch], rows, row_multiple)[0] for batch in batches)


def fill_rows(pairs: Sequence[Pair], rows: config.Rows, *, row_multiple: int = 1) -> Batch:
    """Pairs in rows: every array of types.Batch as numpy, with a leading axis of microbatches: [A, R, ...].

    A pair lies within one row, a slot without a pair has weight 0. InputError: a pair longer than every row.
    """
    lengths = lengths_of(pairs)
    shape, row_of = plan_rows(lengths, rows, row_multiple)
    batch = _empty(shape, list(pairs[0].columns))
    token_end, scored_end, slot_end = (np.zeros(shape.microbatches * shape.rows, np.int64) for _ in range(3))
    for pair, row in zip(pairs, row_of):
        spot = _Spot(row, int(token_end[row]), int(scored_end[row]), int(slot_end[row]))
        write = _write_shared if rows.layout == 'shared' else _write_apart
        token_end[row] = write(batch, pair, spot)
        scored_end[row] += pair.chosen.size + pair.rejected.size
        slot_end[row] += 1
        batch.pair_weight[row, spot.slot] = 1
        batch.pair_index[row, spot.slot] = pair.index
        for name, value in pair.columns.items():
            batch.columns[name][row, spot.slot] = value
    return _split_rows(batch, shape)


class _Spot(NamedTuple):
    """Where a pair goes: its row, and the first free token, scored token and slot there."""

    row: int
    token: int
    scored: int
    slot: int


def _empty(shape: Shape, columns: list[str]) -> Batch:
    """A batch without pairs, its rows not yet split into microbatches."""
    count = shape.microbatches * shape.rows
    tokens, scored, slots = (count, shape.tokens), (count, shape.scored), (count, shape.slots)
    completions = (*slots, shape.tokens)
    return Batch(
        **{name: np.zeros(tokens, np.int32) for name in ('tokens', 'positions', 'segment', 'branch')},
        **{name: np.zeros(scored, np.int32) for name in ('source', 'target')},
        **{name: _nowhere(completions) for name in ('chosen', 'rejected')},
        companions={},
        pair_weight=np.zeros(slots, np.float32),
        pair_index=np.full(slots, -1, np.int32),
        columns={name: np.zeros(slots, np.float32) for name in columns},
    )


def _nowhere(shape: tuple[int, ...]) -> Places:
    return Places(np.zeros(shape, np.int32), np.zeros(shape, np.float32))


def _split_rows(batch: Batch, shape: Shape) -> Batch:
    def split(array: np.ndarray) -> np.ndarray:
        return array.reshape(shape.microbatches, shape.rows, *array.shape[1:])

    return jax.tree.map(split, batch)


def _write_shared(batch: Batch, pair: Pair, spot: _Spot) -> int:
    """Prompt, chosen, rejected in one segment. Returns the first free token."""
    segment = spot.slot + 1
    start = _write_prompt(batch, spot.row, spot.token, pair.prompt, segment)
    middle = _write_completion(batch, spot, start, start, pair.prompt.size, pair.chosen, segment, 1)
    behind = spot._replace(scored=spot.scored + pair.chosen.size)
    return _write_completion(batch, behind, middle, start, pair.prompt.size, pair.rejected, segment, 2)


def _write_apart(batch: Batch, pair: Pair, spot: _Spot) -> int:
    """Prompt and chosen in one segment, prompt and rejected in the next. Returns the first free token."""
    segment = 2 * spot.slot + 1
    start = _write_prompt(batch, spot.row, spot.token, pair.prompt, segment)
    end = _write_completion(batch, spot, start, start, pair.prompt.size, pair.chosen, segment, 1)
    start = _write_prompt(batch, spot.row, end, pair.prompt, segment + 1)
    behind = spot._replace(scored=spot.scored + pair.chosen.size)
    return _write_completion(batch, behind, start, start, pair.prompt.size, pair.rejected, segment + 1, 2)


def _write_prompt(batch: Batch, row: int, start: int, prompt: np.ndarray, segment: int) -> int:
    end = start + prompt.size
    batch.tokens[row, start:end] = prompt
    batch.positions[row, start:end] = np.arange(prompt.size)
    batch.segment[row, start:end] = segment
    return end


def _write_completion(
    batch: Batch,
    spot: _Spot,
    start: int,
    prompt_end: int,
    prompt_size: int,
    completion: np.ndarray,
    segment: int,
    branch: int,
) -> int:
    """Writes a completion at `start` whose first token is predicted by the last of its prompt, before `prompt_end`."""
    row, size = spot.row, completion.size
    end, first, last = start + size, spot.scored, spot.scored + size
    batch.tokens[row, start:end] = completion
    batch.positions[row, start:end] = np.arange(prompt_size, prompt_size + size)
    batch.segment[row, start:end] = segment
    batch.branch[row, start:end] = branch
    batch.source[row, first:last] = np.arange(start - 1, end - 1)
    batch.source[row, first] = prompt_end - 1
    batch.target[row, first:last] = completion
    places = batch.chosen if branch == 1 else batch.rejected
    places.place[row, spot.slot, :size] = np.arange(first, last)
    places.weights[row, spot.slot, :size] = 1
    return end
