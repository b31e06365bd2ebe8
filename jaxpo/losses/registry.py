"""The one place where a method is registered: a decorator that demands the citation and states what is true of it."""

import dataclasses
import inspect
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from jaxpo.errors import InputError, unknown

LOSSES: dict[str, 'Loss'] = {}
STATISTICS = (
    'forward_kl',
    'reverse_kl',
    'entropy',
    'log_sum_squares',
    'reference_entropy',
    'activations',
    'prompt_hidden',
)


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, each of which belongs to it or does not."""

    least: float = -math.inf
    most: float = math.inf
    with_least: bool = False
    with_most: bool = False

    def __contains__(self, value: float) -> bool:
        at_an_end = (self.with_least and value == self.least) or (self.with_most and value == self.most)
        return at_an_end or self.least < value < self.most

    def __str__(self) -> str:
        bounds = [f'{"at least" if self.with_least else "above"} {self.least:g}'] if self.least > -math.inf else []
        bounds += [f'{"at most" if self.with_most else "below"} {self.most:g}'] if self.most < math.inf else []
        return ' and '.join(bounds)


# The same name means the same everywhere; a loss may narrow it.
RANGES = {
    'beta': Range(0),
    'tau': Range(0),
    'temperature': Range(0),
    'label_smoothing': Range(0, 0.5, with_least=True),
    'momentum': Range(0, 1, with_least=True),
    'rho': Range(0, 1, with_least=True),
    'expectile': Range(0, 1),
    'preference_weight': Range(0, 1, with_most=True),
    'mixing_alpha': Range(0, 1, with_least=True, with_most=True),
}


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a loss reads beyond log-probabilities. All of it is checked before a model is loaded."""

    statistics: tuple[str, ...] = ()
    """Fields of Completion, of STATISTICS, that cost a computation of their own."""
    pair_columns: tuple[str, ...] = ()
    """Columns of the data with one number a pair, by name: `margin`."""
    completion_columns: tuple[str, ...] = ()
    """Columns with one number a completion: `score` reads `chosen_score` and `rejected_score`."""
    token_columns: tuple[str, ...] = ()
    """Columns with one number a completion token: `segment` reads `chosen_segment` and `rejected_segment`."""
    models: tuple[str, ...] = ()
    """Roles of frozen models beside the references: each is filled by that of the run's `references` with its name."""
    companions: tuple[str, ...] = ()
    """Further sequences to score with each pair: `mismatched` (another pair's completion behind this prompt) or
    `corrupted` (the chosen completion behind the row's `corrupted_prompt`)."""

    def __or__(self, other: 'Needs') -> 'Needs':
        """What both need, in order, each once."""
        names = [field.name for field in dataclasses.fields(self)]
        return Needs(*(tuple(dict.fromkeys(getattr(self, name) + getattr(other, name))) for name in names))


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """A registered loss and what is true of it."""

    function: Callable
    """`(chosen: Completion, rejected: Completion, **hyperparameters) -> (losses [B], Rewards)`. Where it names them as
    keyword-only arguments without default, it is also given `state`, `params` or `key`."""
    source: str
    """Paper, arXiv number and equation."""
    reads_reference: bool | Callable[..., bool]
    normaliser: Literal['pairs', 'tokens', 'completions']
    """What the sum of losses is divided by: the step's pairs, its chosen tokens, or its completions."""
    couples_batch: bool
    """Whether a pair's loss depends on the other pairs: it is then given all pairs of the step at once."""
    takes_unpaired: bool
    """Whether one side of a pair may be missing (all its weights 0)."""
    many_references: bool
    """Whether it reads all K references and `mixing_weights` rather than one mixture of them."""
    needs: Needs | Callable[..., Needs]
    init_state: Callable | None
    update_state: Callable | None
    init_params: Callable | None
    token_masks: Callable | None
    parts: Mapping[str, Mapping[str, Callable]]
    ranges: Mapping[str, Range]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def summary(self) -> str:
        return inspect.getdoc(self.function).splitlines()[0]

    @property
    def formula(self) -> str:
        """The docstring's second paragraph: the loss of one pair."""
        paragraphs = inspect.getdoc(self.function).split('\n\n')
        return ' '.join(paragraphs[1].split()) if len(paragraphs) > 1 else ''

    @property
    def defaults(self) -> dict[str, Any]:
        """Hyperparameters and their defaults. Floats are traced; words are structural choices, fixed at compilation."""
        return self.hyperparameters({})

    def hyperparameters(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All hyperparameters that there are for the given choices: those `given`, and defaults for the rest."""
        values = {**_keywords(self.update_state), **_keywords(self.function)}
        for word, table in self.parts.items():
            name = given.get(word, values[word])
            if name in table:
                values |= {key: value for key, value in _keywords(table[name]).items() if key not in values}
        return {**values, **given}

    def choices(self, given: Mapping[str, Any]) -> dict[str, str]:
        """The structural words among all hyperparameters."""
        return {name: value for name, value in self.hyperparameters(given).items() if isinstance(value, str)}

    def reads_reference_with(self, given: Mapping[str, Any]) -> bool:
        """Whether the loss reads `reference_logps` with the given choices."""
        return self.reads_reference(**self.choices(given)) if callable(self.reads_reference) else self.reads_reference

    def needs_of(self, given: Mapping[str, Any]) -> Needs:
        """What the loss needs with the given choices."""
        return self.needs(**self.choices(given)) if callable(self.needs) else self.needs

    def check(self, given: Mapping[str, Any]) -> None:
        """Raises InputError for a hyperparameter the loss does not have, or a value it cannot take."""
        hints = typing.get_type_hints(self.function)
        known = self.hyperparameters({word: given[word] for word in self.parts if word in given})
        for name, value in given.items():
            if name not in known:
                raise unknown(f'hyperparameter of {self.name}', name, known)
            words = tuple(self.parts.get(name, ())) or typing.get_args(hints.get(name))
            if words and value not in words:
                raise unknown(f'{self.name}.{name}', str(value), words)
            if not words:
                check_number(f'{self.name}.{name}', value)
                allowed = {**RANGES, **self.ranges}.get(name)
                if allowed and value not in allowed:
                    raise InputError(f'objective.{self.name}.{name} is {allowed}, not {value:g}.')

    def __call__(self, chosen, rejected, *, state=None, params=None, key=None, **hyperparameters):
        """The loss of its pairs `[B]`, and Rewards. `state`, `params`, `key` go to a function that names them."""
        extra = {'state': state, 'params': params, 'key': key}
        given = {name: value for name, value in extra.items() if name in _parameters(self.function)}
        return self.function(chosen, rejected, **given, **self._own(self.function, hyperparameters))

    def updated(self, state, chosen, rejected, **hyperparameters):
        """The running state after these pairs, which are all those of a step."""
        return self.update_state(state, chosen, rejected, **self._own(self.update_state, hyperparameters))

    def _own(self, function, hyperparameters):
        """Those hyperparameters that this one of the loss's functions takes."""
        parameters = _parameters(function)
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        other = _keywords(self.update_state) if function is self.function else {}
        return {
            name: value
            for name, value in hyperparameters.items()
            if name in parameters or (takes_all and name not in other)
        }


def _parameters(function):
    return inspect.signature(function).parameters


def _keywords(function) -> dict[str, Any]:
    """Keyword-only arguments that have a default: hyperparameters."""
    if function is None:
        return {}
    parameters = _parameters(function).values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def check_number(name: str, value: Any) -> None:
    """InputError where `value` is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f'objective.{name} is a finite number, not {value!r}.')


def loss(
    source: str,
    *,
    reads_reference: bool | Callable[..., bool] = True,
    normaliser: Literal['pairs', 'tokens', 'completions'] = 'pairs',
    couples_batch: bool = False,
    takes_unpaired: bool = False,
    many_references: bool = False,
    needs: Needs | Callable[..., Needs] = Needs(),
    init_state: Callable | None = None,
    update_state: Callable | None = None,
    init_params: Callable | None = None,
    token_masks: Callable | None = None,
    parts: Mapping[str, Mapping[str, Callable]] | None = None,
    ranges: Mapping[str, Range] | None = None,
):
    """Registers a loss under its function's name. Tests, and `jaxpo check`, hold it to what it says here.

    Args:
      source: paper, arXiv number and equation.
      reads_reference: whether it reads `reference_logps`; a function of its structural words where that depends on
        them.
      normaliser: what a step's sum of losses is divided by.
      couples_batch: whether a pair's loss depends on the other pairs of the step.
      takes_unpaired: whether either completion of a pair may be missing.
      many_references: whether it reads all K references and `mixing_weights` rather than one mixture of them.
      needs: what it reads beyond log-probabilities; a function of its structural words where it depends on them.
      init_state: `() -> state`, float32 arrays that run along with training (moments), of losses that couple the batch.
      update_state: `(state, chosen, rejected, **hyperparameters) -> state`, before each step's loss; not in evaluation.
      init_params: `(key, layers, width, **words) -> params`, trained along with the policy at their own learning rate.
      token_masks: `(params, hidden [L, N, D]) -> {name: [N]}`, of the reference's hidden states behind each layer at N
        scored tokens; they arrive as `Completion.masks`.
      parts: structural words whose choices are functions with hyperparameters of their own, by name.
      ranges: of hyperparameters, where they differ from RANGES.
    """

    def register(function):
        name = function.__name__
        if name in LOSSES and inspect.getsourcefile(LOSSES[name].function) != inspect.getsourcefile(function):
            raise InputError(f'The loss {name!r} is registered already, with source {LOSSES[name].source!r}.')
        if not inspect.getdoc(function):
            raise InputError(
                f'The loss {name!r} needs a docstring: its first line is shown wherever losses are listed.'
            )
        if (init_state is None) != (update_state is None) or (init_state is not None and not couples_batch):
            raise InputError(f'The loss {name!r} needs init_state, update_state and couples_batch together, or none.')
        if token_masks is not None and init_params is None:
            raise InputError(f'The loss {name!r} has token_masks, but no init_params to make them of.')
        if many_references and reads_reference is not True:
            raise InputError(f'The loss {name!r} has many_references, so reads_reference is True.')
        if 'weight' in _keywords(function):
            raise InputError(
                f'The loss {name!r} names a hyperparameter `weight`, which every loss has in an objective.'
            )
        LOSSES[name] = Loss(
            function,
            source,
            reads_reference,
            normaliser,
            couples_batch,
            takes_unpaired,
            many_references,
            needs,
            init_state,
            update_state,
            init_params,
            token_masks,
            parts or {},
            ranges or {},
        )
        return function

    return register


def find(name: str) -> Loss:
    """The loss of this name; InputError names the nearest."""
    if name not in LOSSES:
        raise unknown('loss', name, LOSSES)
    return LOSSES[name]
