"""Scored tokens of a microbatch -> Completions of its pairs: the models' numbers and those of tables, side by side."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpo.losses.parallel import by_pair
from jaxpo.types import Batch, Completion, Places, TokenStatistics

POLICY_STATISTICS = ('entropy', 'log_sum_squares')
DIVERGENCES = ('forward_kl', 'reverse_kl')


class Scored(NamedTuple):
    """All that is known of a microbatch's scored tokens, `[R, S]`, `[N, R, S]` for activations.

    Numbers of models that are read from a table are not here: the batch has them.
    """

    policy: TokenStatistics
    references: tuple[str, ...]
    roles: tuple[str, ...]
    logps: dict[str, jax.Array]  # by name, of references and models with a role
    by_reference: dict[str, dict[str, jax.Array]]  # statistic -> reference -> values
    activations: dict[str, jax.Array]
    masks: dict[str, jax.Array]
    prompt_hidden: jax.Array | None  # [R, P, D]
    vocabulary: int


def at_places(values: jax.Array, places: Places) -> jax.Array:
    """Numbers of scored tokens `[R, S]` -> those of one completion of each pair, `[R, P, C]`, 0 where weightless."""
    rows = values.shape[0]
    picked = jnp.take_along_axis(values, places.place.reshape(rows, -1), axis=1)
    return jnp.where(places.weights > 0, picked.reshape(places.place.shape), 0.0)


def completions(scored: Scored, batch: Batch) -> tuple[Completion, Completion]:
    """Scored tokens of a microbatch -> chosen and rejected Completions of B = R * P pairs."""
    bare = _log_probabilities(scored)
    companions = {
        name: _completion(bare, places, batch.table.get(name, {})) for name, places in batch.companions.items()
    }
    chosen = _completion(scored, batch.chosen, batch.table.get('chosen', {}))
    rejected = _completion(scored, batch.rejected, batch.table.get('rejected', {}))
    return (
        chosen.replace(columns=_columns(batch, 'chosen_'), companions=companions),
        rejected.replace(columns=_columns(batch, 'rejected_')),
    )


def _log_probabilities(scored: Scored) -> Scored:
    """Of scored tokens, the log-probabilities alone: all that is read of a companion."""
    policy = TokenStatistics(scored.policy.logps)
    return Scored(policy, scored.references, (), scored.logps, {}, {}, {}, None, scored.vocabulary)


def _completion(scored: Scored, places: Places, table: Mapping[str, Mapping[str, jax.Array]]) -> Completion:
    """One completion of each pair. `table`: reference -> statistic -> `[R, P, C]`, of those read from a table."""
    rows, pairs, tokens = places.place.shape
    weights = places.weights.reshape(rows * pairs, tokens)

    def pick(values):
        """`[R, S] -> [B, C]`, 0 where weightless."""
        return None if values is None else at_places(values, places).reshape(rows * pairs, tokens)

    def gather(live, statistic, names):
        """`[K, B, C]` of the models `names`: of what they said of the scored tokens, or of the table."""
        found = [
            pick(live[name]) if name in live else table[name][statistic].reshape(rows * pairs, tokens) for name in names
        ]
        return jax.lax.stop_gradient(jnp.stack(found)) if found else jnp.zeros((0, rows * pairs, tokens))

    by_reference = {
        name: jnp.stack([pick(live[reference]) for reference in scored.references])
        for name, live in scored.by_reference.items()
        if name in DIVERGENCES
    }
    if 'reference_entropy' in scored.by_reference:
        live = scored.by_reference['reference_entropy']
        by_reference['reference_entropy'] = gather(live, 'entropy', scored.references)
    completion = Completion(
        pick(scored.policy.logps),
        gather(scored.logps, 'logps', scored.references),
        weights,
        **{name: pick(getattr(scored.policy, name)) for name in POLICY_STATISTICS},
        by_reference=by_reference,
        reference_lengths=_lengths(scored.references, weights, table),
        model_logps=dict(zip(scored.roles, gather(scored.logps, 'logps', scored.roles))),
        activations={kind: jax.vmap(pick)(values) for kind, values in scored.activations.items()},
        masks={name: pick(mask) for name, mask in scored.masks.items()},
        prompt_hidden=None if scored.prompt_hidden is None else scored.prompt_hidden.reshape(rows * pairs, -1),
        vocabulary=scored.vocabulary,
    )
    return _alone(completion) if len(scored.references) == 1 else completion


def _lengths(references: tuple[str, ...], weights: jax.Array, table) -> jax.Array | None:
    """`[K, B]`: tokens of the completions by each reference's own tokenizer; None where all have the policy's."""
    if not any('length' in held for held in table.values()):
        return None
    own = weights.sum(axis=-1)
    return jnp.stack(
        [table[name]['length'].reshape(-1) if 'length' in table.get(name, {}) else own for name in references]
    )


def _alone(completion: Completion) -> Completion:
    """A completion with one reference, whose statistics need no mixture."""
    return completion.replace(by_reference={}, **{name: values[0] for name, values in completion.by_reference.items()})


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

    return by_pair(merge, parts)
