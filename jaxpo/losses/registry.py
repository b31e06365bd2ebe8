"""The one place where a method is registered: a decorator that demands the citation and states what is true of it."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxpo.errors import InputError, unknown

LOSSES: dict[str, 'Loss'] = {}


@dataclasses.dataclass(frozen=True)
class Loss:
    """A registered loss and what is true of it."""

    function: Callable
    """`(chosen: Completion, rejected: Completion, **hyperparameters) -> (losses [B], Rewards)`."""
    source: str
    """Paper, arXiv number and equation."""
    reads_reference: bool
    normaliser: Literal['pairs', 'tokens']
    """What the sum of losses is divided by: the batch's pairs, or its chosen tokens."""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.function).splitlines()[0]

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters and their defaults. Floats are traced; words are structural choices, fixed at compilation."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def check(self, hyperparameters: Mapping[str, Any]) -> None:
        """Raises InputError for a hyperparameter the loss does not have, or a value it cannot take."""
        hints = typing.get_type_hints(self.function)
        for name, value in hyperparameters.items():
            if name not in self.defaults:
                raise unknown(f'hyperparameter of {self.name}', name, self.defaults)
            choices = typing.get_args(hints.get(name))
            if choices and value not in choices:
                raise unknown(f'{self.name}.{name}', str(value), choices)
            if not choices:
                check_number(f'{self.name}.{name}', value)


def check_number(name: str, value: Any) -> None:
    """InputError where `value` is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f'objective.{name} is a finite number, not {value!r}.')


def loss(source: str, *, reads_reference: bool = True, normaliser: Literal['pairs', 'tokens'] = 'pairs'):
    """Registers a loss under its function's name.

    Args:
      source: paper, arXiv number and equation.
      reads_reference: whether it reads `reference_logps`. Tests check it.
      normaliser: what a batch's sum of losses is divided by.
    """

    def register(function):
        name = function.__name__
        if name in LOSSES and inspect.getsourcefile(LOSSES[name].function) != inspect.getsourcefile(function):
            raise InputError(f'The loss {name!r} is registered already, with source {LOSSES[name].source!r}.')
        if not inspect.getdoc(function):
            raise InputError(
                f'The loss {name!r} needs a docstring: its first line is shown wherever losses are listed.'
            )
        LOSSES[name] = Loss(function, source, reads_reference, normaliser)
        return function

    return register


def find(name: str) -> Loss:
    """The loss of this name; InputError names the nearest."""
    if name not in LOSSES:
        raise unknown('loss', name, LOSSES)
    return LOSSES[name]
