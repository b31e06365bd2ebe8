"""Trains the cells of a study in the exact world: all cells that share a method's words in one program."""

import dataclasses
import functools
import json
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxpo import objective as objectives
from jaxpo.config import Scalar
from jaxpo.data.sampler import pair_indices
from jaxpo.errors import InputError, Interrupted, unknown
from jaxpo.experiment import import_module
from jaxpo.study.design import Cell
from jaxpo.study.measures import PairNumbers, metrics_of
from jaxpo.study.records import DIVERGED, ERROR, FINISHED, Compute, Line, Outcome

environment, program = (
    import_module(str(pathlib.Path(__file__).parent / f'{name}.py')) for name in ('environment', 'program')
)
Environment, REFERENCES = environment.Environment, environment.REFERENCES
SIDES = ('chosen', 'rejected')


@dataclasses.dataclass(frozen=True)
class Train:
    pairs: int = 64
    """Training pairs, drawn anew for each seed."""
    batch_pairs: int = 32
    """Pairs of a step."""
    steps: int = 400
    """Steps of Adam."""
    evaluate_every: int = 40
    """Steps between evaluations, which divides `steps`."""
    log_every: int = 10
    """Steps between training lines."""
    held_out_pairs: int = 128
    """Pairs of each split, drawn as the training pairs are."""
    samples: int = 64
    """Completions of each prompt that the selection split samples of the policy."""
    seed: int = 0
    """Of the data, their order, and samples."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """One run."""

    output: str
    environment: Environment = dataclasses.field(default_factory=Environment)
    objective: dict[str, dict[str, Scalar]] = dataclasses.field(default_factory=dict)
    references: tuple[str, ...] = REFERENCES[:1]
    """Of `environment.REFERENCES`: what the policy is measured against. It starts as the first."""
    beta: float = 0.1
    """Price of a nat of KL, in units of reward, of the policy that `optimum_kl` is measured from."""
    learning_rate: float = 0.03
    """Of Adam, constant."""
    train: Train = dataclasses.field(default_factory=Train)


def run_cells(cells: Sequence[Cell]) -> Iterator[tuple[Cell, Outcome]]:
    """Trains all cells and says what came of each. A program that fails is an outcome of its cells, not the end.

    InputError, before anything is trained, for a cell that cannot be.
    """
    groups = _groups(cells)
    for together in groups:
        check(together[0].config)
    for together in groups:
        try:
            outcomes = _run(together)
        except Interrupted:
            raise
        except Exception as error:  # of whatever kind: the other methods are to be seen too
            message = f'{type(error).__name__}: {error}'.replace('\n', ' ')
            outcomes = [Outcome(ERROR, [], {}, Compute(0.0, 0, 0, 1, len(together)), message)] * len(together)
        yield from zip(together, outcomes)


def _groups(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that one program can train: equal but for numbers of the objective, learning rate and seed."""
    found: dict[Any, list[Cell]] = {}
    for cell in cells:
        config = cell.config
        train = dataclasses.replace(config.train, seed=0)
        same = dataclasses.replace(config, output='', objective={}, learning_rate=0.0, train=train)
        key = (objectives.make(config.objective, config.references), json.dumps(dataclasses.asdict(same)))
        found.setdefault(key, []).append(cell)
    return list(found.values())


def _run(cells: Sequence[Cell]) -> list[Outcome]:
    start, config = time.monotonic(), cells[0].config
    world = environment.make_world(config.environment)
    objective = objectives.make(config.objective, config.references)
    train = dataclasses.replace(config.train, seed=0)
    with jax.enable_x64(True):
        lanes = jax.tree.map(lambda *leaves: np.stack(leaves), *[_lane(cell) for cell in cells])
        trained = program.train_lanes(objective, train, world, lanes)
        seen = program.measure_lanes(train.samples, world, trained.logits, lanes.seed, config.beta)
        trained, seen = jax.device_get((trained, seen))
    seconds = (time.monotonic() - start) / len(cells)
    found = []
    for place in range(len(cells)):
        one, measured, facts = jax.tree.map(lambda leaf, place=place: leaf[place], (trained, seen, lanes.data.facts))
        compute = Compute(seconds, train.steps, int(one.tokens), 1, len(cells))
        found.append(_outcome(cells[place].config, one, measured, facts, compute))
    return found


def check(config: Exact) -> None:
    """InputError for a config that cannot be trained here."""
    environment.make_world(config.environment)
    objective = objectives.make(config.objective, config.references)
    for term in objective.terms:
        why = excluded(term.loss, dict(term.choices))
        if why:
            raise InputError(f'objective: {term.loss.name} cannot be trained in the exact world: {why}.')
    if objective.mixture is not None and objective.mixture.observes != 'nothing':
        raise InputError(f'objective.mixture.weights {objective.mixture.weights} learn during training; here none do.')
    for name in config.references:
        if name not in REFERENCES:
            raise unknown('reference of the exact world', name, REFERENCES)
    train = config.train
    for field in dataclasses.fields(train):
        if field.name != 'seed' and getattr(train, field.name) < 1:
            raise InputError(f'train.{field.name} is at least 1, not {getattr(train, field.name)}.')
    if train.steps % train.evaluate_every:
        raise InputError(f'train.evaluate_every {train.evaluate_every} does not divide train.steps {train.steps}.')


def excluded(loss, given: dict[str, Scalar]) -> str:
    """Why a registered loss cannot be trained here, with the given words; empty where it can."""
    needs = loss.needs_of(given)
    columns = needs.pair_columns + needs.completion_columns + needs.token_columns
    lacking = {
        'columns of the data': columns,
        'companions of the pair': needs.companions,
        'further models': needs.models,
        'states of a network': tuple(name for name in needs.statistics if name not in environment.STATISTICS),
        'parts of its own that read them': tuple(['hidden states'] if loss.init_params else []),
    }
    return '; '.join(f'it needs {kind} ({", ".join(names)})' for kind, names in lacking.items() if names)


def _lane(cell: Cell) -> program.Lane:
    config, train = cell.config, cell.config.train
    numbers = objectives.make(config.objective, config.references).hyperparameters
    order = _order(train.seed, train.steps, train.batch_pairs, train.pairs)
    data = _data(config.environment, train.pairs, train.held_out_pairs, train.seed)
    numbers = jax.tree.map(np.float64, numbers)
    return program.Lane(numbers, np.float64(config.learning_rate), np.int64(train.seed), order, data)


@functools.lru_cache(maxsize=64)
def _order(seed: int, steps: int, batch: int, count: int) -> np.ndarray:
    return np.stack([pair_indices(seed, step, batch, count, steps * batch) for step in range(steps)])


@functools.lru_cache(maxsize=64)
def _data(world: Environment, count: int, held_out: int, seed: int) -> program.Data:
    return jax.device_get(program.drawn(count, held_out, environment.make_world(world), seed))


def _outcome(config: Exact, one: program.Trained, measured, facts: dict[str, np.ndarray], compute: Compute) -> Outcome:
    """One cell's lines and numbers, up to the first step with anything that is not finite."""
    train = config.train
    finite = np.logical_and.reduce([np.isfinite(values) for values in one.metrics.values()])
    ended = train.steps if finite.all() else int(np.argmin(finite))
    evaluated = range(0, ended + 1, train.evaluate_every)
    lines: list[Line] = []
    for step in range(0, ended, train.log_every):
        metrics = {name: float(values[step]) for name, values in one.metrics.items()}
        lines.append({'step': step + 1, **metrics, 'learning_rate': config.learning_rate})
    numbers = {}
    for place, step in enumerate(evaluated):
        for number, split in enumerate(program.SPLITS):
            numbers[split] = _numbers(*jax.tree.map(lambda x, n=number: x[n], (one.held_out, facts)), place)
            measures = {name: float(_rounded(values[place])) for name, values in measured[split].items()}
            lines.append({'step': step, 'split': split, **metrics_of(numbers[split]), **measures})
    sound = [line for line in lines if all(isinstance(value, str) or math.isfinite(value) for value in line.values())]
    if ended < train.steps or len(sound) < len(lines):
        error = f'loss, gradient or policy not finite by step {min(ended + 1, train.steps)}'
        return Outcome(DIVERGED, sound, {}, compute, error)
    return Outcome(FINISHED, lines, numbers, compute)


def _numbers(of_policies: dict[str, np.ndarray], facts: dict[str, np.ndarray], place: int) -> PairNumbers:
    """Those of one split at one evaluation; the first evaluation is the start's."""
    found = {name: _rounded(values[place]) for name, values in of_policies.items()}
    for side in SIDES:
        logps = of_policies[f'{side}_logps']
        found[f'{side}_start_logps'] = _rounded(logps[0])
        found[f'{side}_logps'] = _rounded(logps[0]) + _rounded(logps[place] - logps[0])
    return PairNumbers(**found, **facts)


def _rounded(values: np.ndarray) -> np.ndarray:
    """To a multiple of 2^-30, of which sums and differences are exact.

    Here many pairs tie: two completions that no training pair tells apart. A last digit would decide for one of them,
    and between two methods that are the same one under two names.
    """
    return np.round(values * 2**30) / 2**30
