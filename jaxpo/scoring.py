"""A microbatch of rows -> its chosen and rejected Completions: models run, statistics gathered, everything once.

Only what the objective's losses ask for is computed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpo.completions import DIVERGENCES, POLICY_STATISTICS, Scored, at_places, completions
from jaxpo.logps import Reference, token_statistics
from jaxpo.models.activations import apply_collecting
from jaxpo.models.decoder import Decoder, head_weight
from jaxpo.models.lora import combined
from jaxpo.objective import Objective
from jaxpo.types import Batch, Completion, TokenStatistics


@dataclasses.dataclass(frozen=True)
class FrozenModel:
    """A reference, or a model with a role of its own, and where its numbers come from."""

    decoder: Decoder
    weights: Literal['own', 'base', 'adapter', 'table']
    """A parameter set of its own; the policy's weights beneath its adapter; those under an adapter of its own; or none,
    as the batch brings its numbers."""
    memory: Literal['device', 'pinned_host'] = 'device'


@dataclasses.dataclass(frozen=True)
class Models:
    """How to compute hidden states of the policy and of each frozen model, and on which mesh (None: one device)."""

    policy: Decoder
    frozen: Mapping[str, FrozenModel]
    mesh: Mesh | None


class Frozen(NamedTuple):
    """One frozen model on a microbatch."""

    hidden: jax.Array  # [R, S, D]: states that predict the scored tokens
    statistics: TokenStatistics  # [R, S]
    layers: jax.Array | None  # [L, R, S, D]: states behind each layer, where masks are made of them
    activations: dict[str, jax.Array]  # kind -> [N, R, S]


def fetched(models: Models, frozen: dict[str, Any]) -> dict[str, Any]:
    """`TrainState.frozen` with all of it in the device's memory, for the length of a step."""

    def fetch(name, params):
        if models.frozen[name].memory == 'device':
            return params
        return jax.tree.map(lambda leaf: jax.device_put(leaf, jax.memory.Space.Device), params)

    return {**frozen, 'references': {name: fetch(name, held) for name, held in frozen['references'].items()}}


def sides(
    models: Models, objective: Objective, trained: dict[str, Any], frozen: dict[str, Any], batch: Batch
) -> tuple[Completion, Completion]:
    """Chosen and rejected Completions of a microbatch's B = R * P pairs, with what the objective's losses need.

    Args:
      trained: as `TrainState.trained`: the policy, and the parts of methods.
      frozen: as `TrainState.frozen`, on the device.
    """
    return completions(scored(models, objective, trained, frozen, batch), batch)


def log_probabilities(
    models: Models, references: tuple[str, ...], policy, frozen: dict[str, Any], batch: Batch
) -> tuple[Completion, Completion]:
    """Completions of a microbatch with log-probabilities alone, under the policy and those of `references`.

    None of these is read from a table.
    """
    params = combined(frozen['base'], policy)
    logps = {
        name: _logps(models.frozen[name].decoder, frozen_params(models, frozen, name), batch, models.mesh)
        for name in references
    }
    statistics = TokenStatistics(_logps(models.policy, params, batch, models.mesh))
    bare, vocabulary = batch.replace(columns={}, companions={}, table={}), models.policy.architecture.vocabulary
    return completions(Scored(statistics, references, (), logps, {}, {}, {}, None, vocabulary), bare)


def token_table(
    models: Models, reference: str, statistics: tuple[str, ...], frozen: dict[str, Any], batch: Batch
) -> dict[str, dict[str, jax.Array]]:
    """What a table holds of one reference: completion -> statistic of `TABLE_STATISTICS` -> `[R, P, C]` float32."""
    asked = {'reference_entropy'} if 'entropy' in statistics else set()
    params, decoder = frozen_params(models, frozen, reference), models.frozen[reference].decoder
    found = _frozen(decoder, params, batch, models.mesh, asked, masks=False).statistics
    places = {'chosen': batch.chosen, 'rejected': batch.rejected, **batch.companions}
    return {
        completion: {statistic: at_places(getattr(found, statistic), where) for statistic in statistics}
        for completion, where in places.items()
    }


def frozen_params(models: Models, frozen: dict[str, Any], name: str):
    """The whole parameter tree of a frozen model, which is not read from a table."""
    if models.frozen[name].weights == 'base':
        return frozen['base']
    held = frozen['references'][name]
    return combined(frozen['base'], held) if models.frozen[name].weights == 'adapter' else held


def _logps(decoder: Decoder, params, batch: Batch, mesh: Mesh | None) -> jax.Array:
    """Log-probabilities `[R, S]` of a microbatch's scored tokens."""
    hidden, head = _states(decoder, params, batch), head_weight(params)
    return token_statistics(hidden, head, batch.target, **_of_head(decoder, mesh)).logps


def _of_head(decoder: Decoder, mesh: Mesh | None) -> dict[str, Any]:
    """What `token_statistics` must know of a decoder's head."""
    architecture = decoder.architecture
    return {'softcap': architecture.final_softcap, 'vocabulary': architecture.vocabulary, 'mesh': mesh}


def scored(
    models: Models, objective: Objective, trained: dict[str, Any], frozen: dict[str, Any], batch: Batch
) -> Scored:
    """What the models say of a microbatch's scored tokens."""
    asked = set(objective.needs.statistics)
    references = objective.references if objective.runs_references else ()
    live = [name for name in (*references, *objective.models) if models.frozen[name].weights != 'table']
    params = {name: frozen_params(models, frozen, name) for name in live}
    found = {}
    for name in live:
        more = asked if name in references else set()
        # Masks and activations are those of the first reference: no mixture of them is defined.
        first = name == references[0] if references else False
        more = more if first else more - {'activations'}
        masks = bool(objective.token_masks) and first
        found[name] = _frozen(models.frozen[name].decoder, params[name], batch, models.mesh, more, masks=masks)
    policy = combined(frozen['base'], trained['policy'])
    hidden, head = _states(models.policy, policy, batch), head_weight(policy)
    statistics, divergences = _policy_statistics(models, references, params, found, hidden, head, batch, asked)
    entropies = {name: found[name].statistics.entropy for name in references if name in found}
    first = found[references[0]] if references and references[0] in found else None
    return Scored(
        statistics,
        references,
        objective.models,
        {name: found[name].statistics.logps for name in live},
        divergences | ({'reference_entropy': entropies} if 'reference_entropy' in asked else {}),
        first.activations if 'activations' in asked else {},
        _masks(objective.token_masks, trained['method'], first.layers) if objective.token_masks else {},
        _prompt_hidden(hidden, batch) if 'prompt_hidden' in asked else None,
        models.policy.architecture.vocabulary,
    )


def _policy_statistics(models: Models, references, params, found, hidden, head, batch: Batch, asked: set[str]):
    """The policy's statistics, and by name the divergences asked for between it and each reference."""
    own = tuple(name for name in POLICY_STATISTICS if name in asked)
    between = tuple(name for name in DIVERGENCES if name in asked)
    of_head = _of_head(models.policy, models.mesh)
    if not between:
        return token_statistics(hidden, head, batch.target, statistics=own, **of_head), {}
    divergences: dict[str, dict[str, jax.Array]] = {name: {} for name in between}
    policy = None
    for name in references:
        cap = models.frozen[name].decoder.architecture.final_softcap
        reference = Reference(found[name].hidden, head_weight(params[name]), cap)
        statistics = token_statistics(
            hidden,
            head,
            batch.target,
            statistics=(own if policy is None else ()) + between,
            reference=reference,
            **of_head,
        )
        policy = statistics if policy is None else policy
        for divergence in between:
            divergences[divergence][name] = getattr(statistics, divergence)
    return policy, divergences


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
        **_of_head(decoder, mesh),
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
