"""The one place where a weighting is registered: a decorator that demands the citation and says what is true of it."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxpo.errors import InputError, unknown
from jaxpo.losses.registry import Range, check_number

WEIGHTINGS: dict[str, 'Weighting'] = {}


@dataclasses.dataclass(frozen=True, eq=False)
class Weighting:
    """A registered weighting and what is true of it. Its functions are given those keywords only that they name."""

    weights: Callable
    """`(chosen, rejected, *, state, key, primary, given, **hyperparameters) -> [K, B]`: `primary` is a place among the
    references, `given` the config's numbers `[K]`, `key` a PRNG key or, in evaluation, None."""
    source: str
    """Paper and arXiv number."""
    observes: Literal['nothing', 'validation', 'step', 'reward']
    """What `update` learns from: validation pairs before training, each step's pairs, or a reward for each step."""
    init_state: Callable | None
    """`(references, **words) -> state`, float32 arrays; `references` is how many there are."""
    observe: Callable | None
    """`(chosen, rejected, *, state, primary) -> pytree of [..., B]`: of each pair, to be averaged over those that are
    there."""
    update: Callable | None
    """`(state, means, **hyperparameters) -> state`, means being what `observe` says, without its last axis. That of a
    weighting that observes a reward is `(state, reward, *, key, primary, **hyperparameters)`, `key` as `weights` had
    it."""
    ranges: Mapping[str, Range]

    @property
    def name(self) -> str:
        return self.weights.__name__

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.weights).splitlines()[0]

    @property
    def formula(self) -> str:
        """The docstring's second paragraph."""
        return ' '.join(inspect.getdoc(self.weights).split('\n\n')[1].split())

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters and their defaults."""
        return {**self.words, **_keywords(self.update), **_keywords(self.weights)}

    @property
    def words(self) -> dict[str, Any]:
        """Those of the defaults that are structural, fixed at compilation; the others are traced numbers."""
        words = {name: value for name, value in _keywords(self.weights).items() if isinstance(value, str)}
        return {**_keywords(self.init_state), **words}

    @property
    def reads_primary(self) -> bool:
        """Whether one of the references is the primary one to it."""
        functions = [function for function in (self.weights, self.observe, self.update) if function]
        return any('primary' in inspect.signature(function).parameters for function in functions)

    def check(self, name: str, value: Any) -> None:
        """Raises InputError for a value that the hyperparameter `name` cannot take."""
        where = f'mixture.{name}'
        choices = typing.get_args(typing.get_type_hints(self.weights).get(name))
        if choices:
            if value not in choices:
                raise unknown(f'objective.{where}', str(value), choices)
            return
        check_number(where, value)
        if name in self.words and not isinstance(value, int):
            raise InputError(f'objective.{where} is a whole number, not {value!r}.')
        if name in self.ranges and value not in self.ranges[name]:
            raise InputError(f'objective.{where} is {self.ranges[name]}, not {value:g}.')


def _keywords(function: Callable | None) -> dict[str, Any]:
    """Keyword-only arguments that have a default: hyperparameters."""
    parameters = inspect.signature(function).parameters.values() if function else ()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def named(function: Callable, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `keywords` that the function names."""
    return {name: keywords[name] for name in inspect.signature(function).parameters if name in keywords}


def weighting(
    source: str,
    *,
    observes: Literal['nothing', 'validation', 'step', 'reward'] = 'nothing',
    init_state: Callable | None = None,
    observe: Callable | None = None,
    update: Callable | None = None,
    ranges: Mapping[str, Range] | None = None,
):
    """Registers a weighting under its function's name; the arguments are as the fields of `Weighting`."""

    def register(function):
        entry = Weighting(function, source, observes, init_state, observe, update, ranges or {})
        WEIGHTINGS[function.__name__] = entry
        return function

    return register


def find(name: str) -> Weighting:
    """The weighting of this name; InputError names the nearest."""
    if name not in WEIGHTINGS:
        raise unknown('objective.mixture.weights', str(name), WEIGHTINGS)
    return WEIGHTINGS[name]
