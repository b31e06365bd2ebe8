"""A study as data: methods x settings x seeds, expanded to cells, each a resolved config named by its hash.

    Study(
        base=Config(output='runs/study', ...),
        methods={
            'dpo': Method({'dpo': {}}, grid={'objective.dpo.beta': (0.05, 0.1)}),
            'ipo': Method({'ipo': {}}, grid={'objective.ipo.tau': (0.05, 0.1)}),
        },
        grid={'optimizer.learning_rate': (1e-5, 3e-5)},
        seeds=(0, 1, 2, 3, 4),
    )

Every method is tried at the same number of settings. The baseline is tried twice, with other seeds the second time: a
comparison of a method with itself (A/A), which should find nothing.
"""

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpo import experiment, losses, objective
from jaxpo.config import Scalar
from jaxpo.errors import InputError, unknown
from jaxpo.study import statistics

AGAIN = '(A/A)'
SEED = 'train.seed'


@dataclasses.dataclass(frozen=True)
class Method:
    """One method on trial."""

    objective: dict[str, dict[str, Scalar]]
    """As `Config.objective`."""
    grid: dict[str, tuple[Scalar, ...]] = dataclasses.field(default_factory=dict)
    """Its own part of the grid: fields of the config by dotted name (`objective.dpo.beta`), with the values tried."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the config, by dotted name, that are otherwise for this method than in the base."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared, how, and by which rule, said before anything is run."""

    base: Any
    """What all cells share: a `Config`, whose `output` is the study's directory and whose objective is not read; or,
    where the experiment trains in a way of its own, any frozen dataclass with `output`, `objective` and `train.seed`
    (`run_cells` in the experiment's module)."""
    methods: dict[str, Method]
    grid: dict[str, tuple[Scalar, ...]] = dataclasses.field(default_factory=dict)
    """The part of the grid that all methods share, as `Method.grid`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Equal seeds make a pair: the same data order and the same evaluation prompts for every method."""
    baseline: str = 'dpo'
    """The method that all others are compared with."""
    metric: str = 'rewards/accuracies'
    """What is compared, of `jaxpo.study.measures` or of the experiment's own evaluation lines, after the last step."""
    higher_is_better: bool = True
    selection_share: float = 0.5
    """Share of held-out prompts on which settings are chosen; methods are compared on the others."""
    confidence: float = 0.95
    """Of intervals; claims hold at this family-wise level."""
    cells_per_program: int = 1
    """Most cells trained at once, in one program over the mesh axis `cell`; 1 trains them one after the other."""
    lanes: int | None = None
    """How many of a device's cells are computed at once (`vmap`), the others of it in turn. None: 1 on a CPU, whose
    batched matrix products are slower than one after the other, and all of them elsewhere."""
    question: str = ''
    """What the study asks, in a sentence or two: printed in its report."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run of a study."""

    id: str
    """12 hexadecimal digits of the hash of what decides its results."""
    method: str
    setting: dict[str, Scalar]
    """The grid's fields and the values they have here."""
    repeat: int
    """Place of its seed: cells with equal repeats make a pair."""
    seed: int
    config: Any
    """The resolved config. Its `output` is the cell's directory."""


def settings_of(study: Study, method: str) -> list[dict[str, Scalar]]:
    """All settings of a method, in the order of its grid."""
    grid = {**study.methods[method].grid, **study.grid}
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def again(study: Study) -> str:
    """The name of the baseline's second arm."""
    return f'{study.baseline} {AGAIN}'


def expand(study: Study) -> list[Cell]:
    """All cells: every method and setting with every seed, and the baseline once more with other seeds.

    Raises:
      InputError: no methods or seeds, an unknown baseline or field, unequal budgets, or two cells that are the same.
    """
    check(study)
    beyond = max(study.seeds) - min(study.seeds) + 1
    arms = [(name, name, study.seeds) for name in study.methods]
    arms.append((again(study), study.baseline, tuple(seed + beyond for seed in study.seeds)))
    cells = [
        _cell(study, name, study.methods[method], setting, repeat, seed)
        for name, method, seeds in arms
        for setting in settings_of(study, method)
        for repeat, seed in enumerate(seeds)
    ]
    first: dict[str, Cell] = {}
    for cell in cells:
        if cell.id in first:
            other = first[cell.id]
            raise InputError(
                f'study: {other.method} {other.setting} and {cell.method} {cell.setting} are the same run (seed '
                f'{cell.seed}). Give each method settings of its own.'
            )
        first[cell.id] = cell
    return cells


def _cell(study: Study, name: str, method: Method, setting: Mapping[str, Scalar], repeat: int, seed: int) -> Cell:
    config = study.base
    for field, value in method.settings.items():
        config = replaced(config, field, value)
    references = tuple(getattr(config, 'references', ('reference',)))
    config = dataclasses.replace(config, objective=objective.spelled_out(method.objective, references))
    for field, value in {**setting, SEED: seed}.items():
        config = replaced(config, field, value)
    _check_numbers(config.objective)
    identity = identity_of(config)
    return Cell(
        identity,
        name,
        dict(setting),
        repeat,
        seed,
        dataclasses.replace(config, output=f'{study.base.output.rstrip("/")}/cells/{identity}'),
    )


def _check_numbers(spec: Mapping[str, Mapping[str, Scalar]]) -> None:
    """InputError for a hyperparameter that a loss does not have, or a value that it cannot take."""
    for name, given in spec.items():
        if name != objective.MIXTURE:
            losses.find(name).check({key: value for key, value in given.items() if key != 'weight'})


def identity_of(config: Any) -> str:
    """The name of a cell with this config: of what decides its results, not where or on which devices it runs."""
    decides = experiment.computed(dataclasses.asdict(config))
    decides = {name: value for name, value in decides.items() if name != 'tables'} | {'sample': _sample_of(config)}
    text = json.dumps(decides, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _sample_of(config: Any) -> dict[str, Any] | None:
    """How a cell's evaluation samples."""
    sample = getattr(config, 'sample', None)
    return None if sample is None else dataclasses.asdict(sample)


def replaced(config: Any, field: str, value: Any) -> Any:
    """The config with the field of this dotted name changed. InputError where there is none, or of another kind."""
    return _replaced(config, field.split('.'), value, field)


def _replaced(node: Any, names: Sequence[str], value: Any, field: str) -> Any:
    name, rest = names[0], names[1:]
    if isinstance(node, Mapping):
        # An objective is spelled out: it has all the words that there are.
        if name not in node and (rest or field.startswith('objective.')):
            raise unknown(f'entry of {field}', name, node)
        return {**node, name: _replaced(node[name], rest, value, field) if rest else value}
    if not dataclasses.is_dataclass(node):
        raise InputError(f'study: {field} goes deeper than the config does.')
    names_there = [known.name for known in dataclasses.fields(node)]
    if name not in names_there:
        raise unknown(f'field of {field}', name, names_there)
    held = getattr(node, name)
    if not rest and isinstance(held, float | int) and not isinstance(value, float | int):
        raise InputError(f'study: {field} is a number, not {value!r}.')
    return dataclasses.replace(node, **{name: _replaced(held, rest, value, field) if rest else value})


def check(study: Study) -> None:
    """InputError for a study that cannot be compared."""
    if not study.methods:
        raise InputError('study: names no methods.')
    if study.baseline not in study.methods:
        raise unknown('baseline', study.baseline, study.methods)
    _check_seeds(study.seeds)
    if not 0 < study.selection_share < 1:
        raise InputError(f'study: selection_share must be between 0 and 1, not {study.selection_share!r}.')
    statistics.check_confidence(study.confidence)
    for name, value in (('cells_per_program', study.cells_per_program), ('lanes', study.lanes)):
        if value is not None and not (isinstance(value, int) and value > 0):
            raise InputError(f'study: {name} must be a whole number above 0, not {value!r}.')
    for name, method in study.methods.items():
        for field in {*method.grid} & {*study.grid}:
            raise InputError(f'study: {field} is in the grid of {name} and in that of all methods: drop one of them.')
        for field, values in {**method.grid, **study.grid}.items():
            _check_values(field, values)
        _check_fixed(name, method)
    budgets = {name: len(settings_of(study, name)) for name in study.methods}
    if len({*budgets.values()}) > 1:
        counts = ', '.join(f'{name} {count}' for name, count in budgets.items())
        raise InputError(f'study: every method gets the same number of settings; here they have {counts}.')
    for name in study.methods:
        if name.endswith(AGAIN):
            raise InputError(f'study: {name!r}: names that end in {AGAIN} are for the second arm of the baseline.')


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds or len({*seeds}) < len(seeds) or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise InputError(f'study: seeds must be whole numbers, 0 or more, each once, not {seeds!r}.')


def _check_fixed(name: str, method: Method) -> None:
    """InputError for settings that would have no effect."""
    for field in method.settings:
        if field == SEED:
            raise InputError(f'study: {SEED} is set by `seeds`, not by the settings of {name}.')
        if field.split('.')[0] in ('objective', 'output'):
            raise InputError(f'study: {field} has no effect in the settings of {name}.')
        if field in method.grid:
            raise InputError(f'study: {field} is in the grid of {name} and in its settings: drop one of them.')


def _check_values(field: str, values: Sequence[Scalar]) -> None:
    if field == SEED:
        raise InputError(f'study: {SEED} is set by `seeds`, not by the grid.')
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise InputError(f'study: the grid of {field} must be a tuple of values, not {values!r}.')
    if any(value in values[:place] for place, value in enumerate(values)):
        raise InputError(f'study: the grid of {field} has a value twice: {values!r}.')
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f'study: the grid of {field} has {value!r}.')
