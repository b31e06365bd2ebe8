"""What every loss agrees to: an example with all that it needs, and how a step calls it on that."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo.losses.registry import Loss, Needs
from jaxpo.types import Completion

LENGTHS = {'chosen': (5, 2, 7, 1), 'rejected': (3, 6, 1, 7)}
PAIRS, TOKENS, LAYERS, WIDTH, VOCABULARY, REFERENCES = 4, 7, 3, 5, 50, 3
DIFFERENTIATED = ('policy_logps', 'forward_kl', 'reverse_kl', 'entropy', 'log_sum_squares', 'masks')


@dataclasses.dataclass(frozen=True)
class Example:
    """Random pairs with all that a loss needs, and the loss's own parts."""

    chosen: Completion
    rejected: Completion
    extra: dict[str, Any]
    """`state`, `params` and `key` where the loss has them."""


def settings(entry: Loss) -> Iterator[dict[str, Any]]:
    """The defaults, then each hyperparameter changed in turn: numbers by half, words to every other choice."""
    hints = typing.get_type_hints(entry.function)
    yield {}
    for name, default in entry.defaults.items():
        words = tuple(entry.parts.get(name, ())) or typing.get_args(hints.get(name))
        for value in words or (default * 1.5 or 0.25,):
            if value != default:
                yield {name: value}


def example(entry: Loss, given: dict[str, Any], seed: int = 0, dtype: Any = jnp.float64) -> Example:
    """Four pairs of unequal lengths, with everything the loss needs under the hyperparameters `given`.

    There is one reference, or three with mixing weights for a loss that reads many.
    """
    needs = entry.needs_of(given)
    random = np.random.default_rng(seed)
    margins = {name: jnp.asarray(random.uniform(0.2, 1.5, PAIRS), dtype) for name in needs.pair_columns}
    sides = [
        _completion(random, LENGTHS['chosen'], needs, margins, dtype),
        _completion(random, LENGTHS['rejected'], dataclasses.replace(needs, companions=()), margins, dtype),
    ]
    # Likelier under the policy than under the reference: kto's baseline is stopped at 0 where it is not.
    for name, other in sides[0].companions.items():
        sides[0].companions[name] = other.replace(policy_logps=other.policy_logps / 4)
    # A completion column is higher for the chosen side, as a score is; odpo has no loss where it is not.
    for name in needs.completion_columns:
        sides[0].columns[name] = sides[1].columns[name] + jnp.asarray(random.uniform(0.2, 0.5, PAIRS), dtype)
    if entry.many_references:
        sides = _with_many_references(random, *sides)
    extra, key = {}, jax.random.key(seed)
    if entry.init_state is not None:
        extra['state'] = jax.tree.map(lambda x: jnp.asarray(x, dtype) + jnp.asarray(0.3, dtype), entry.init_state())
    if entry.init_params is not None:
        params = entry.init_params(key, layers=LAYERS, width=WIDTH, **entry.choices(given))
        extra['params'] = jax.tree.map(
            lambda x: jnp.asarray(x, dtype) + jnp.asarray(random.uniform(0.05, 0.3, x.shape), dtype), params
        )
    extra['key'] = key
    if entry.token_masks is not None:
        sides = [_masked(entry, extra['params'], side, random, dtype) for side in sides]
    return Example(*sides, extra)


def _completion(random, lengths, needs: Needs, margins, dtype) -> Completion:
    weights = np.array([[float(token < length) for token in range(TOKENS)] for length in lengths])
    by_token = (PAIRS, TOKENS)

    def array(values):
        return jnp.asarray(values, dtype)

    def positive(*shape):
        return array(random.exponential(0.3, shape))

    policy, reference = -random.exponential(1.5, (2, *by_token))
    statistics: dict[str, Any] = {
        'forward_kl': positive(*by_token),
        'reverse_kl': positive(*by_token),
        'entropy': array(random.uniform(0.1, np.log(VOCABULARY), by_token)),
        'reference_entropy': array(random.uniform(0.1, np.log(VOCABULARY), by_token)),
        'log_sum_squares': array(-random.exponential(1.0, by_token)),
        'activations': {kind: array(random.normal(size=(2, *by_token))) for kind in ('mlp', 'residual')},
        'prompt_hidden': array(random.normal(size=(PAIRS, WIDTH))),
    }
    roles = {role: array(-random.exponential(1.5, by_token)) for role in needs.models}
    columns = {name: array(random.uniform(0.1, 0.45, PAIRS)) for name in needs.completion_columns}
    columns |= {name: array(random.integers(0, 3, by_token) * 0.5) for name in needs.token_columns}
    return Completion(
        array(policy),
        array(reference)[None],
        array(weights),
        **{name: statistics[name] for name in needs.statistics},
        columns=columns | margins,
        model_logps=roles,
        companions={name: _completion(random, lengths, Needs(), {}, dtype) for name in needs.companions},
        vocabulary=VOCABULARY,
    )


def _with_many_references(random, chosen: Completion, rejected: Completion) -> list[Completion]:
    """Both sides with further references, and the pair's weights of all."""

    def more(side):
        logps = -random.exponential(1.5, (REFERENCES - 1, PAIRS, TOKENS))
        logps = jnp.concatenate([side.reference_logps, jnp.asarray(logps, side.weights.dtype)])
        return side.replace(reference_logps=logps, mixing_weights=weights)

    weights = jnp.asarray(random.dirichlet(np.ones(REFERENCES), PAIRS).T, chosen.weights.dtype)
    return [more(side) for side in (chosen, rejected)]


def _masked(entry: Loss, params, side: Completion, random, dtype) -> Completion:
    hidden = jnp.asarray(random.normal(size=(LAYERS, PAIRS * TOKENS, WIDTH)), dtype)
    masks = entry.token_masks(params, hidden)
    return side.replace(masks={name: mask.reshape(PAIRS, TOKENS) for name, mask in masks.items()})


def losses_of(entry: Loss, sample: Example, given: dict[str, Any]):
    """The losses `[B]` and Rewards of an example, its running state updated first, as a training step does."""
    hyperparameters, extra = entry.hyperparameters(given), dict(sample.extra)
    if entry.init_state is not None:
        sides = jax.lax.stop_gradient((sample.chosen, sample.rejected))
        extra['state'] = entry.updated(extra['state'], *sides, **hyperparameters)
    return entry(sample.chosen, sample.rejected, **extra, **hyperparameters)


def with_noise_at_padding(side: Completion) -> Completion:
    """All that stands by token, overwritten where the weight is 0."""
    shape = side.weights.shape

    def noise(values):
        if values.ndim < 2 or values.shape[-2:] != shape:
            return values
        return jnp.where(side.weights.reshape((1,) * (values.ndim - 2) + shape) > 0, values, -3e2)

    others = {name: with_noise_at_padding(other) for name, other in side.companions.items()}
    return jax.tree.map(noise, side.replace(companions={})).replace(weights=side.weights, companions=others)


def with_an_empty_slot(side: Completion) -> Completion:
    """One more pair, all zeros."""

    def append(values):
        axis = values.shape.index(PAIRS)
        return jnp.concatenate([values, jnp.zeros_like(jax.lax.slice_in_dim(values, 0, 1, axis=axis))], axis=axis)

    return jax.tree.map(append, side)


def _bent(values: jax.Array) -> jax.Array:
    """Of other sizes and, for a column that only marks tokens, at other places."""
    return values[..., ::-1] * jnp.linspace(1.1, 1.9, values.shape[-1]).reshape((1,) * (values.ndim - 1) + (-1,))


def with_bent_field(side: Completion, name: str) -> Completion:
    """Another value in one field."""
    return side.replace(**{name: jax.tree.map(_bent, getattr(side, name))})


def with_bent_entry(side: Completion, group: str, name: str) -> Completion:
    """Another value under one name of `columns`, `model_logps` or `companions`, where it is there."""
    held = dict(getattr(side, group))
    if name in held:
        other = held[name]
        held[name] = other.replace(policy_logps=_bent(other.policy_logps)) if group == 'companions' else _bent(other)
    return side.replace(**{group: held})


def total(entry: Loss, sample: Example, given: dict[str, Any], weights: jax.Array | None = None) -> jax.Array:
    """The sum of an example's losses, weighted where `weights [B]` are given."""
    values, _ = losses_of(entry, sample, given)
    return values.sum() if weights is None else (values * weights).sum()


def replaced(sample: Example, chosen: Completion, rejected: Completion) -> Example:
    """The example with other completions."""
    return dataclasses.replace(sample, chosen=chosen, rejected=rejected)


def value_and_gradient(entry: Loss, sample: Example, weights: jax.Array | None = None):
    """The sum of losses, and its gradients by both completions."""

    def function(chosen, rejected):
        return total(entry, replaced(sample, chosen, rejected), {}, weights)

    return jax.value_and_grad(function, argnums=(0, 1))(sample.chosen, sample.rejected)


def everything(entry: Loss, sample: Example) -> np.ndarray:
    """The loss and all of its gradients, as one vector."""
    value, gradients = value_and_gradient(entry, sample)
    return np.concatenate([np.ravel(value), *(np.ravel(leaf) for leaf in jax.tree.leaves(gradients))])


def fields(side: Completion) -> dict[str, jax.Array]:
    """Arrays by token that a loss is differentiated by, by name."""
    held = {name: getattr(side, name) for name in DIFFERENTIATED if name != 'masks'}
    held |= {f'masks/{name}': mask for name, mask in side.masks.items()}
    return {name: values for name, values in held.items() if values is not None}


def differentiated(sample: Example) -> list[dict[str, Any]]:
    """All that a loss is differentiated by, of chosen and rejected."""
    return [{name: getattr(side, name) for name in DIFFERENTIATED} for side in (sample.chosen, sample.rejected)]


def with_differentiated(sample: Example, values: list[dict[str, Any]]) -> Example:
    """The example with other values of what a loss is differentiated by."""
    sides = [side.replace(**held) for side, held in zip((sample.chosen, sample.rejected), values)]
    return replaced(sample, *sides)
