"""One optimizer step and one evaluation step: pure functions of (state, batch).

A batch comes as microbatches `[A, R, ...]`. Every sum is divided by the counts of the whole step, so accumulated
gradients are exactly those of the whole batch, however unequal its rows. Where a loss couples the pairs of a step, all
microbatches are scored first, the loss is differentiated by their log-probabilities, and each microbatch is then run
again to carry its share of that derivative back to the parameters: exact too, at the price of a second forward pass.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpo import objective as objectives
from jaxpo.losses import scores
from jaxpo.objective import Objective
from jaxpo.scoring import Models, log_probabilities, merged, sides
from jaxpo.state import TrainState
from jaxpo.types import Batch, Completion

Metrics = dict[str, jax.Array]
Sides = tuple[Completion, Completion]


def make_train_step(
    models: Models, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch, dict[str, Any]], tuple[TrainState, Metrics]]:
    """The step `(state, batch [A, R, ...], settings) -> (state, metrics)`, to be jitted with the state donated.

    `settings` are traced: `learning_rate`, `method_learning_rate`, `seed` and `objective` (as
    `Objective.hyperparameters`). A loss or gradient that is not finite changes nothing but the step's number, and
    metrics `finite` says 0.
    """
    differentiate = _whole_gradient if objective.couples_batch else _summed_gradient

    def train_step(state, batch, settings):
        gradient, metrics, method_state = differentiate(models, objective, state, batch, settings)
        norms = {name: optax.tree.norm(tree) for name, tree in gradient.items()}
        finite = jnp.isfinite(sum(norms.values())) & jnp.isfinite(metrics['loss'])
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
        )
        state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, state).replace(
            step=state.step + 1, reference_params=state.reference_params
        )
        extra = {'grad_norm': norms['policy'], 'finite': finite, 'learning_rate': settings['learning_rate']}
        if state.method_params:
            extra |= {'method_grad_norm': norms['method'], 'method_learning_rate': settings['method_learning_rate']}
        return state, {**metrics, **extra}

    return train_step


def _summed_gradient(models: Models, objective: Objective, state: TrainState, batch: Batch, settings):
    """Gradient of `state.trained` and metrics, one microbatch at a time; the method's state stays as it is."""
    counts = _counts(batch)

    def loss(trained, microbatch):
        pairs = sides(models, objective, trained, state.reference_params, microbatch)
        weight = microbatch.pair_weight.reshape(-1)
        parts = {'params': trained['method'], 'key': _key(state, settings)}
        return objectives.evaluate(objective, settings['objective'], *pairs, weight, counts, **parts)

    gradient, metrics = _sum_over_microbatches(lambda part: jax.grad(loss, has_aux=True)(state.trained, part), batch)
    return gradient, metrics, state.method_state


def _whole_gradient(models: Models, objective: Objective, state: TrainState, batch: Batch, settings):
    """Gradient of `state.trained`, metrics and the method's new state, of losses that look at all pairs of the step."""
    hyperparameters, weight = settings['objective'], batch.pair_weight.reshape(-1)
    pairs, pull_back = _scored_whole(
        lambda trained, microbatch: sides(models, objective, trained, state.reference_params, microbatch),
        state.trained,
        batch,
    )
    method_state = objectives.update_state(objective, hyperparameters, state.method_state, *pairs)

    def loss(pairs, method_params):
        return objectives.evaluate(
            objective,
            hyperparameters,
            *pairs,
            weight,
            _counts(batch),
            state=method_state,
            params=method_params,
            key=_key(state, settings),
        )

    (by_pairs, by_parts), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(pairs, state.method_params)
    gradient = pull_back(by_pairs)
    return gradient | {'method': jax.tree.map(jnp.add, gradient['method'], by_parts)}, metrics, method_state


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
        def evaluate(pairs, weight):
            return objectives.evaluate(
                objective,
                settings['objective'],
                *pairs,
                weight.reshape(-1),
                counts,
                state=state.method_state,
                params=state.method_params,
                key=_key(state, settings),
            )[1]

        def score(microbatch):
            return sides(models, objective, state.trained, state.reference_params, microbatch)

        if objective.couples_batch:
            pairs = tuple(merged(side) for side in jax.lax.map(score, batch))
            return evaluate(pairs, batch.pair_weight)
        return _sum_over_microbatches(lambda part: evaluate(score(part), part.pair_weight), batch)

    return eval_step


def make_score_step(models: Models, reference: str) -> Callable[..., dict[str, jax.Array]]:
    """The step `(params, reference_params, batch [A, R, ...]) -> log-ratios` to one reference.

    log pi - log pi_ref of each `chosen` and `rejected` completion, `[A, R * P]`, nats; 0 for empty slots.
    """

    def score_step(params, reference_params, batch):
        def part(microbatch):
            chosen, rejected = log_probabilities(models, params, {reference: reference_params[reference]}, microbatch)
            return {'chosen': scores.log_ratio(chosen), 'rejected': scores.log_ratio(rejected)}

        return jax.lax.map(part, batch)

    return score_step


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
