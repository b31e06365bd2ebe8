"""A cell of a language model in training: what is its own, and what was found of it so far."""

import dataclasses
from typing import Any

import numpy as np

from jaxpo import objective as objectives
from jaxpo.data.rows import lengths_of, row_tokens
from jaxpo.experiment import Experiment
from jaxpo.objective import Objective
from jaxpo.run import Schedule
from jaxpo.state import learning_rates
from jaxpo.study import union
from jaxpo.study.bundles import Bundle
from jaxpo.study.design import Cell
from jaxpo.study.measures import PairNumbers
from jaxpo.study.records import DIVERGED, FINISHED, Compute, Line, Outcome
from jaxpo.study.workshop import Shop, Workshop


class Trainee:
    """One cell, from its first step to its outcome."""

    def __init__(self, workshop: Workshop, shop: Shop, bundle: Bundle, cell: Cell):
        self.cell = cell
        self.objective: Objective = objectives.make(cell.config.objective, tuple(cell.config.references))
        experiment = Experiment(workshop.path, cell.config, workshop.reward)
        # Where others' losses stand beside its own, numbers say which are in use.
        numbers = union.traced(bundle.whole, self.objective) if bundle.mixed else self.objective.hyperparameters
        whole = dataclasses.replace(shop.run.objective, hyperparameters=numbers)
        self.run = dataclasses.replace(shop.run, experiment=experiment, objective=whole)
        self.schedule = Schedule(cell.config.train, len(shop.pairs.train))
        self._rates = learning_rates(cell.config.optimizer, self.schedule.steps)
        self._row_tokens = row_tokens(lengths_of(shop.pairs.train), cell.config.rows.layout)
        self._others = _metrics_of(whole) - _metrics_of(self.objective)
        self.lines: list[Line] = []
        self.numbers: dict[str, PairNumbers] = {}
        self.starts: dict[str, PairNumbers] = {}
        self.tokens, self.error = 0, ''

    def settings(self, number: int) -> dict[str, Any]:
        """What is traced of step `number`, from 0."""
        return self.run.traced | self._rates(number)

    def read(self, number: int, metrics: dict[str, float], log: bool) -> None:
        """Takes in the metrics of step `number`, from 1. After a step that is not finite a cell takes in no more."""
        if self.error:
            return
        self.tokens += int(self._row_tokens[self.schedule.pairs_of(number - 1)].sum())
        if not metrics.pop('finite'):
            what = ', '.join(name for name in ('loss', 'grad_norm') if not np.isfinite(metrics[name]))
            self.error = f'step {number}: {what or "its running state"} is not finite'
        kept = {name: value for name, value in metrics.items() if name not in self._others}
        if self.error:
            kept = {name: value for name, value in kept.items() if np.isfinite(value)}  # JSON has no NaN
        if log or self.error:
            self.lines.append({'step': number, **kept, 'num_tokens': self.tokens})

    def evaluated(self, number: int, split: str, metrics: dict[str, float]) -> None:
        if not self.error:
            self.lines.append({'step': number, 'split': split, **metrics})

    def so_far(self) -> dict[str, Any]:
        """What was found of it until now, as JSON has it."""
        starts = {split: {k: v.tolist() for k, v in vars(numbers).items()} for split, numbers in self.starts.items()}
        return {'lines': self.lines, 'starts': starts, 'tokens': self.tokens, 'error': self.error}

    def go_on(self, held: dict[str, Any]) -> None:
        """Takes over what `so_far` gave."""
        self.lines, self.tokens, self.error = held['lines'], held['tokens'], held['error']
        arrays = {split: {k: np.array(v) for k, v in numbers.items()} for split, numbers in held['starts'].items()}
        self.starts = {split: PairNumbers(**numbers) for split, numbers in arrays.items()}

    def outcome(self, compute: Compute) -> Outcome:
        state = DIVERGED if self.error else FINISHED
        return Outcome(state, self.lines, {} if self.error else self.numbers, compute, self.error)


def _metrics_of(objective: Objective) -> set[str]:
    """Metrics of a step that are there, or not, by what the objective is made of."""
    terms, trained = objective.terms, ('method_grad_norm', 'method_learning_rate')
    losses = {f'loss/{term.loss.name}' for term in terms} if len(terms) > 1 else set()
    return losses | ({*trained} if any(term.loss.init_params for term in terms) else set())
