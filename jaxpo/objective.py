"""An objective is data: losses by name with their hyperparameters. Here it becomes one pure function.

    {'dpo': {'beta': 0.1}, 'sft': {'weight': 0.2}}

is checked by `make` before a model is loaded. Numbers are traced (`Objective.hyperparameters`), so a new beta compiles
nothing; words are structural and stay in the function.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpo import losses
from jaxpo.config import Scalar
from jaxpo.errors import InputError
from jaxpo.losses import Needs
from jaxpo.types import Completion, Rewards

_REFERENCE_STATISTICS = {'forward_kl', 'reverse_kl', 'reference_entropy', 'activations'}


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of an objective with its structural choices."""

    loss: losses.registry.Loss
    choices: tuple[tuple[str, Any], ...]

    @property
    def needs(self) -> Needs:
        return self.loss.needs_of(dict(self.choices))

    @property
    def reads_reference(self) -> bool:
        return self.loss.reads_reference_with(dict(self.choices))


@dataclasses.dataclass(frozen=True)
class Objective:
    """Terms, hashable, and the traced numbers that go with them: `{loss: {hyperparameter: value, 'weight': value}}`."""

    terms: tuple[Term, ...]
    references: tuple[str, ...]
    """Names of the references that `Completion.reference_logps` holds, in order."""
    models: tuple[str, ...]
    """Names of the run's other frozen models, each in a role that a loss names."""
    hyperparameters: dict[str, dict[str, float]] = dataclasses.field(hash=False, compare=False)

    @property
    def reads_reference(self) -> bool:
        return any(term.reads_reference for term in self.terms)

    @property
    def runs_references(self) -> bool:
        """Whether the references have to be computed: for their log-probabilities, or for what else they say."""
        statistics = bool(_REFERENCE_STATISTICS & {*self.needs.statistics})
        return self.reads_reference or statistics or bool(self.token_masks)

    @property
    def couples_batch(self) -> bool:
        return any(term.loss.couples_batch for term in self.terms)

    @property
    def takes_unpaired(self) -> bool:
        return all(term.loss.takes_unpaired for term in self.terms)

    @property
    def token_masks(self) -> dict[str, Callable]:
        """Functions that make token masks of the reference's hidden states, by loss."""
        return {term.loss.name: term.loss.token_masks for term in self.terms if term.loss.token_masks}

    @property
    def needs(self) -> Needs:
        return functools.reduce(Needs.__or__, (term.needs for term in self.terms))


def make(spec: Mapping[str, Mapping[str, Scalar]], references: Sequence[str]) -> Objective:
    """Checks an objective and builds it.

    Args:
      spec: losses by name, each with some of its hyperparameters and perhaps a `weight` (default 1).
      references: names of the run's frozen models. Those named as a role of a loss (`positive`, `earlier`) fill it;
        the others are the references the policy is measured against.

    Raises:
      InputError: unknown loss or hyperparameter, a value of the wrong kind, no loss, an empty role, or the wrong number
        of references.
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
        values = entry.hyperparameters(given)
        choices = entry.choices(given)
        numbers[name] = {key: float(value) for key, value in values.items() if key not in choices}
        numbers[name]['weight'] = float(weight)
        terms.append(Term(entry, tuple(sorted(choices.items()))))
    measured, models = _roles(terms, references)
    objective = Objective(tuple(terms), measured, models, numbers)
    _check_references(objective)
    if len(objective.token_masks) > 1:
        raise InputError(f'objective: {" and ".join(objective.token_masks)} both make token masks; one loss may.')
    return objective


def _roles(terms: Sequence[Term], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The run's frozen models, as references and as models with a role of their own."""
    roles = {role: term.loss.name for term in terms for role in term.needs.models}
    for role, loss in roles.items():
        if role not in names:
            raise InputError(
                f'objective: {loss} reads a frozen model in the role {role!r}: add it to `references` under that name. '
                f'There are: {", ".join(names) or "none"}.'
            )
    return tuple(name for name in names if name not in roles), tuple(name for name in names if name in roles)


def _check_references(objective: Objective) -> None:
    names = objective.references
    if len(names) > 1:
        raise InputError(
            f'references names {len(names)} models that no loss has a role for ({", ".join(names)}); one at most is '
            'supported: drop all but one.'
        )
    if names:
        return
    reads = [term.loss.name for term in objective.terms if term.reads_reference]
    reads += [term.loss.name for term in objective.terms if _REFERENCE_STATISTICS & {*term.needs.statistics}]
    reads += list(objective.token_masks)
    if reads:
        raise InputError(
            f'objective: {", ".join(dict.fromkeys(reads))} reads a reference, but `references` names none.'
        )


def spelled_out(spec: Mapping[str, Mapping[str, Scalar]]) -> dict[str, dict[str, Scalar]]:
    """The objective with every default filled in, so that each can be logged and overridden."""
    return {name: {'weight': 1.0, **losses.find(name).hyperparameters(given)} for name, given in spec.items()}


def init_state(objective: Objective) -> dict[str, Any]:
    """Running state of the losses that have one, by loss."""
    return {term.loss.name: term.loss.init_state() for term in objective.terms if term.loss.init_state}


def init_params(objective: Objective, key: jax.Array, layers: int, width: int) -> dict[str, Any]:
    """Trained parts of the losses that have them, by loss. `layers`, `width`: of the model whose states they read."""
    keys = jax.random.split(key, len(objective.terms))
    return {
        term.loss.name: term.loss.init_params(key, layers=layers, width=width, **dict(term.choices))
        for key, term in zip(keys, objective.terms)
        if term.loss.init_params
    }


def update_state(
    objective: Objective,
    hyperparameters: dict[str, dict[str, jax.Array]],
    state: dict[str, Any],
    chosen: Completion,
    rejected: Completion,
) -> dict[str, Any]:
    """The running state after a step's pairs, which must be all of them. Nothing here is differentiated."""
    chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
    return {
        term.loss.name: term.loss.updated(
            state[term.loss.name], chosen, rejected, **hyperparameters[term.loss.name], **dict(term.choices)
        )
        for term in objective.terms
        if term.loss.init_state
    }


def evaluate(
    objective: Objective,
    hyperparameters: dict[str, dict[str, jax.Array]],
    chosen: Completion,
    rejected: Completion,
    pair_weight: jax.Array,
    counts: dict[str, jax.Array],
    *,
    state: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """This part of the batch's share of the scalar loss, and of the metrics.

    Args:
      hyperparameters: as `Objective.hyperparameters`, traced.
      chosen, rejected: B pairs; all those of the step where a loss couples them.
      pair_weight: `[B]`; 0 for empty slots.
      counts: those of the *whole* step by `counts_of`, over all microbatches and devices, so that the parts of an
        accumulated step add up to the whole.
      state: running state by loss, after this step's update.
      params: trained parts by loss.
      key: PRNG key of this step.

    Returns:
      Scalar loss and metrics, each to be summed over the parts of the step.
    """
    total, metrics, primary = 0.0, {}, None
    for place, term in enumerate(objective.terms):
        name, numbers = term.loss.name, dict(hyperparameters[term.loss.name])
        weight = numbers.pop('weight')
        values, rewards = term.loss(
            chosen,
            rejected,
            state=(state or {}).get(name),
            params=(params or {}).get(name),
            key=None if key is None else jax.random.fold_in(key, place),
            **numbers,
            **dict(term.choices),
        )
        share = (values * pair_weight).sum() / counts[term.loss.normaliser]
        total = total + weight * share
        primary = rewards if primary is None else primary
        if len(objective.terms) > 1:
            metrics[f'loss/{name}'] = share
    return total, {'loss': total, **metrics, **_reward_metrics(primary, chosen, rejected, pair_weight, counts)}


def counts_of(chosen_weights: jax.Array, rejected_weights: jax.Array) -> dict[str, jax.Array]:
    """What the sums of a step are divided by, at least 1 each, from the weights `[..., C]` of all its completions."""
    chosen, rejected = (weights.any(axis=-1) for weights in (chosen_weights, rejected_weights))
    counts = {
        'pairs': (chosen | rejected).sum(),
        'tokens': chosen_weights.sum(),
        'completions': chosen.sum() + rejected.sum(),
        'chosen': chosen.sum(),
        'rejected': rejected.sum(),
    }
    return {name: jnp.maximum(count.astype(jnp.float32), 1.0) for name, count in counts.items()}


def _reward_metrics(rewards: Rewards, chosen, rejected, pair_weight, counts):
    """The field's metrics, of the rewards of the objective's first loss: means over the completions that there are.

    A tie counts one half in `rewards/accuracies`: where the policy is the reference, it says 0.5 and not 0. Of an
    unpaired row the missing completion counts as one of reward 0.
    """

    def mean(values, side, count):
        return jnp.where(side.weights.any(axis=-1), values * pair_weight, 0.0).sum() / counts[count]

    chosen_reward, rejected_reward = (
        mean(rewards.chosen, chosen, 'chosen'),
        mean(rewards.rejected, rejected, 'rejected'),
    )
    correct = (jnp.sign(rewards.chosen - rewards.rejected) + 1) / 2
    return {
        'rewards/chosen': chosen_reward,
        'rewards/rejected': rejected_reward,
        'rewards/margins': chosen_reward - rejected_reward,
        'rewards/accuracies': (correct * pair_weight).sum() / counts['pairs'],
        'logps/chosen': mean(losses.scores.logp(chosen), chosen, 'chosen'),
        'logps/rejected': mean(losses.scores.logp(rejected), rejected, 'rejected'),
    }
