"""An objective on a batch: the pure function (statistics -> scalar, metrics) that its data (`specification`) make.

    {'dpo': {'beta': 0.1}, 'sft': {'weight': 0.2}}

What it returns of parts of a step adds up to what it is of the whole: one device, a mesh, or microbatch by microbatch.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxpo.pair_metrics import counts_of as counts_of
from jaxpo.pair_metrics import preferred as preferred
from jaxpo.pair_metrics import reference_metrics, reward_metrics
from jaxpo.references import mixture as mixtures
from jaxpo.references.mixture import Combined
from jaxpo.specification import MIXTURE as MIXTURE
from jaxpo.specification import Objective, Term
from jaxpo.specification import make as make
from jaxpo.specification import mrpo as mrpo
from jaxpo.specification import spelled_out as spelled_out
from jaxpo.specification import spelled_out_again as spelled_out_again
from jaxpo.types import Completion, Rewards

_MIXTURE_PLACE = 2**31 - 1  # no loss of an objective stands there

TURNS = 'turns'
"""Where hyperparameters have an entry of this name, the objective holds the losses of many, and the entry says which
of them this one is made of: `{loss: {'active': 0 or 1, 'place': its place among them}}`, traced
(`jaxpo.study.union`)."""


def init_state(objective: Objective) -> dict[str, Any]:
    """Running state of the losses that have one, by loss, and of the mixture's weighting."""
    state = {term.loss.name: term.loss.init_state() for term in objective.terms if term.loss.init_state}
    weighting = mixtures.init_state(objective.mixture) if objective.mixture else {}
    return {MIXTURE: weighting, **state} if weighting else state


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
    *,
    key: jax.Array | None = None,
) -> dict[str, Any]:
    """The losses' running state after a step's pairs, which must be all of them. Nothing here is differentiated."""
    found = combine(objective, hyperparameters, *jax.lax.stop_gradient((chosen, rejected)), state=state, key=key)
    turns, new = hyperparameters.get(TURNS), {}
    for term in objective.terms:
        if term.loss.init_state:
            name = term.loss.name
            numbers = {**hyperparameters[name], **dict(term.choices)}
            new[name] = term.loss.updated(state[name], *_sides_of(term, found), **numbers)
            if turns is not None:
                new[name] = _selected(turns[name]['active'] > 0, new[name], state[name])
    return state | new


def combine(
    objective: Objective,
    hyperparameters: dict[str, dict[str, jax.Array]],
    chosen: Completion,
    rejected: Completion,
    *,
    state: dict[str, Any] | None = None,
    key: jax.Array | None = None,
) -> Combined:
    """B pairs with one reference made of many, and as they were; without a mixture, as they were twice."""
    if objective.mixture is None:
        return Combined(chosen, rejected, chosen, rejected, jnp.ones(chosen.reference_logps.shape[:2]))
    return mixtures.combine(
        objective.mixture,
        hyperparameters[MIXTURE],
        chosen,
        rejected,
        state=(state or {}).get(MIXTURE, {}),
        key=mixture_key(key),
    )


def mixture_key(key: jax.Array | None) -> jax.Array | None:
    """The key that a weighting draws with in a step with `key`: apart from those of the losses."""
    return None if key is None else jax.random.fold_in(key, _MIXTURE_PLACE)


def _sides_of(term: Term, found: Combined) -> tuple[Completion, Completion]:
    many = term.loss.many_references
    return (found.many_chosen, found.many_rejected) if many else (found.chosen, found.rejected)


def observe(
    objective: Objective,
    hyperparameters: dict[str, dict[str, jax.Array]],
    chosen: Completion,
    rejected: Completion,
    pair_weight: jax.Array,
    counts: dict[str, jax.Array],
    *,
    state: dict[str, Any],
) -> Any:
    """This part's share of the means over all pairs that the mixture's weighting learns from; a tree of arrays."""
    if objective.mixture is None or objective.mixture.observes not in ('step', 'validation'):
        return {}
    sides = jax.lax.stop_gradient((chosen, rejected))
    numbers, weighting = hyperparameters[MIXTURE], state.get(MIXTURE, {})
    seen = mixtures.observe(objective.mixture, numbers, *sides, state=weighting)
    weighted = jax.vmap(jnp.multiply, in_axes=(-1, 0), out_axes=-1)
    return jax.tree.map(lambda values: weighted(values, pair_weight).sum(axis=-1) / counts['pairs'], seen)


def follow(
    objective: Objective, hyperparameters: dict[str, dict[str, jax.Array]], state: dict[str, Any], means: Any
) -> dict[str, Any]:
    """The state after the mixture's weighting saw these means over all pairs."""
    weighting = mixtures.update(objective.mixture, hyperparameters[MIXTURE], state.get(MIXTURE, {}), means)
    return {**state, MIXTURE: weighting}


def reward(
    objective: Objective,
    hyperparameters: dict[str, dict[str, jax.Array]],
    state: dict[str, Any],
    key: jax.Array,
    value: jax.Array,
) -> dict[str, Any]:
    """The state after the step with `key`, whose reference earned the reward `value`, 0 or 1."""
    numbers = hyperparameters[MIXTURE]
    weighting = mixtures.rewarded(objective.mixture, numbers, state[MIXTURE], mixture_key(key), value)
    return {**state, MIXTURE: weighting}


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
    draw: bool = True,
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
      draw: whether a mixture that draws a reference for each step does; it takes the likeliest otherwise.

    Returns:
      Scalar loss and metrics, each to be summed over the parts of the step.
    """
    found = combine(objective, hyperparameters, chosen, rejected, state=state, key=key if draw else None)
    values, primary = _terms(objective, hyperparameters, found, state=state, params=params, key=key)
    total, metrics = 0.0, {}
    for term in objective.terms:
        name = term.loss.name
        share = (values[name] * pair_weight).sum() / counts[term.loss.normaliser]
        total = total + hyperparameters[name]['weight'] * share
        if len(objective.terms) > 1:
            metrics[f'loss/{name}'] = share
    metrics |= reward_metrics(primary, chosen, rejected, pair_weight, counts)
    if objective.mixture is not None:
        metrics |= reference_metrics(objective.references, chosen, rejected, found.weights * pair_weight[None], counts)
    return total, {'loss': total, **metrics}


def by_pair(
    objective: Objective,
    hyperparameters: dict[str, dict[str, jax.Array]],
    chosen: Completion,
    rejected: Completion,
    *,
    state: dict[str, Any] | None = None,
    params: dict[str, Any] | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Rewards]:
    """The loss of each of B pairs `[B]`, terms with their weights added up, and the first loss's implicit rewards.

    As an evaluation sees them; arguments are those of `evaluate`.
    """
    found = combine(objective, hyperparameters, chosen, rejected, state=state)
    values, rewards = _terms(objective, hyperparameters, found, state=state, params=params, key=key)
    return sum(hyperparameters[name]['weight'] * value for name, value in values.items()), rewards


def _terms(
    objective: Objective, hyperparameters: dict[str, dict[str, jax.Array]], found: Combined, *, state, params, key
) -> tuple[dict[str, jax.Array], Rewards]:
    """Unreduced losses `[B]` by name, without their weights, and the rewards of the first."""
    values, primary, turns = {}, None, hyperparameters.get(TURNS)
    for place, term in enumerate(objective.terms):
        name, numbers = term.loss.name, dict(hyperparameters[term.loss.name])
        numbers.pop('weight')
        sides, own = _sides_of(term, found), (params or {}).get(name)
        if turns is not None:
            sides, own = _cut_off((sides, own), turns[name]['active'])
            place = turns[name]['place']
        values[name], rewards = term.loss(
            *sides,
            state=(state or {}).get(name),
            params=own,
            key=None if key is None else jax.random.fold_in(key, place),
            **numbers,
            **dict(term.choices),
        )
        if turns is not None:
            values[name] = jnp.where(turns[name]['active'] > 0, values[name], 0)
        if primary is None:
            primary = rewards
        elif turns is not None:
            primary = _selected((turns[name]['active'] > 0) & (place == 0), rewards, primary)
    return values, primary


def _cut_off(tree, active: jax.Array):
    """The same values, through which no gradient flows where the loss is not active: not even one that is NaN."""
    return jax.tree.map(lambda leaf: jnp.where(active > 0, leaf, jax.lax.stop_gradient(leaf)), tree)


def _selected(condition: jax.Array, new, old):
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
