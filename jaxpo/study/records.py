"""A study's directory: what was planned, what each cell found, and which cells are done.

    study.json                 the design, written before the first cell, and what it was extended by since
    cells/ID/run.json          method, setting, seed, resolved config; compute and versions
    cells/ID/metrics.jsonl     training lines, and evaluation lines: those with a `split`
    cells/ID/pairs.jsonl       numbers by pair of the last evaluation, a line a split
    cells/ID/tensorboard/      the same for TensorBoard, its HParams view included
    done/ID.finished, ID.diverged or ID.error      written last: one listing says how far the study is

A cell's files are written whole, once it has ended; what it finds is a function of its config alone, so two workers
that run the same cell write the same.
"""

import dataclasses
import functools
import json
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxpo import storage
from jaxpo.errors import InputError
from jaxpo.metrics import flatten, tensorboard_writer
from jaxpo.study.design import Cell, Study, settings_of
from jaxpo.study.measures import PairNumbers

FINISHED, DIVERGED, ERROR = STATES = ('finished', 'diverged', 'error')
_PART = '.part-'  # in front of the names of files that are being written
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Compute:
    """What a cell took."""

    seconds: float  # of its program, divided by the cells that it trained at once; compilation and evaluation included
    steps: int
    tokens: int  # of training rows, padding left out
    devices: int
    cells_at_once: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a cell."""

    state: str  # of STATES
    lines: list[Line]  # of metrics.jsonl: training lines, and evaluation lines with `step`, `split` and metrics
    pairs: dict[str, PairNumbers]  # split -> numbers after the last step; empty where there are no pairs
    compute: Compute
    error: str = ''  # why it did not finish


@dataclasses.dataclass(frozen=True)
class Record:
    """A cell of a study's directory as it was written."""

    id: str
    method: str
    setting: dict[str, Any]
    repeat: int
    seed: int
    config: dict[str, Any]
    state: str
    error: str
    compute: Compute
    versions: dict[str, Any]
    directory: storage.Path

    @functools.cached_property
    def lines(self) -> list[Line]:
        return _read_lines(self.directory / 'metrics.jsonl')

    @functools.cached_property
    def pairs(self) -> dict[str, dict[str, list[float]]]:
        """Split -> field of PairNumbers -> list."""
        return {line.pop('split'): line for line in _read_lines(self.directory / 'pairs.jsonl')}


def design_of(study: Study, cells: Sequence[Cell]) -> dict[str, Any]:
    """What is said before anything is run, as JSON."""
    methods = {
        name: {**dataclasses.asdict(method), 'trials': settings_of(study, name)}
        for name, method in study.methods.items()
    }
    plain = {
        field.name: getattr(study, field.name)
        for field in dataclasses.fields(study)
        if field.name not in ('base', 'methods', 'cells_per_program', 'lanes')
    }
    base = dataclasses.asdict(study.base)
    listed = [
        {'id': cell.id, 'method': cell.method, 'setting': cell.setting, 'repeat': cell.repeat, 'seed': cell.seed}
        for cell in cells
    ]
    return json.loads(json.dumps({**plain, 'base': base, 'methods': methods, 'cells': listed}))


def check(root: storage.Path, study: Study, cells: Sequence[Cell]) -> None:
    """InputError where the directory holds something else, or a study that this one does more than add cells to.

    A design is not changed once cells have run: its cells stay, and so do its rules.
    """
    # Listed before the design is looked for: another worker may be writing it just now.
    there = any(not path.name.startswith(_PART) for path in root.iterdir()) if root.exists() else False
    old = _held(root)
    if old is None:
        if there:
            raise InputError(f'output: {root} is not empty and holds no study. Name a new directory.')
        return
    old, new = old['design'], design_of(study, cells)
    lost = {cell['id'] for cell in old['cells']} - {cell['id'] for cell in new['cells']}
    rules = ('baseline', 'metric', 'higher_is_better', 'selection_share', 'confidence')
    changed = [name for name in rules if old[name] != new[name]]
    if lost or changed:
        what = [f'{len(lost)} of its cells are not in the new one'] if lost else []
        what += [f'{name} was {old[name]!r} and is {new[name]!r}' for name in changed]
        raise InputError(
            f'output: {root} holds a study of another design: {"; ".join(what)}. A design may be added to, not '
            'changed: name a new directory.'
        )


def claim(root: storage.Path, study: Study, cells: Sequence[Cell]) -> None:
    """Writes the design into a new directory, or what is added to the one that stands there. InputError as `check`.

    What was added, and after how many cells had ended, stands in study.json for the report to say.
    """
    check(root, study, cells)
    held, new = _held(root), design_of(study, cells)
    if held is None:
        _write(root / 'study.json', _pretty({'design': new, 'extensions': []}))
    elif held['design'] != new:
        before = {cell['id'] for cell in held['design']['cells']}
        added = [cell['id'] for cell in new['cells'] if cell['id'] not in before]
        extension = {'cells_added': added, 'cells_done_before': len(states(root))}
        extensions = [*held['extensions'], extension] if added else held['extensions']
        _write(root / 'study.json', _pretty({'design': new, 'extensions': extensions}))


def _held(root: storage.Path) -> dict[str, Any] | None:
    file = root / 'study.json'
    return json.loads(file.read_text(encoding='utf-8')) if file.exists() else None


def states(root: storage.Path) -> dict[str, str]:
    """Cell -> its state, of all that have ended."""
    directory = root / 'done'
    if not directory.exists():
        return {}
    names = sorted(path.name for path in directory.iterdir())
    return dict(name.rsplit('.', 1) for name in names if name.rsplit('.', 1)[-1] in STATES)


def write(root: storage.Path, cell: Cell, outcome: Outcome, versions: Mapping[str, Any]) -> None:
    """Writes what came of a cell, and last that it has ended."""
    directory = root / 'cells' / cell.id
    run = {
        'id': cell.id,
        'method': cell.method,
        'setting': cell.setting,
        'repeat': cell.repeat,
        'seed': cell.seed,
        'state': outcome.state,
        'error': outcome.error,
        'compute': dataclasses.asdict(outcome.compute),
        'versions': dict(versions),
        'config': dataclasses.asdict(cell.config),
    }
    _write(directory / 'run.json', _pretty(run))
    _write(directory / 'metrics.jsonl', _jsonl(outcome.lines))
    _write(directory / 'pairs.jsonl', _jsonl(_pair_lines(outcome.pairs)))
    _write_tensorboard(directory / 'tensorboard', cell, outcome)
    for state in STATES:
        (root / 'done' / f'{cell.id}.{state}').unlink(missing_ok=True)
    storage.write_text(root / 'done' / f'{cell.id}.{outcome.state}', '')


def _write(file: storage.Path, text: str) -> None:
    """Writes a file that others may be reading: it is there whole, as it was or as it is. So is an object always."""
    if storage.is_remote(file):
        storage.write_text(file, text)
        return
    part = file.with_name(f'{_PART}{uuid.uuid4().hex}')
    storage.write_text(part, text)
    part.replace(file)


def _pair_lines(pairs: Mapping[str, PairNumbers]) -> Iterable[Line]:
    for split, numbers in pairs.items():
        yield {'split': split, **{name: values.tolist() for name, values in vars(numbers).items()}}


def _write_tensorboard(directory: storage.Path, cell: Cell, outcome: Outcome) -> None:
    """Scalars by step, and the cell's settings beside its last evaluation in the HParams view."""
    last: dict[str, float] = {}
    for old in [*directory.glob('events*'), *directory.glob('*/events*')]:
        old.unlink()  # of an attempt that failed or was killed: all would be shown twice
    with storage.grown_locally(directory) as (local, _), tensorboard_writer(local) as tensorboard:
        for line in outcome.lines:
            prefix = f'{line["split"]}/' if 'split' in line else ''
            values = {f'{prefix}{k}': v for k, v in line.items() if k not in ('step', 'split') and math.isfinite(v)}
            last |= values if prefix else {}
            for name, value in values.items():
                tensorboard.add_scalar(name, value, line['step'])
        setting = {'method': cell.method, 'seed': cell.seed, 'state': outcome.state, **flatten(cell.setting)}
        tensorboard.add_hparams(setting, last, name='hparams')


def read_design(root: storage.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A study's design and its extensions. InputError where the directory holds none."""
    held = _held(root)
    if held is None:
        raise InputError(f'{root} holds no study: there is no study.json. `jaxpo study EXPERIMENT` makes one.')
    return held['design'], held['extensions']


def read(root: storage.Path) -> list[Record]:
    """All cells that have ended, in the order of the design."""
    design, _ = read_design(root)
    ended = states(root)
    return [_record(root, cell['id']) for cell in design['cells'] if cell['id'] in ended]


def _record(root: storage.Path, identity: str) -> Record:
    directory = root / 'cells' / identity
    held = json.loads((directory / 'run.json').read_text(encoding='utf-8'))
    return Record(**{**held, 'compute': Compute(**held['compute']), 'directory': directory})


def _read_lines(file: storage.Path) -> list[Line]:
    return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()] if file.exists() else []


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + '\n'


def _jsonl(lines: Iterable[Line]) -> str:
    return ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
