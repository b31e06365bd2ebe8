"""A microbatch of rows -> its chosen and rejected Completions: models run, statistics gathered, everything once.

Only what the objective's losses ask for is computed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpo.logps import Reference, token_statistics
from jaxpo.models.activations import apply_collecting
from jaxpo.models.decoder import Decoder, head_weight
from jaxpo.objective import Objective
from jaxpo.types import Batch, Completion, Places, TokenStatistics

POLICY_STATISTICS = ('forward_kl', 'reverse_kl', 'entropy', 'log_sum_squares')


@dataclasses.dataclass(frozen=True)
class Models:
    """How to compute hidden states of the policy and of each frozen model, and on which mesh (None: one device)."""

    policy: Decoder
    references: Mapping[str, Decoder]
    mesh: Mesh | None


class Frozen(NamedTuple):
    """One frozen model on a microbatch."""

    hidden: jax.Array  # [R, S, D]: states that predict the scored tokens
    statistics: TokenStatistics  # [R, S]
    layers: jax.Array | None  # [L, R, S, D]: states behind each layer, where masks are made of them
    activations: dict[str, jax.Array]  # kind -> [N, R, S]


class Scored(NamedTuple):
    """All that is known of a microbatch's scored tokens, `[R, S]`, `[N, R, S]` for activations."""

    policy: TokenStatistics
    references: list[jax.Array]
    models: dict[str, jax.Array]
    reference_entropy: jax.Array | None
    activations: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    prompt_hidden: jax.Array | None  # [R, P, D]
    vocabulary: int


def sides(
    models: Models, objective: Objective, trained: dict[str, Any], reference_params, batch: Batch
) -> tuple[Completion, Completion]:
    """Chosen and rejected Completions of a microbatch's B = R * P pairs, with what the objective's losses need.

    Args:
      trained: as `TrainState.trained`: the policy, and the parts of methods.
    """
    return completions(scored(models, objective, trained, reference_params, batch), batch)


def log_probabilities(models: Models, params, reference_params, batch: Batch) -> tuple[Completion, Completion]:
    """Completions of a microbatch with log-probabilities alone, under policy and every one of `reference_params`."""
    logps = [_logps(models.references[name], held, batch, models.mesh) for name, held in reference_params.items()]
    policy = TokenStatistics(_logps(models.policy, params, batch, models.mesh))
    bare = batch.replace(columns={}, companions={})
    return completions(Scored(policy, logps, {}, None, {}, {}, None, head_weight(params).shape[0]), bare)


def _logps(decoder: Decoder, params, batch: Batch, mesh: Mesh | None) -> jax.Array:
    """Log-probabilities `[R, S]` of a microbatch's scored tokens."""
    hidden, softcap = _states(decoder, params, batch), decoder.architecture.final_softcap
    return token_statistics(hidden, head_weight(params), batch.target, softcap=softcap, mesh=mesh).logps


def scored(models: Models, objective: Objective, trained: dict[str, Any], reference_params, batch: Batch) -> Scored:
    """What the models say of a microbatch's scored tokens."""
    asked = set(objective.needs.statistics)
    references = objective.references if objective.runs_references else ()
    first = references[0] if references else None
    frozen = {}
    for name in (*references, *objective.models):
        # What else is asked of frozen models is asked of the reference that the policy is measured against.
        more = asked if name == first else set()
        masks = bool(objective.token_masks) and name == first
        decoder, params = models.references[name], reference_params[name]
        frozen[name] = _frozen(decoder, params, batch, models.mesh, more, masks=masks)
    hidden, head = _states(models.policy, trained['policy'], batch), head_weight(trained['policy'])
    reference = None
    if asked & {'forward_kl', 'reverse_kl'}:
        softcap = models.references[first].architecture.final_softcap
        reference = Reference(frozen[first].hidden, head_weight(reference_params[first]), softcap)
    policy = token_statistics(
        hidden,
        head,
        batch.target,
        statistics=tuple(name for name in POLICY_STATISTICS if name in asked),
        reference=reference,
        softcap=models.policy.architecture.final_softcap,
        mesh=models.mesh,
    )
    return Scored(
        policy,
        [frozen[name].statistics.logps for name in references],
        {name: frozen[name].statistics.logps for name in objective.models},
        frozen[first].statistics.entropy if 'reference_entropy' in asked else None,
        frozen[first].activations if 'activations' in asked else {},
        _masks(objective.token_masks, trained['method'], frozen[first].layers) if objective.token_masks else {},
        _prompt_hidden(hidden, batch) if 'prompt_hidden' in asked else None,
        head.shape[0],
    )


def _states(decoder: Decoder, params, batch: Batch) -> jax.Array:
    """`[R, S, D]`: the hidden states that predict the scored tokens, gathered before the head."""
    hidden = decoder.apply({'params': params}, batch.tokens, batch.positions, batch.segment, batch.branch)
    return _at_source(hidden, batch)


def _at_source(hidden: jax.Array, batch: Batch) -> jax.Array:
    """`[R, T, D] -> [R, S, D]`."""
    return jnp.take_along_axis(hidden, batch.source[..., None], axis=1)


def _frozen(decoder: Decoder, params, batch: Batch, mesh: Mesh | None, asked: set[str], *, masks: bool) -> Frozen:
    """One frozen model, with those statistics in `asked` that are its own, and its layers' states for `masks`."""
    params, activations = jax.lax.stop_gradient(params), 'activations' in asked
    if not masks and not activations:
        hidden, layers, means = _states(decoder, params, batch), None, {}
    else:
        rows = (batch.tokens, batch.positions, batch.segment, batch.branch)
        hidden, collected = apply_collecting(decoder, params, *rows, hidden_states=masks, activations=activations)
        hidden = _at_source(hidden, batch)
        layers = jax.vmap(_at_source, (0, None))(collected.hidden_states, batch) if masks else None
        means = {
            kind: jax.vmap(_at_source, (0, None))(values[..., None], batch)[..., 0]
            for kind, values in collected.activations.items()
        }
    wanted = {'entropy': 'reference_entropy' in asked, 'mean_logit': activations}
    statistics = token_statistics(
        hidden,
        head_weight(params),
        batch.target,
        statistics=tuple(name for name, is_asked in wanted.items() if is_asked),
        softcap=decoder.architecture.final_softcap,
        mesh=mesh,
    )
    if activations:
        means['logits'] = statistics.mean_logit[None]
    return jax.lax.stop_gradient(Frozen(hidden, statistics, layers, means))


def _masks(token_masks: Mapping[str, Callable], params: dict[str, Any], layers: jax.Array) -> dict[str, jax.Array]:
    """Token masks `[R, S]` by name, made of the reference's hidden states behind each layer."""
    flat = layers.reshape(layers.shape[0], -1, layers.shape[-1])
    ((loss, make),) = token_masks.items()
    return {name: mask.reshape(layers.shape[1:3]) for name, mask in make(params[loss], flat).items()}


def _prompt_hidden(hidden: jax.Array, batch: Batch) -> jax.Array:
    """`[R, P, D]`: the policy's state at the last token of each pair's prompt, which predicts a first token."""
    chosen_there = batch.chosen.weights[..., 0] > 0
    place = jnp.where(chosen_there, batch.chosen.place[..., 0], batch.rejected.place[..., 0])
    return jax.lax.stop_gradient(jnp.take_along_axis(hidden, place[..., None], axis=1).astype(jnp.float32))


def completions(scored: Scored, batch: Batch) -> tuple[Completion, Completion]:
    """Scored tokens of a microbatch -> chosen and rejected Completions of B = R * P pairs."""
    companions = {name: _completion(_log_probabilities(scored), places) for name, places in batch.companions.items()}
    chosen, rejected = (_completion(scored, places) for places in (batch.chosen, batch.rejected))
    return (
        chosen.replace(columns=_columns(batch, 'chosen_'), companions=companions),
        rejected.replace(columns=_columns(batch, 'rejected_')),
    )


def _log_probabilities(scored: Scored) -> Scored:
    """Of scored tokens, the log-probabilities alone: all that is read of a companion."""
    return Scored(TokenStatistics(scored.policy.logps), scored.references, {}, None, {}, {}, None, scored.vocabulary)


def _completion(scored: Scored, places: Places) -> Completion:
    rows, pairs, tokens = places.place.shape
    weights = places.weights.reshape(rows * pairs, tokens)

    def pick(values):
        """`[R, S] -> [B, C]`, 0 where weightless."""
        if values is None:
            return None
        picked = jnp.take_along_axis(values, places.place.reshape(rows, -1), axis=1).reshape(rows * pairs, tokens)
        return jnp.where(weights > 0, picked, 0.0)

    references = jnp.zeros((0, rows * pairs, tokens))
    if scored.references:
        references = jnp.stack([pick(logps) for logps in scored.references])
    return Completion(
        pick(scored.policy.logps),
        references,
        weights,
        **{name: pick(getattr(scored.policy, name)) for name in POLICY_STATISTICS},
        reference_entropy=pick(scored.reference_entropy),
        model_logps={name: pick(logps) for name, logps in scored.models.items()},
        activations={kind: jax.vmap(pick)(values) for kind, values in scored.activations.items()},
        masks={name: pick(mask) for name, mask in scored.masks.items()},
        prompt_hidden=None if scored.prompt_hidden is None else scored.prompt_hidden.reshape(rows * pairs, -1),
        vocabulary=scored.vocabulary,
    )


def _columns(batch: Batch, prefix: str) -> dict[str, jax.Array]:
    """Columns of one side, or of the pair, by the name a loss knows: `[B]`, or `[B, C]` by token."""
    other = {'chosen_': 'rejected_', 'rejected_': 'chosen_'}[prefix]
    return {
        name.removeprefix(prefix): values.reshape(-1, *values.shape[2:])
        for name, values in batch.columns.items()
        if not name.startswith(other)
    }


def merged(parts: Completion) -> Completion:
    """Completions stacked by microbatch `[A, ..., B, ...]` -> one of A * B pairs."""

    def merge(stacked: jax.Array, leading: int) -> jax.Array:
        """`leading`: axes between that of microbatches and that of pairs."""
        moved = jnp.moveaxis(stacked, 0, leading)
        return moved.reshape(*moved.shape[:leading], -1, *moved.shape[leading + 2 :])

    fields = {
        'reference_logps': merge(parts.reference_logps, 1),
        'activations': {kind: merge(values, 1) for kind, values in parts.activations.items()},
        'companions': {name: merged(companion) for name, companion in parts.companions.items()},
    }
    bare = parts.replace(reference_logps=None, activations={}, companions={})
    return jax.tree.map(lambda stacked: merge(stacked, 0), bare).replace(**fields)
