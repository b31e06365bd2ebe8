"""What a study's directory says of every planned cell, sorted by arm and setting, for the report to read."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from jaxpo import storage
from jaxpo.errors import unknown
from jaxpo.study import records
from jaxpo.study.design import AGAIN
from jaxpo.study.findings import Spread
from jaxpo.study.measures import PairNumbers

SELECTION, REPORT, TRAIN = 'selection', 'report', 'train'
MISSING = 'missing'


@dataclasses.dataclass(frozen=True)
class Found:
    """A planned cell, and what is known of it."""

    id: str
    method: str
    setting: dict[str, Any]
    repeat: int
    seed: int
    record: records.Record | None

    @property
    def words(self) -> str:
        """The setting, for people."""
        return words_of(self.setting)

    @property
    def state(self) -> str:
        """Of `records.STATES`, or missing."""
        return MISSING if self.record is None else self.record.state

    @property
    def finished(self) -> bool:
        return self.state == records.FINISHED

    @functools.cached_property
    def evaluations(self) -> dict[str, dict[int, records.Line]]:
        """Split -> step, rising -> metrics. Of a cell that did not finish: none, it counts as failed."""
        found: dict[str, dict[int, records.Line]] = {}
        for line in self.record.lines if self.finished else []:
            if 'split' in line:
                found.setdefault(line['split'], {}).setdefault(line['step'], {}).update(line)
        return {split: dict(sorted(steps.items())) for split, steps in found.items()}

    @functools.cached_property
    def training(self) -> list[records.Line]:
        """Training lines of a finished cell, by step."""
        lines = self.record.lines if self.finished else []
        return sorted((line for line in lines if 'split' not in line), key=lambda line: line['step'])

    def last(self, name: str, split: str = REPORT) -> float | None:
        """A metric after the last step that the split was evaluated at; None where it is not there or not finite."""
        steps = self.evaluations.get(split)
        return finite(steps[max(steps)].get(name)) if steps else None

    def first(self, name: str, split: str = REPORT) -> float | None:
        """A metric before training, as `last` has it after."""
        return finite(self.evaluations.get(split, {}).get(0, {}).get(name))

    @functools.cached_property
    def pairs(self) -> PairNumbers | None:
        """Numbers by pair of the report split, by rising pair; None where there are none or not all are finite."""
        held = self.record.pairs.get(REPORT) if self.finished else None
        if not held or not held['pair']:
            return None
        arrays = {field.name: np.asarray(held[field.name]) for field in dataclasses.fields(PairNumbers)}
        if not all(np.isfinite(values.astype(np.float64)).all() for values in arrays.values()):
            return None
        order = np.argsort(arrays['pair'], kind='stable')
        return PairNumbers(**{name: values[order] for name, values in arrays.items()})


@dataclasses.dataclass(frozen=True)
class Trial:
    """One arm at one setting: a cell a repeat, in their order."""

    arm: str
    setting: dict[str, Any]
    cells: tuple[Found, ...]

    @property
    def words(self) -> str:
        return words_of(self.setting)

    @property
    def failed(self) -> int:
        """Cells that have ended without finishing, or are not there."""
        return sum(not cell.finished for cell in self.cells)


@dataclasses.dataclass(frozen=True)
class Arm:
    """A method, or the baseline's second arm, at all of its settings, in the order of its grid."""

    name: str
    trials: tuple[Trial, ...]

    @property
    def cells(self) -> tuple[Found, ...]:
        return tuple(cell for trial in self.trials for cell in trial.cells)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A whole study."""

    root: storage.Path
    design: dict[str, Any]
    extensions: list[dict[str, Any]]
    methods: tuple[Arm, ...]  # in the order of the design
    second: Arm  # the baseline again: A/A

    @property
    def arms(self) -> tuple[Arm, ...]:
        """All arms, the A/A arm last."""
        return (*self.methods, self.second)

    @property
    def baseline(self) -> Arm:
        return next(arm for arm in self.methods if arm.name == self.design['baseline'])

    @property
    def cells(self) -> tuple[Found, ...]:
        return tuple(cell for arm in self.arms for cell in arm.cells)

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return 1 if self.design['higher_is_better'] else -1

    def metric(self, cell: Found, split: str = REPORT) -> float | None:
        """The study's metric of a finished cell, after its last step."""
        return cell.last(self.design['metric'], split)

    def values(self, trial: Trial, split: str = REPORT) -> list[float | None]:
        """The metric by repeat."""
        return [self.metric(cell, split) for cell in trial.cells]


def same_pairs(cells: Sequence[Found]) -> bool:
    """Whether all of these cells, which have numbers by pair, were evaluated on the same pairs of the same prompts."""
    pairs = [(cell.pairs.pair, cell.pairs.prompt) for cell in cells]
    return all(np.array_equal(one, other) for both in pairs for one, other in zip(both, pairs[0]))


def gather(root: storage.Path) -> Evidence:
    """Reads a study's directory, finished or not.

    Raises:
      InputError: no study there, or cells have finished and none has the study's metric on both splits.
    """
    design, extensions = records.read_design(root)
    ended = {record.id: record for record in records.read(root)}
    trials: dict[str, dict[str, list[Found]]] = {name: {} for name in [*design['methods'], _second(design)]}
    for cell in design['cells']:
        found = Found(**cell, record=ended.get(cell['id']))
        trials[found.method].setdefault(json.dumps(found.setting), []).append(found)
    arms = [
        Arm(name, tuple(_trial(name, cells) for cells in by_setting.values())) for name, by_setting in trials.items()
    ]
    evidence = Evidence(root, design, extensions, tuple(arms[:-1]), arms[-1])
    for split in (SELECTION, REPORT):
        _check_metric(evidence, split)
    return evidence


def _second(design: dict[str, Any]) -> str:
    return f'{design["baseline"]} {AGAIN}'


def _trial(arm: str, cells: Sequence[Found]) -> Trial:
    return Trial(arm, cells[0].setting, tuple(sorted(cells, key=lambda cell: cell.repeat)))


def _check_metric(evidence: Evidence, split: str) -> None:
    finished = [cell for cell in evidence.cells if cell.finished]
    known = {name for cell in finished for line in cell.evaluations.get(split, {}).values() for name in line}
    if finished and evidence.design['metric'] not in known:
        raise unknown(f'metric on split {split!r}', evidence.design['metric'], known - {'step', 'split'})


def words_of(setting: dict[str, Any]) -> str:
    """A setting in words: the last part of each field's name, or all of it where that says too little."""
    short = [field.rsplit('.', 1)[-1] for field in setting]
    names = short if len({*short}) == len(short) else list(setting)
    return ', '.join(f'{name} {value}' for name, value in zip(names, setting.values())) or 'as given'


def finite(value: Any) -> float | None:
    """The number, or None where it is none."""
    # Zero is added for minus zero, which would be printed as such.
    return float(value) + 0.0 if isinstance(value, int | float) and math.isfinite(value) else None


def there(values: Iterable[float | None]) -> list[float]:
    """Those that are numbers."""
    return [value for value in values if value is not None]


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are numbers; None where there are none."""
    numbers = there(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def spread(values: Iterable[float | None]) -> Spread | None:
    """Of one number a seed; None where there are none."""
    numbers = there(values)
    return Spread(mean(numbers), min(numbers), max(numbers), len(numbers)) if numbers else None
