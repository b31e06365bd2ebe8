"""An objective is data: losses by name with their hyperparameters. Here it becomes one pure function.

    {'dpo': {'beta': 0.1}, 'sft': {'weight': 0.2}}

is checked by `make` before a model is loaded. Numbers are traced (`Objective.hyperparameters`), so a new beta compiles
nothing; words are structural and stay in the function.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpo import losses
from jaxpo.config import Scalar
from jaxpo.errors import InputError
from jaxpo.types import Completion, Rewards


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of an objective with its structural choices."""

    loss: losses.registry.Loss
    choices: tuple[tuple[str, Any], ...]


@dataclasses.dataclass(frozen=True)
class Objective:
    """Terms, hashable, and the traced numbers that go with them: `{loss: {hyperparameter: value, 'weight': value}}`."""

    terms: tuple[Term, ...]
    hyperparameters: dict[str, dict[str, float]] = dataclasses.field(hash=False, compare=False)

    @property
    def reads_reference(self) -> bool:
        return any(term.loss.reads_reference for term in self.terms)


def make(spec: Mapping[str, Mapping[str, Scalar]], references: int) -> Objective:
    """Checks an objective and builds it.

    Args:
      spec: losses by name, each with some of its hyperparameters and perhaps a `weight` (default 1).
      references: how many reference models the run has.

    Raises:
      InputError: unknown loss or hyperparameter, a value of the wrong kind, no loss, or the wrong number of references.
    """
    if not spec:
        raise InputError(f'objective: names no loss. Known: {", ".join(sorted(losses.LOSSES))}.')
    terms, numbers = [], {}
    for name, given in spec.items():
        entry = losses.find(name)
        given = dict(given)
        weight = given.pop('weight', 1.0)
        losses.registry.check_number(f'{name}.weight', weight)
        entry.check(given)
        values = {**entry.defaults, **given}
        words = {key: value for key, value in values.items() if isinstance(value, str)}
        numbers[name] = {key: float(value) for key, value in values.items() if key not in words}
        numbers[name]['weight'] = float(weight)
        terms.append(Term(entry, tuple(sorted(words.items()))))
    if references > 1:
        raise InputError(f'references names {references} models; one at most is supported: drop all but one.')
    objective = Objective(tuple(terms), numbers)
    if objective.reads_reference and not references:
        reads = ', '.join(term.loss.name for term in terms if term.loss.reads_reference)
        raise InputError(f'objective: {reads} reads a reference, but `references` names none.')
    return objective


def spelled_out(spec: Mapping[str, Mapping[str, Scalar]]) -> dict[str, dict[str, Scalar]]:
    """The objective with every default filled in, so that each can be logged and overridden."""
    return {name: {'weight': 1.0, **losses.find(name).defaults, **given} for name, given in spec.items()}


def evaluate(
    objective: Objective,
    hyperparameters: dict[str, dict[str, jax.Array]],
    chosen: Completion,
    rejected: Completion,
    pair_weight: jax.Array,
    counts: dict[str, jax.Array],
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This part of the batch's share of the scalar loss, and of the metrics.

    Args:
      hyperparameters: as `Objective.hyperparameters`, traced.
      pair_weight: `[B]`; 0 for empty slots.
      counts: `pairs` and `tokens` (chosen tokens) of the *whole* step, over all microbatches and devices, so that the
        parts of an accumulated step add up to the whole.

    Returns:
      Scalar loss and metrics, each to be summed over the parts of the step.
    """
    total, metrics, primary = 0.0, {}, None
    for term in objective.terms:
        numbers = dict(hyperparameters[term.loss.name])
        weight = numbers.pop('weight')
        values, rewards = term.loss.function(chosen, rejected, **numbers, **dict(term.choices))
        share = (values * pair_weight).sum() / counts[term.loss.normaliser]
        total = total + weight * share
        primary = rewards if primary is None else primary
        if len(objective.terms) > 1:
            metrics[f'loss/{term.loss.name}'] = share
    return total, {'loss': total, **metrics, **_reward_metrics(primary, chosen, rejected, pair_weight, counts)}


def _reward_metrics(rewards: Rewards, chosen, rejected, pair_weight, counts):
    """The field's metrics, as means over pairs, of the rewards of the objective's first loss.

    A tie counts one half in `rewards/accuracies`: where the policy is the reference, it says 0.5 and not 0.
    """

    def mean(values):
        return (values * pair_weight).sum() / counts['pairs']

    return {
        'rewards/chosen': mean(rewards.chosen),
        'rewards/rejected': mean(rewards.rejected),
        'rewards/margins': mean(rewards.chosen - rewards.rejected),
        'rewards/accuracies': mean((jnp.sign(rewards.chosen - rewards.rejected) + 1) / 2),
        'logps/chosen': mean(losses.scores.logp(chosen)),
        'logps/rejected': mean(losses.scores.logp(rejected)),
    }
