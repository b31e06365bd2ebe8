"""Held-out pairs and prompts in two splits, one to choose settings on and one to report, and their batches."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np

from jaxpo import config
from jaxpo.data import rows
from jaxpo.data.rows import Shape
from jaxpo.errors import InputError
from jaxpo.study.measures import PairNumbers
from jaxpo.types import Batch, Pair

SELECTION, REPORT, TRAIN = SPLITS = ('selection', 'report', 'train')
PAIRS_OF_A_BATCH = 64
"""At most."""


def split_of(prompt: np.ndarray, selection_share: float) -> str:
    """The split of a prompt (its token ids): a function of the prompt alone, so that its pairs stay together."""
    digest = hashlib.sha256(np.asarray(prompt, '<i4').tobytes()).digest()
    return SELECTION if int.from_bytes(digest[:8], 'big') < selection_share * 2**64 else REPORT


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Pairs by split, those with both completions, and what is the same of them for every policy."""

    selection_share: float
    pairs: dict[str, list[Pair]]
    batches: dict[str, list[Batch]]
    """On the host, `[A, R, ...]`, all of one shape. `pair_index` counts a split's pairs."""


def hold_out(
    settings: config.Rows,
    evaluation: Sequence[Pair],
    training: Sequence[Pair],
    selection_share: float,
    row_multiple: int = 1,
) -> HeldOut:
    """The splits of held-out pairs, and as many training pairs, the first ones, to compare them with.

    Rows are split into `row_multiple` shares. InputError where a split has no pair.
    """
    both = [pair for pair in evaluation if pair.chosen.size and pair.rejected.size]
    pairs: dict[str, list[Pair]] = {SELECTION: [], REPORT: []}
    for pair in both:
        pairs[split_of(pair.prompt, selection_share)].append(pair)
    for name, members in pairs.items():
        if evaluation and not members:
            raise InputError(
                f'study: none of the {len(both)} held-out pairs is in the {name} split: give more of them, or another '
                'selection_share.'
            )
    complete = (pair for pair in training if pair.chosen.size and pair.rejected.size)
    pairs[TRAIN] = [pair for pair, _ in zip(complete, pairs[REPORT])]
    size = _batch_size([len(members) for members in pairs.values()])
    parts = {name: list(_parts(members, size)) for name, members in pairs.items()}
    filled = {
        name: [rows.fill_rows(part, settings, row_multiple=row_multiple) for part in members]
        for name, members in parts.items()
    }
    shape = largest([shape_of(batch) for batches in filled.values() for batch in batches])
    batches = {name: [padded(batch, shape) for batch in members] for name, members in filled.items()}
    return HeldOut(selection_share, pairs, batches)


def _batch_size(counts: Sequence[int]) -> int:
    """Pairs of a batch where splits have so many: as all batches have one shape, the size that leaves least empty."""
    sizes = range(PAIRS_OF_A_BATCH, PAIRS_OF_A_BATCH // 2, -1)
    return min(sizes, key=lambda size: size * sum(math.ceil(count / size) for count in counts))


def _parts(pairs: Sequence[Pair], size: int) -> Iterator[list[Pair]]:
    numbered = [dataclasses.replace(pair, index=place) for place, pair in enumerate(pairs)]
    return (numbered[start : start + size] for start in range(0, len(pairs), size))


def shape_of(batch: Batch) -> Shape:
    return Shape(*batch.tokens.shape, batch.source.shape[-1], batch.pair_weight.shape[-1])


def largest(shapes: Sequence[Shape]) -> Shape:
    """The least shape that holds batches of each of these."""
    return Shape(*(max(sizes) for sizes in zip(*shapes))) if shapes else Shape(0, 0, 0, 0, 0)


def padded(batch: Batch, shape: Shape) -> Batch:
    """The batch with empty microbatches, rows, tokens and scored tokens behind it, up to `shape`."""
    microbatches, count, tokens, scored, slots = shape
    leading = (microbatches, count)

    def pad(array: np.ndarray, *sizes: int, value: float = 0) -> np.ndarray:
        target = (*leading, *sizes)
        return np.pad(array, [(0, size - old) for size, old in zip(target, array.shape)], constant_values=value)

    def by_pair(array: np.ndarray) -> np.ndarray:
        return pad(array, slots, tokens) if array.ndim == 4 else pad(array, slots)

    by_token = {name: pad(getattr(batch, name), tokens) for name in ('tokens', 'positions', 'segment', 'branch')}
    by_target = {name: pad(getattr(batch, name), scored) for name in ('source', 'target')}
    names = ('chosen', 'rejected', 'companions', 'columns', 'table', 'pair_weight')
    rest = {name: jax.tree.map(by_pair, getattr(batch, name)) for name in names}
    return batch.replace(**by_token, **by_target, **rest, pair_index=pad(batch.pair_index, slots, value=-1))


def measure(
    held: HeldOut, split: str, numbers_of: Callable[[Batch], dict[str, np.ndarray]], starts: Sequence[PairNumbers]
) -> list[PairNumbers]:
    """Numbers by pair of each of n cells.

    Args:
      numbers_of: batch -> name -> `[n, A * R * P]`: `loss`, and of chosen and rejected `_logps` and `_reward`.
      starts: what was measured of each cell before its first step; empty where that is now.
    """
    pairs, found = held.pairs[split], {}
    for batch in held.batches[split]:
        place = batch.pair_index.reshape(-1)
        for name, values in numbers_of(batch).items():
            array = found.setdefault(name, np.zeros((len(values), len(pairs))))
            array[:, place[place >= 0]] = values[:, place >= 0]
    known, cells = _known(pairs), range(len(found['loss']))
    own = [{name: values[cell] for name, values in found.items()} for cell in cells]
    return [PairNumbers(**known, **own[cell], **_start(starts[cell] if starts else own[cell])) for cell in cells]


def _start(numbers: PairNumbers | Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    held = numbers if isinstance(numbers, Mapping) else vars(numbers)
    return {f'{side}_start_logps': held[f'{side}_logps'] for side in ('chosen', 'rejected')}


def _known(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    prompts: dict[bytes, int] = {}
    return {
        'pair': np.array([pair.index for pair in pairs]),
        'prompt': np.array([prompts.setdefault(pair.prompt.tobytes(), len(prompts)) for pair in pairs]),
        'chosen_tokens': np.array([pair.chosen.size for pair in pairs]),
        'rejected_tokens': np.array([pair.rejected.size for pair in pairs]),
    }
