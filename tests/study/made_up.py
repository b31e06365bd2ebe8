"""Made-up studies on disk, written as real ones are: what their cells found is chosen here, so answers are known."""

import dataclasses
import pathlib
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxpo.study import design, measures, records
from jaxpo.study.design import Cell, Method, Study
from jaxpo.study.measures import PairNumbers
from jaxpo.study.records import Compute, Outcome

STEPS = (0, 5, 10)
PAIRS, PROMPTS = 12, 8
VERSIONS = {'jax': '0.10.2', 'commit': 'c0ffee', 'device': 'cpu', 'devices': 1}
Scores = Callable[[Cell], Mapping[str, float]]  # split -> the metric after the last step


@dataclasses.dataclass(frozen=True)
class Train:
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Base:
    """What the cells of a made-up study share."""

    output: str = 'runs/made_up'
    objective: dict = dataclasses.field(default_factory=dict)
    train: Train = Train()
    label: str = ''
    rate: float = 0.1


def study(methods: Sequence[str] = ('dpo', 'ipo'), rates: Sequence[float] = (0.1, 0.2), **changes) -> Study:
    """Methods by name, the first the baseline, all of the same loss and apart by their label alone."""
    made = {name: Method({'dpo': {}}, settings={'label': name}) for name in methods}
    plain = {'seeds': (0, 1, 2, 3, 4), 'baseline': methods[0], 'metric': 'score', 'question': 'Which is best?'}
    return Study(Base(), made, grid={'rate': tuple(rates)}, **{**plain, **changes})


def write(
    root: pathlib.Path,
    made: Study,
    scores: Scores,
    *,
    outcome: Callable[[Cell, Mapping[str, float]], Outcome | None] | None = None,
    order: Callable[[list[Cell]], list[Cell]] = list,
) -> pathlib.Path:
    """Writes the study into `root`; a cell whose outcome is None has not ended."""
    cells = design.expand(made)
    records.claim(root, made, cells)
    for cell in order(cells):
        found = (outcome or finished)(cell, scores(cell))
        if found is not None:
            records.write(root, cell, found, VERSIONS)
    return root


def noise(*of) -> np.random.Generator:
    """The same for the same words, in every process."""
    return np.random.default_rng(zlib.crc32(repr(of).encode()))


def finished(cell: Cell, scores: Mapping[str, float]) -> Outcome:
    """A cell whose metric goes from 0 to `scores`, with all that language models and samples tell besides."""
    random = noise(cell.id)
    lines = [
        {'step': step, 'loss': 0.7 - 0.01 * step + 0.01 * random.random(), 'grad_norm': 1 + random.random()}
        for step in range(1, STEPS[-1] + 1)
    ]
    pairs = {split: pair_numbers(cell, split) for split in scores}
    for step in STEPS:
        part = step / STEPS[-1]
        for split, score in scores.items():
            told = measures.metrics_of(pairs[split]) if step else {}
            samples = {'reward': part * score, 'kl': 10 * part * cell.config.rate, 'completion_tokens': 20 + step}
            lines.append({'step': step, 'split': split, **told, **samples, 'score': part * score})
    return Outcome('finished', lines, pairs, Compute(2.5, STEPS[-1], 1000, 2, 1))


def ended(state: str) -> Callable[[Cell], Outcome]:
    """A cell that did not finish, whose lines up to then are not to be believed."""
    return lambda cell: Outcome(
        state, [{'step': 5, 'split': 'report', 'score': 1e9}], {}, Compute(1.0, 5, 500, 1, 1), f'{state} at step 5'
    )


def pair_numbers(cell: Cell, split: str) -> PairNumbers:
    """Held-out pairs whose prompts and lengths are the same for all cells."""
    shared, random = noise(split), noise(cell.id, split)
    chosen_tokens, rejected_tokens = shared.integers(3, 9, PAIRS), shared.integers(3, 9, PAIRS)
    start = -2.0 * chosen_tokens, -2.0 * rejected_tokens
    changes = random.normal(-0.5, 1.0, PAIRS), random.normal(-1.0, 1.0, PAIRS)
    return PairNumbers(
        pair=np.arange(PAIRS) + 100,
        prompt=np.arange(PAIRS) % PROMPTS,
        chosen_reward=0.1 * changes[0],
        rejected_reward=0.1 * changes[1],
        chosen_logps=start[0] + changes[0],
        rejected_logps=start[1] + changes[1],
        chosen_start_logps=start[0],
        rejected_start_logps=start[1],
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        loss=np.full(PAIRS, 0.69),
    )
