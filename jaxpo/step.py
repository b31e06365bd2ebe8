"""One optimizer step and one evaluation step: pure functions of (state, batch).

A batch comes as microbatches `[A, R, ...]`. Every sum is divided by the counts of the whole step, so accumulated
gradients are exactly those of the whole batch, however unequal its rows. Where a loss couples the pairs of a step, all
microbatches are scored first, the loss is differentiated by their log-probabilities, and each microbatch is then run
again to carry its share of that derivative back to the parameters: exact too, at the price of a second forward pass.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpo import objective as objectives
from jaxpo.completions import merged
from jaxpo.losses import scores
from jaxpo.objective import Objective
from jaxpo.scoring import Models, fetched, log_probabilities, sides, token_table
from jaxpo.state import TrainState
from jaxpo.types import Batch, Completion

Metrics = dict[str, jax.Array]
Sides = tuple[Completion, Completion]


class Average(NamedTuple):
    """How a reference follows the policy (TR-DPO, Gorbatovski et al. 2024, arXiv:2404.09656)."""

    every: int  # steps between updates
    rate: float  # share of the policy in an update; 1 copies it


def make_train_step(
    models: Models,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    averages: Mapping[str, Average] | None = None,
) -> Callable[[TrainState, Batch, dict[str, Any]], tuple[TrainState, Metrics]]:
    """The step `(state, batch [A, R, ...], settings) -> (state, metrics)`, to be jitted with the state donated.

    `settings` are traced: `learning_rate`, `method_learning_rate`, `seed` and `objective` (as
    `Objective.hyperparameters`). A loss or gradient that is not finite changes nothing but the step's number, and
    metrics `finite` says 0. `averages` are the references of `TrainState.average_params`, updated after the policy.
    """
    differentiate = _whole_gradient if objective.couples_batch else _summed_gradient

    def train_step(state, batch, settings):
        gradient, metrics, method_state = differentiate(models, objective, state, batch, settings)
        norms = {name: optax.tree.norm(tree) for name, tree in gradient.items()}
        finite = jnp.isfinite(sum(norms.values())) & jnp.isfinite(metrics['loss'])
        for part in jax.tree.leaves(method_state):
            finite &= jnp.isfinite(part).all()
        unwritten = {'reference_params': {}, 'base_params': {}}
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.trained)
        rates = {'policy': settings['learning_rate'], 'method': settings['method_learning_rate']}
        trained = {
            name: jax.tree.map(lambda p, u, rate=rates[name]: p - rate * u, tree, updates[name])
            for name, tree in state.trained.items()
        }
        new = state.replace(
            params=trained['policy'],
            method_params=trained['method'],
            opt_state=opt_state,
            method_state=method_state,
            average_params=_followed(averages or {}, state.average_params, trained['policy'], state.step + 1),
            **unwritten,
        )
        kept = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state.replace(**unwritten))
        held = {name: getattr(state, name) for name in unwritten}
        state = kept.replace(step=state.step + 1, **held)
        extra = {'grad_norm': norms['policy'], 'finite': finite, 'learning_rate': settings['learning_rate']}
        if state.method_params:
            extra |= {'method_grad_norm': norms['method'], 'method_learning_rate': settings['method_learning_rate']}
        return state, {**metrics, **extra}

    return train_step


def _followed(averages: Mapping[str, Average], held: dict[str, Any], policy, step: jax.Array) -> dict[str, Any]:
    """References that follow the policy, after step number `step`."""

    def follow(name, params):
        every, rate = averages[name]

        def update():
            return jax.tree.map(lambda old, new: old + rate * (new - old) if rate < 1 else new, params, policy)

        return jax.lax.cond(step % every == 0, update, lambda: params)

    return {name: follow(name, params) for name, params in held.items()}


def _summed_gradient(models: Models, objective: Objective, state: TrainState, batch: Batch, settings):
    """Gradient of `state.trained` and metrics, one microbatch at a time, and the method's new state."""
    counts, hyperparameters = _counts(batch), settings['objective']
    frozen, key = fetched(models, state.frozen), _key(state, settings)

    def loss(trained, microbatch):
        pairs = sides(models, objective, trained, frozen, microbatch)
        weight = microbatch.pair_weight.reshape(-1)
        parts = {'state': state.method_state, 'params': trained['method'], 'key': key}
        total, metrics = objectives.evaluate(objective, hyperparameters, *pairs, weight, counts, **parts)
        seen = objectives.observe(objective, hyperparameters, *pairs, weight, counts, state=state.method_state)
        return total, (metrics, seen)

    gradient, (metrics, seen) = _sum_over_microbatches(
        lambda part: jax.grad(loss, has_aux=True)(state.trained, part), batch
    )
    return gradient, metrics, _followed_mixture(objective, hyperparameters, state.method_state, seen)


def _followed_mixture(objective: Objective, hyperparameters, method_state: dict[str, Any], seen) -> dict[str, Any]:
    """The method's state after a weighting that learns from every step saw the step's means."""
    if objective.mixture is None or objective.mixture.observes != 'step':
        return method_state
    return objectives.follow(objective, hyperparameters, method_state, seen)


def _whole_gradient(models: Models, objective: Objective, state: TrainState, batch: Batch, settings):
    """Gradient of `state.trained`, metrics and the method's new state, of losses that look at all pairs of the step."""
    hyperparameters, weight = settings['objective'], batch.pair_weight.reshape(-1)
    frozen, key, counts = fetched(models, state.frozen), _key(state, settings), _counts(batch)
    pairs, pull_back = _scored_whole(
        lambda trained, microbatch: sides(models, objective, trained, frozen, microbatch), state.trained, batch
    )
    method_state = objectives.update_state(objective, hyperparameters, state.method_state, *pairs, key=key)

    def loss(pairs, method_params):
        parts = {'state': method_state, 'params': method_params, 'key': key}
        return objectives.evaluate(objective, hyperparameters, *pairs, weight, counts, **parts)

    (by_pairs, by_parts), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(pairs, state.method_params)
    gradient = pull_back(by_pairs)
    seen = objectives.observe(objective, hyperparameters, *pairs, weight, counts, state=method_state)
    gradient |= {'method': jax.tree.map(jnp.add, gradient['method'], by_parts)}
    return gradient, metrics, _followed_mixture(objective, hyperparameters, method_state, seen)


def _scored_whole(score: Callable[[Any, Batch], Sides], trained, batch: Batch):
    """All pairs of a step as one `score`, and the function from a derivative by them to one by `trained`.

    One microbatch is run once. Several are run twice, so that only one holds its activations at a time.
    """
    if batch.tokens.shape[0] == 1:
        only = jax.tree.map(lambda x: x[0], batch)
        pairs, pull_back = jax.vjp(lambda trained: score(trained, only), trained)
        return pairs, lambda by_pairs: pull_back(by_pairs)[0]

    stacked = jax.lax.map(lambda microbatch: score(trained, microbatch), batch)
    pairs, unmerge = jax.vjp(lambda sides: tuple(merged(side) for side in sides), stacked)

    def pull_back(by_pairs):
        def part(given):
            microbatch, by_sides = given
            return jax.vjp(lambda trained: score(trained, microbatch), trained)[1](by_sides)[0]

        return _sum_over_microbatches(part, (batch, unmerge(by_pairs)[0]))

    return pairs, pull_back


def make_eval_step(models: Models, objective: Objective) -> Callable[..., Metrics]:
    """The step `(state, batch [A, R, ...], settings, counts) -> metrics`, without gradients.

    `counts` are those of the whole evaluation (`objective.counts_of`): its batches' metrics add up to its means.
    Running state is read and not updated. A loss that couples pairs sees those of one batch at a time. Of `settings`,
    `seed` and `objective` are read.
    """

    def eval_step(state, batch, settings, counts):
        frozen = fetched(models, state.frozen)

        def evaluate(pairs, weight):
            parts = {'state': state.method_state, 'params': state.method_params, 'key': _key(state, settings)}
            weight = weight.reshape(-1)
            return objectives.evaluate(objective, settings['objective'], *pairs, weight, counts, **parts, draw=False)[1]

        def score(microbatch):
            return sides(models, objective, state.trained, frozen, microbatch)

        if objective.couples_batch:
            pairs = tuple(merged(side) for side in jax.lax.map(score, batch))
            return evaluate(pairs, batch.pair_weight)
        return _sum_over_microbatches(lambda part: evaluate(score(part), part.pair_weight), batch)

    return eval_step


def make_observe_step(models: Models, objective: Objective) -> Callable[..., Any]:
    """The step `(state, batch [A, R, ...], settings, counts) -> means` of what the mixture's weighting learns from.

    The means of all batches of a set of pairs, by `counts` of the whole, add up to what `objective.follow` takes.
    """

    def observe_step(state, batch, settings, counts):
        frozen, hyperparameters = fetched(models, state.frozen), settings['objective']

        def part(microbatch):
            pairs = sides(models, objective, state.trained, frozen, microbatch)
            weight = microbatch.pair_weight.reshape(-1)
            return objectives.observe(objective, hyperparameters, *pairs, weight, counts, state=state.method_state)

        return _sum_over_microbatches(part, batch)

    return observe_step


def make_accuracy_step(models: Models) -> Callable[..., jax.Array]:
    """The step `(state, batch [A, R, ...]) -> share` of pairs whose chosen completion the policy prefers.

    By its mean token log-probability, without a reference. A tie counts one half.
    """

    def accuracy_step(state, batch):
        def part(microbatch):
            return objectives.preferred(*log_probabilities(models, (), state.params, state.frozen, microbatch))

        return _sum_over_microbatches(part, batch) / _counts(batch)['both']

    return accuracy_step


def make_reward_step(objective: Objective) -> Callable[..., dict[str, Any]]:
    """The step `(state, settings, reward) -> method_state` that credits the reference which the last step drew."""

    def reward_step(state, settings, reward):
        key = _key(state.replace(step=state.step - 1), settings)
        return objectives.reward(objective, settings['objective'], state.method_state, key, reward)

    return reward_step


def make_score_step(models: Models, references: tuple[str, ...]) -> Callable[..., dict[str, jax.Array]]:
    """The step `(policy, frozen, batch [A, R, ...]) -> log-ratios` to each of `references`, none of them a table.

    log pi - log pi_ref of each `chosen` and `rejected` completion, `[A, K, R * P]`, nats; 0 for empty slots.
    """

    def score_step(policy, frozen, batch):
        frozen = fetched(models, frozen)

        def part(microbatch):
            chosen, rejected = log_probabilities(models, references, policy, frozen, microbatch)
            return {'chosen': scores.log_ratios(chosen), 'rejected': scores.log_ratios(rejected)}

        return jax.lax.map(part, batch)

    return score_step


def make_table_step(models: Models, reference: str, statistics: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    """The step `(frozen, batch [A, R, ...]) -> numbers` a table holds of one reference.

    By completion (`chosen`, `rejected`, companions' names), then by statistic, `[A, R, P, C]` float32.
    """

    def table_step(frozen, batch):
        frozen = fetched(models, frozen)
        return jax.lax.map(lambda microbatch: token_table(models, reference, statistics, frozen, microbatch), batch)

    return table_step


def _counts(batch: Batch) -> dict[str, jax.Array]:
    return objectives.counts_of(batch.chosen.weights, batch.rejected.weights)


def _key(state: TrainState, settings) -> jax.Array:
    return jax.random.fold_in(jax.random.key(settings['seed']), state.step)


def _sum_over_microbatches(part, batch):
    """Sum of `part(microbatch)` over the leading axis of a batch, one microbatch at a time."""
    first = jax.tree.map(lambda x: x[0], batch)
    if len(jax.tree.leaves(batch)[0]) == 1:
        return part(first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first))

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, part(microbatch)), None

    return jax.lax.scan(add, nothing, batch)[0]
