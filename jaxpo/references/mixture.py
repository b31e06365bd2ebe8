"""The objective's `mixture` entry: K references made one, in front of every loss, as data.

    {'mix': 'harmonic', 'weights': 'arwc', 'clip': 'adaptive', 'eps': 0.1, 'primary': 'initial'}

is MRPO's. Words are structural; numbers are traced, so that a new one compiles nothing.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxpo.config import Scalar
from jaxpo.errors import InputError, unknown
from jaxpo.losses import scores
from jaxpo.losses.registry import Range, check_number
from jaxpo.references import mixing, weighting
from jaxpo.references.weighting_registry import named
from jaxpo.types import Completion

_WORDS = {'mix': tuple(mixing.MIXES), 'clip': mixing.CLIPS, 'order': tuple(mixing.ORDERS)}
_DEFAULTS = {'mix': 'harmonic', 'weights': 'fixed', 'clip': 'none', 'order': 'paper'}
_EPS, _EPS_RANGE = 0.1, Range(0, 1, with_least=True, with_most=True)
_WEIGHT, _WEIGHT_RANGE = 1.0, Range(0, with_least=True)
_OWN_KEYS = (*_DEFAULTS, 'eps', 'primary')


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The structural choices of a mixture, hashable. Its numbers go beside it, traced."""

    references: tuple[str, ...]
    """Names, in the order of `Completion.reference_logps`."""
    mix: str
    weights: str
    clip: str
    order: str
    primary: int
    """Place among the references; 0 where nothing reads it."""
    words: tuple[tuple[str, Any], ...]
    """Structural hyperparameters of the weighting."""

    @property
    def observes(self) -> str:
        """What its weights are learned from: `nothing`, `validation`, `step` or `reward`."""
        return weighting.find(self.weights).observes


class Combined(NamedTuple):
    """A step's pairs with one reference, and with all of them."""

    chosen: Completion
    rejected: Completion
    many_chosen: Completion  # K references, clipped, and `mixing_weights`
    many_rejected: Completion
    weights: jax.Array  # [K, B]


def make(spec: Mapping[str, Scalar], references: Sequence[str]) -> tuple[Mixture, dict[str, float]]:
    """Checks a mixture and builds it.

    Args:
      spec: some of `mix`, `weights`, `clip`, `eps` (of a clip, 0 to 1), `primary` (a reference's name, the first by
        default, where a clip or the weighting reads it), `order` (of two references' harmonic mix), hyperparameters of
        the weighting and, where weights are fixed, references' names with their weights, at least 0.
      references: names, at least one.

    Returns:
      The mixture, and its numbers: `eps`, the weighting's, and `weight_of/NAME`.

    Raises:
      InputError: an unknown key or word, a value out of range, or a key that would have no effect.
    """
    values = spelled_out(spec, references)
    entry = weighting.find(values['weights'])
    _check_keys(spec, references, entry)
    _check_values(values, references, entry)
    words = {name: values[name] for name in entry.words}
    mixture = Mixture(
        tuple(references),
        values['mix'],
        values['weights'],
        values['clip'],
        values.get('order', _DEFAULTS['order']),
        tuple(references).index(values.get('primary', references[0])),
        tuple(sorted(words.items())),
    )
    numbers = {name: float(values[name]) for name in ('eps', *entry.defaults) if name in values and name not in words}
    if values['weights'] == 'fixed':
        numbers |= {f'weight_of/{name}': float(values[name]) for name in references}
    return mixture, numbers


def spelled_out(spec: Mapping[str, Scalar], references: Sequence[str]) -> dict[str, Scalar]:
    """The mixture with every default that applies filled in, so that each can be logged and overridden."""
    if not references:
        raise InputError('objective.mixture: there is no reference to mix: add one to `references`.')
    choices = {**_DEFAULTS, **spec}
    entry = weighting.find(choices['weights'])
    defaults = dict(entry.defaults)
    if choices['clip'] != 'none':
        defaults['eps'] = _EPS
    if choices['clip'] != 'none' or entry.reads_primary:
        defaults['primary'] = references[0]
    if choices['weights'] == 'fixed':
        defaults |= dict.fromkeys(references, _WEIGHT)
    if 'order' not in spec and not _has_order(choices['mix'], references):
        del choices['order']
    return {**choices, **defaults, **spec}


def _has_order(mix: Scalar, references: Sequence[str]) -> bool:
    return mix == 'harmonic' and len(references) == 2


def _check_keys(spec, references, entry: weighting.Weighting) -> None:
    known = {*_OWN_KEYS, *entry.defaults}
    taken = [name for name in references if name in known]
    if taken:
        raise InputError(
            f'objective.mixture: a reference is named {taken[0]!r}, which is a key of the mixture: rename it.'
        )
    if 'eps' in spec and spec.get('clip', 'none') == 'none':
        raise InputError('objective.mixture.eps is the size of a clip: add clip (adaptive or fixed), or drop eps.')
    if 'primary' in spec and spec.get('clip', 'none') == 'none' and not entry.reads_primary:
        raise InputError(
            f'objective.mixture.primary has no effect: no clip is around it, and the weights {entry.name} read none. '
            'Add clip (adaptive or fixed), or drop primary.'
        )
    for name in spec:
        if name in references and entry.name != 'fixed':
            raise InputError(
                f'objective.mixture.{name} is a fixed weight, but weights is {entry.name!r}: drop one of them.'
            )
        if name not in known and name not in references:
            raise unknown('key of objective.mixture', name, {*known, *(references if entry.name == 'fixed' else ())})


def _check_values(values, references, entry: weighting.Weighting) -> None:
    for name, words in _WORDS.items():
        if name in values and values[name] not in words:
            raise unknown(f'objective.mixture.{name}', str(values[name]), words)
    if 'primary' in values and values['primary'] not in references:
        raise unknown('objective.mixture.primary', str(values['primary']), references)
    if values.get('order') == 'official_code' and not _has_order(values['mix'], references):
        raise InputError(
            f'objective.mixture.order official_code is of the harmonic mix of two references, not of the '
            f'{values["mix"]} mix of {len(references)}: drop it.'
        )
    for name in entry.defaults:
        entry.check(name, values[name])
    if 'eps' in values:
        _check_number('eps', values['eps'], _EPS_RANGE)
    if entry.name == 'fixed':
        for name in references:
            _check_number(name, values[name], _WEIGHT_RANGE)
        if not any(values[name] for name in references):
            raise InputError('objective.mixture: every fixed weight is 0: give some reference a weight above 0.')


def _check_number(name: str, value: Any, allowed: Range) -> None:
    check_number(f'mixture.{name}', value)
    if value not in allowed:
        raise InputError(f'objective.mixture.{name} is {allowed}, not {value:g}.')


def init_state(mixture: Mixture) -> dict[str, jax.Array]:
    """What the weighting remembers, before anything was seen; empty where it remembers nothing."""
    function = weighting.find(mixture.weights).init_state
    if function is None:
        return {}
    return function(len(mixture.references), **named(function, dict(mixture.words)))


def combine(
    mixture: Mixture,
    numbers: Mapping[str, jax.Array],
    chosen: Completion,
    rejected: Completion,
    *,
    state: dict[str, jax.Array],
    key: jax.Array | None,
) -> Combined:
    """One reference of K, for each of B pairs: weights of the references as they are, the mix of them clipped.

    Companions are mixed as the pair is, with its weights; they have no partner, and are not clipped. A single reference
    stays as it is.

    Args:
      numbers: as `make` returns them, traced.
      chosen, rejected: K references each.
      state: as `init_state` and `update` return it.
      key: PRNG key of this step, the same for all of its parts; None in evaluation.
    """
    weights = _weights(mixture, numbers, chosen, rejected, state, key)
    if len(mixture.references) == 1:
        many = (side.replace(mixing_weights=weights) for side in (chosen, rejected))
        return Combined(chosen, rejected, *many, weights)
    shifts = _shifts(mixture, numbers, chosen, rejected)
    one = (_mixed(mixture, *side, weights) for side in zip((chosen, rejected), shifts))
    many = (
        mixing.moved(side, shift).replace(mixing_weights=weights) for side, shift in zip((chosen, rejected), shifts)
    )
    return Combined(*one, *many, weights)


def _shifts(mixture, numbers, chosen: Completion, rejected: Completion) -> tuple[jax.Array, jax.Array]:
    """By how much the clip moves each reference's log-probability of either completion, `[K, B]`, nats."""
    logps = [scores.reference_logps(side) for side in (chosen, rejected)]
    if mixture.clip == 'none':
        return tuple(map(jnp.zeros_like, logps))
    clipped = mixing.clipped(*logps, mixture.primary, numbers['eps'], mixture.clip == 'adaptive')
    return tuple(held - own for held, own in zip(clipped, logps))


def _mixed(mixture: Mixture, completion: Completion, shifts: jax.Array, weights: jax.Array) -> Completion:
    """With one reference, of references moved by `shifts` `[K, B]`; its companions likewise, of references as they are.

    The heaviest reference that all are measured from is the unmoved one.
    """
    apart = mixing.differences(completion, weights) + shifts
    difference = mixing.MIXES[mixture.mix](apart, mixing.ORDERS[mixture.order](weights))
    companions = {
        name: _mixed(mixture, other, jnp.zeros_like(shifts), weights) for name, other in completion.companions.items()
    }
    return mixing.mixed(completion, difference, weights).replace(companions=companions)


def _weights(mixture, numbers, chosen, rejected, state, key) -> jax.Array:
    keywords = {**numbers, **dict(mixture.words), 'state': state, 'key': key, 'primary': mixture.primary}
    if mixture.weights == 'fixed':
        keywords['given'] = jnp.stack([jnp.asarray(numbers[f'weight_of/{name}']) for name in mixture.references])
    function = weighting.find(mixture.weights).weights
    return jax.lax.stop_gradient(function(chosen, rejected, **named(function, keywords)))


def observe(
    mixture: Mixture,
    numbers: Mapping[str, jax.Array],
    chosen: Completion,
    rejected: Completion,
    *,
    state: dict[str, jax.Array],
) -> Any:
    """What the weighting learns of each pair, a pytree of `[..., B]`, whose means over the pairs that are there go to
    `update`; None where it learns nothing from pairs."""
    function = weighting.find(mixture.weights).observe
    if function is None:
        return None
    keywords = {**numbers, 'state': state, 'primary': mixture.primary}
    return jax.lax.stop_gradient(function(chosen, rejected, **named(function, keywords)))


def update(
    mixture: Mixture, numbers: Mapping[str, jax.Array], state: dict[str, jax.Array], means: Any
) -> dict[str, jax.Array]:
    """The state after validation, or after a step, by the means of what `observe` said; as it was where `observe` says
    nothing."""
    entry = weighting.find(mixture.weights)
    if entry.observe is None:
        return state
    return jax.lax.stop_gradient(entry.update(state, means, **named(entry.update, numbers)))


def rewarded(
    mixture: Mixture,
    numbers: Mapping[str, jax.Array],
    state: dict[str, jax.Array],
    key: jax.Array,
    reward: jax.Array | float,
) -> dict[str, jax.Array]:
    """The state after a step's reward, 0 to 1, for the reference that `combine` drew with this key; as it was where the
    weighting observes no reward."""
    entry = weighting.find(mixture.weights)
    if entry.observes != 'reward':
        return state
    keywords = {**numbers, 'key': key, 'primary': mixture.primary}
    return jax.lax.stop_gradient(entry.update(state, reward, **named(entry.update, keywords)))
