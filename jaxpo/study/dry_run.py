"""What a study would take: its cells with tokens, time and device-hours. Nothing is trained or written."""

import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.markup import escape

from jaxpo import storage
from jaxpo.console import console, table
from jaxpo.experiment import Reward
from jaxpo.plan import cost
from jaxpo.plan.program import example_batch, example_pair
from jaxpo.study import records
from jaxpo.study.bundles import Bundle
from jaxpo.study.design import Cell, Study
from jaxpo.study.evidence import words_of
from jaxpo.study.workshop import Workshop

_SIDE = 2048  # of the matrices whose product says how fast this device is


class Estimate(NamedTuple):
    """What one cell takes."""

    tokens: int | None  # of training rows; None where the experiment trains in a way of its own
    seconds: float | None
    source: str  # 'at least', or nothing where cells of the method have been measured


def show(
    root: storage.Path,
    study: Study,
    path: pathlib.Path,
    reward: Reward | None,
    bundles: Sequence[Bundle],
    *,
    own: bool,
) -> None:
    """Prints a row for each method and setting, and what is left of it all.

    Seconds are the median of cells of the same method that have ended in the study's directory. Where there are none
    they are a lower bound by arithmetic, of its matrix products at the rate this device multiplies matrices: small
    models take several times as long, and evaluation and compilation come on top.
    """
    ended, measured = records.states(root), _measured(root)
    estimates = {} if own else _by_arithmetic(Workshop(study, path, reward, lambda filled: None), bundles)
    rows, total, left = [], 0.0, 0.0
    for (method, setting), cells in _by_setting(bundles).items():
        one = estimates.get(cells[0].id, Estimate(None, None, ''))
        if method in measured:
            one = one._replace(seconds=measured[method], source='')
        hours = None if one.seconds is None else one.seconds * len(cells) * jax.device_count() / 3600
        unfinished = sum(cell.id not in ended for cell in cells)
        total += hours or 0.0
        left += (hours or 0.0) * unfinished / len(cells)
        rows.append(
            (escape(method), escape(setting), str(len(cells)), str(len(cells) - unfinished), *_said(one, hours))
        )
    header = ('method', 'setting', 'cells', 'ended', 'tokens each', 'seconds each', 'device hours')
    out, count = console(), sum(len(bundle.cells) for bundle in bundles)
    out.print(table(f'{count} cells in {len(bundles)} programs', header, rows))
    kinds = len({bundle.kind for bundle in bundles})
    out.print(f'{kinds} kinds of program, each compiled once for each shape of its batches.')
    out.print(f'{total:.2g} device-hours on {jax.device_count()} device(s), {left:.2g} of them left to do.')


def _said(one: Estimate, hours: float | None) -> tuple[str, str, str]:
    tokens = '?' if one.tokens is None else f'{one.tokens:,}'
    seconds = 'not known' if one.seconds is None else f'{one.source} {one.seconds:.3g}'.strip()
    return tokens, seconds, '?' if hours is None else f'{hours:.2g}'


def _by_setting(bundles: Sequence[Bundle]) -> dict[tuple[str, str], list[Cell]]:
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in (cell for bundle in bundles for cell in bundle.cells):
        found.setdefault((cell.method, words_of(cell.setting)), []).append(cell)
    return found


def _measured(root: storage.Path) -> dict[str, float]:
    """Median seconds of a method's cells that have finished."""
    if not (root / 'study.json').exists():
        return {}
    seconds: dict[str, list[float]] = {}
    for record in records.read(root):
        if record.state == records.FINISHED:
            seconds.setdefault(record.method, []).append(record.compute.seconds)
    return {method: float(np.median(values)) for method, values in seconds.items()}


def _by_arithmetic(workshop: Workshop, bundles: Sequence[Bundle]) -> dict[str, Estimate]:
    rate, found = _multiplications_a_second(workshop.study.base.model.dtype), {}
    for bundle in bundles:
        run = workshop.check(bundle)
        work = cost.work(run, example_batch(run), example_pair(run))
        for cell in bundle.cells:
            tokens = workshop.tokens(bundle, cell)
            seconds = work.executed_flops / work.tokens * tokens / rate
            found[cell.id] = Estimate(tokens, seconds, 'at least')
    return found


def _multiplications_a_second(dtype: str) -> float:
    """FLOP/s of all devices, by one product of square matrices on the first."""
    square = jnp.ones((_SIDE, _SIDE), dtype)
    product = jax.jit(jnp.matmul)
    product(square, square).block_until_ready()
    started = time.monotonic()
    product(square, square).block_until_ready()
    return 2 * _SIDE**3 / (time.monotonic() - started) * jax.device_count()
