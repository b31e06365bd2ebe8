"""Which pairs a step takes: a pure function of (seed, step), so that a resumed run continues exactly."""

import functools
import math

import numpy as np

from jaxpo.errors import InputError

_SUBSET = 2**192  # where subsets start in a stream whose start belongs to permutations


def pair_indices(seed: int, step: int, batch_pairs: int, count: int, total: int) -> np.ndarray:
    """Indices [<= batch_pairs] int64 of the pairs of `step` (from 0), out of `count` pairs.

    The permutations of epochs 0, 1, ... make one endless stream, of which step s takes items
    [s * batch_pairs, (s + 1) * batch_pairs), cut off at `total` items: a batch may span two epochs, the last
    step may be short, and no pair is lost.
    """
    items = np.arange(step * batch_pairs, min((step + 1) * batch_pairs, total))
    epochs = items // count
    order = [_permutation(seed, int(epoch), count)[items[epochs == epoch] % count] for epoch in np.unique(epochs)]
    return np.concatenate(order) if order else items


def subset(seed: int, step: int, count: int, size: int) -> np.ndarray:
    """`size` of the indices below `count`, drawn anew for each step: a function of seed and step."""
    bits = np.random.Philox(key=np.array([seed % 2**64, step], np.uint64), counter=_SUBSET).random_raw(count)
    return np.sort(np.argsort(bits, kind='stable')[:size])


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """A permutation of range(count). Sorted raw bits, as numpy keeps bit streams across versions, not shuffles."""
    bits = np.random.Philox(key=np.array([seed % 2**64, epoch], np.uint64)).random_raw(count)
    order = np.argsort(bits, kind='stable')
    order.flags.writeable = False
    return order


def items_of(epochs: float, count: int) -> int:
    """Pairs seen in `epochs` passes over `count` pairs, at least one. InputError where there are none."""
    if not (epochs > 0 and math.isfinite(epochs)):
        raise InputError(f'epochs must be a positive number, not {epochs!r}.')
    if count < 1:
        raise InputError('There are no pairs to train on.')
    return max(1, round(epochs * count))


def steps_of(epochs: float, count: int, batch_pairs: int) -> int:
    """Optimizer steps of `batch_pairs` pairs in `epochs` passes; the last may be short."""
    if batch_pairs < 1:
        raise InputError(f'batch_pairs must be at least 1, not {batch_pairs!r}.')
    return math.ceil(items_of(epochs, count) / batch_pairs)
