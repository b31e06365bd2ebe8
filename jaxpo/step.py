"""One optimizer step and one evaluation step: pure functions of (state, batch).

A batch comes as microbatches `[A, R, ...]`. Every sum is divided by the counts of the whole step, so accumulated
gradients are exactly those of the whole batch, however unequal its rows.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxpo import objective as objectives
from jaxpo.logps import token_statistics
from jaxpo.losses import scores
from jaxpo.models.decoder import Decoder, head_weight
from jaxpo.objective import Objective
from jaxpo.state import TrainState
from jaxpo.types import Batch, Completion

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Models:
    """How to compute hidden states of the policy and of each reference, and on which mesh (None: one device)."""

    policy: Decoder
    references: Mapping[str, Decoder]
    mesh: Mesh | None


def scored_logps(decoder: Decoder, params, batch: Batch, mesh: Mesh | None) -> jax.Array:
    """Log-probabilities of a microbatch's scored tokens, `[R, S]`. Hidden states are gathered before the head."""
    hidden = decoder.apply({'params': params}, batch.tokens, batch.positions, batch.segment, batch.branch)
    hidden = jnp.take_along_axis(hidden, batch.source[..., None], axis=1)
    softcap = decoder.architecture.final_softcap
    return token_statistics(hidden, head_weight(params), batch.target, softcap=softcap, mesh=mesh).logps


def completions(policy: jax.Array, references: list[jax.Array], batch: Batch) -> tuple[Completion, Completion]:
    """Scored tokens `[R, S]` of policy and K references -> chosen and rejected Completions of B = R * P pairs."""

    def side(places):
        rows, pairs, tokens = places.place.shape

        def pick(logps):
            picked = jnp.take_along_axis(logps, places.place.reshape(rows, -1), axis=1)
            return picked.reshape(rows * pairs, tokens)

        none = jnp.zeros((0, rows * pairs, tokens))
        reference_logps = jnp.stack([pick(logps) for logps in references]) if references else none
        weights = places.weights.reshape(rows * pairs, tokens)
        return Completion(pick(policy), jax.lax.stop_gradient(reference_logps), weights)

    return side(batch.chosen), side(batch.rejected)


def _sides(models: Models, params, reference_params, batch: Batch) -> tuple[Completion, Completion]:
    policy = scored_logps(models.policy, params, batch, models.mesh)
    references = [
        scored_logps(decoder, reference_params[name], batch, models.mesh) for name, decoder in models.references.items()
    ]
    return completions(policy, references, batch)


def _counts(batch: Batch) -> dict[str, jax.Array]:
    """Pairs and chosen tokens of the whole step, at least 1."""
    return {
        'pairs': jnp.maximum(batch.pair_weight.sum(), 1.0),
        'tokens': jnp.maximum(batch.chosen.weights.sum(), 1.0),
    }


def make_train_step(
    models: Models, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch, dict[str, Any]], tuple[TrainState, Metrics]]:
    """The step `(state, batch [A, R, ...], settings) -> (state, metrics)`, to be jitted with the state donated.

    `settings` are traced: `learning_rate` (a scalar) and `objective` (as `Objective.hyperparameters`). A loss or
    gradient that is not finite changes neither parameters nor optimizer, and metrics `finite` says 0.
    """

    def loss(params, reference_params, microbatch, counts, hyperparameters):
        chosen, rejected = _sides(models, params, reference_params, microbatch)
        weight = microbatch.pair_weight.reshape(-1)
        return objectives.evaluate(objective, hyperparameters, chosen, rejected, weight, counts)

    def train_step(state, batch, settings):
        counts = _counts(batch)

        def part(microbatch):
            given = (state.params, state.reference_params, microbatch, counts, settings['objective'])
            return jax.grad(loss, has_aux=True)(*given)

        gradient, metrics = _sum_over_microbatches(part, batch)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics['loss'])
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: p - settings['learning_rate'] * u, state.params, updates)

        def keep_if_broken(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        state = state.replace(
            step=state.step + 1,
            params=keep_if_broken(params, state.params),
            opt_state=keep_if_broken(opt_state, state.opt_state),
        )
        extra = {'grad_norm': norm, 'finite': finite}
        return state, {**metrics, **extra, 'learning_rate': settings['learning_rate']}

    return train_step


def make_eval_step(models: Models, objective: Objective) -> Callable[..., Metrics]:
    """The step `(params, reference_params, batch [A, R, ...], hyperparameters, counts) -> metrics`, without gradients.

    `counts` are the `pairs` and chosen `tokens` of the whole evaluation: its batches' metrics add up to its means.
    """

    def eval_step(params, reference_params, batch, hyperparameters, counts):
        def part(microbatch):
            chosen, rejected = _sides(models, params, reference_params, microbatch)
            weight = microbatch.pair_weight.reshape(-1)
            return objectives.evaluate(objective, hyperparameters, chosen, rejected, weight, counts)[1]

        return _sum_over_microbatches(part, batch)

    return eval_step


def make_score_step(models: Models) -> Callable[..., dict[str, jax.Array]]:
    """The step `(params, reference_params, batch [A, R, ...]) -> log-ratios`, for a run with one reference.

    log pi - log pi_ref of each `chosen` and `rejected` completion, `[A, R * P]`, nats; 0 for empty slots.
    """

    def score_step(params, reference_params, batch):
        def part(microbatch):
            chosen, rejected = _sides(models, params, reference_params, microbatch)
            return {'chosen': scores.log_ratio(chosen), 'rejected': scores.log_ratio(rejected)}

        return jax.lax.map(part, batch)

    return score_step


def _sum_over_microbatches(part, batch: Batch):
    """Sum of `part(microbatch)` over the leading axis of a batch, one microbatch at a time."""
    first = jax.tree.map(lambda x: x[0], batch)
    if batch.tokens.shape[0] == 1:
        return part(first)
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(part, first))

    def add(total, microbatch):
        return jax.tree.map(jnp.add, total, part(microbatch)), None

    return jax.lax.scan(add, nothing, batch)[0]
