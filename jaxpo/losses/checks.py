"""What must hold of every loss, its own reference implementation aside: run by `jaxpo check`, and by the tests on all.

A check is a function of a loss: its docstring says what holds; it returns what it measured, or raises Broken. All
compute in float64 on `contract.example`, but where they say otherwise.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from jaxpo.losses.contract import (
    PAIRS,
    differentiated,
    everything,
    example,
    fields,
    losses_of,
    replaced,
    settings,
    total,
    value_and_gradient,
    with_an_empty_slot,
    with_bent_entry,
    with_bent_field,
    with_differentiated,
    with_noise_at_padding,
)
from jaxpo.losses.registry import Loss
from jaxpo.losses.stopped import held_still

STEP = 1e-6  # of central differences, nats


class Broken(Exception):
    """What does not hold, with the numbers that show it."""


def _demand(held: Any, message: str) -> None:
    if not held:
        raise Broken(message)


def _within(error: float) -> str:
    return f'to {error:.0e}' if error else 'exactly'


def finite_differences(entry: Loss) -> str:
    """The gradient is that of the loss: central differences agree, with what it stops the gradient of held still."""
    worst, cases = 0.0, list(settings(entry))
    for given in cases:
        sample = example(entry, given)
        flat, unflatten = jax.flatten_util.ravel_pytree(differentiated(sample))

        def function(vector, sample=sample, given=given, unflatten=unflatten):
            return total(entry, with_differentiated(sample, unflatten(vector)), given)

        nudges = STEP * jnp.eye(flat.size)
        ends = jax.jit(jax.vmap(held_still(function, flat)))(flat[None] + jnp.concatenate([nudges, -nudges]))
        slopes = (ends[: flat.size] - ends[flat.size :]) / (2 * STEP)
        gradient = jax.grad(function)(flat)
        error = float(jnp.abs(gradient - slopes).max() / jnp.maximum(jnp.abs(gradient).max(), 1.0))
        _demand(error < 1e-6, f'with {given or "the defaults"} the gradient is off by {error:.1e}')
        worst = max(worst, error)
    return f'{len(cases)} settings, largest relative error {worst:.1e}'


def padding_has_no_say(entry: Loss) -> str:
    """What stands at padding changes neither loss nor gradient, and gets no gradient."""
    sample = example(entry, {})
    sides = [with_noise_at_padding(side) for side in (sample.chosen, sample.rejected)]
    clean, noisy = value_and_gradient(entry, sample), value_and_gradient(entry, replaced(sample, *sides))
    _demand(clean[0] == noisy[0], f'the loss is {clean[0]} without and {noisy[0]} with noise at padding')
    for side, gradient in zip(sides, noisy[1]):
        for name, slopes in fields(gradient).items():
            _demand(not np.any(np.where(side.weights == 0, slopes, 0)), f'padding has a gradient by {name}')
    return 'exactly'


def an_empty_slot_has_no_say(entry: Loss) -> str:
    """A slot without a pair is finite, changes nothing and gets no gradient."""
    sample = example(entry, {})
    longer = [with_an_empty_slot(side) for side in (sample.chosen, sample.rejected)]
    weights = jnp.arange(PAIRS + 1) < PAIRS
    value, gradients = value_and_gradient(entry, replaced(sample, *longer), weights.astype(jnp.float64))
    whole, _ = value_and_gradient(entry, sample)
    error = abs(float(value - whole))
    _demand(error <= 1e-12 * max(1.0, abs(float(whole))), f'the other losses change by {error:.1e}')
    for gradient in gradients:
        _demand(jnp.isfinite(gradient.policy_logps).all(), 'a gradient is not finite')
        _demand(not np.any(gradient.policy_logps[PAIRS]), 'the empty slot has a gradient')
    return _within(error)


def a_missing_side_has_no_say(entry: Loss) -> str:
    """An unpaired row, where the loss takes them, is finite and its missing completion gets no gradient."""
    if not entry.takes_unpaired:
        return 'takes pairs only'
    sample = example(entry, {})
    for which in (0, 1):
        sides = [sample.chosen, sample.rejected]
        sides[which] = sides[which].replace(weights=sides[which].weights.at[1].set(0.0))
        value, gradients = value_and_gradient(entry, replaced(sample, *sides))
        _demand(jnp.isfinite(value), 'the loss is not finite')
        _demand(not np.any(gradients[which].policy_logps[1]), 'the missing completion has a gradient')
    return 'exactly'


def it_can_leave_the_reference(entry: Loss) -> str:
    """Where the policy is the reference, loss and gradient are finite, and the gradient is not zero."""
    sample = example(entry, {})
    sides = [
        side.replace(
            policy_logps=side.reference_logps[0],
            reference_logps=jnp.broadcast_to(side.reference_logps[:1], side.reference_logps.shape),
        )
        for side in (sample.chosen, sample.rejected)
    ]
    value, gradients = value_and_gradient(entry, replaced(sample, *sides))
    norm = jnp.sqrt(sum(jnp.square(gradient.policy_logps).sum() for gradient in gradients))
    _demand(jnp.isfinite(value) and jnp.isfinite(norm), f'the loss is {value}, the norm of its gradient {norm}')
    _demand(norm > 0, 'the gradient is zero')
    return f'loss {value / PAIRS:.4g} a pair'


def references_are_read_as_it_says(entry: Loss) -> str:
    """The loss changes with the reference's log-probabilities exactly if `reads_reference`."""
    sample = example(entry, {})
    other = sample.chosen.replace(reference_logps=sample.chosen.reference_logps * 1.3 - 0.5)
    changed = total(entry, sample, {}) != total(entry, replaced(sample, other, sample.rejected), {})
    says = entry.reads_reference_with({})
    _demand(changed == says, f'reads_reference is {says}, but the loss {"changes" if changed else "does not"}')
    if not entry.many_references:
        return 'read' if says else 'not read'
    for name in ('reference_logps', 'mixing_weights'):
        for k in range(len(getattr(sample.chosen, name))):
            bent = sample.chosen.replace(**{name: getattr(sample.chosen, name).at[k].multiply(1.3)})
            changed = total(entry, sample, {}) != total(entry, replaced(sample, bent, sample.rejected), {})
            _demand(changed, f'many_references is True, but the loss does not change with {name}[{k}]')
    return 'read, one by one, and their weights'


def pairs_are_coupled_as_it_says(entry: Loss) -> str:
    """A pair's loss depends on other pairs exactly if `couples_batch`."""
    sample = example(entry, {})
    only = jnp.eye(PAIRS)[1]
    before, gradients = value_and_gradient(entry, sample, only)

    def moved(side, shift):
        others = {name: moved(other, shift) for name, other in side.companions.items()}
        return side.replace(policy_logps=side.policy_logps.at[2].add(shift), companions=others)

    # One side alone, both ways: a mean of margins does not move with both sides, nor every rank one way.
    touched = any(
        total(entry, replaced(sample, moved(sample.chosen, shift), sample.rejected), {}, only) != before
        for shift in (-4.0, 4.0)
    )
    touched |= any(np.any(gradient.policy_logps[np.array([0, 2, 3])]) for gradient in gradients)
    _demand(
        touched == entry.couples_batch,
        f'couples_batch is {entry.couples_batch}, but other pairs {"have" if touched else "have no"} say',
    )
    return 'coupled' if touched else 'independent'


def what_it_needs_is_read(entry: Loss) -> str:
    """Every statistic, column, model and companion in `needs` changes the loss or its gradient."""
    sample, needs = example(entry, {}), entry.needs_of({})
    before = everything(entry, sample)
    names = [*needs.statistics, *(['masks'] if entry.token_masks else [])]
    changes: dict[str, Callable] = {name: lambda side, name=name: with_bent_field(side, name) for name in names}
    groups = {
        'columns': (*needs.pair_columns, *needs.completion_columns, *needs.token_columns),
        'companions': needs.companions,
    }
    for group, keys in groups.items():
        changes |= {key: lambda side, group=group, key=key: with_bent_entry(side, group, key) for key in keys}
    for role in sample.chosen.model_logps:
        changes[role] = lambda side, role=role: with_bent_entry(side, 'model_logps', role)
    for name, change in changes.items():
        after = everything(entry, replaced(sample, change(sample.chosen), change(sample.rejected)))
        _demand(not np.array_equal(before, after), f'{name} is needed, but changes nothing')
    return ', '.join(changes) or 'log-probabilities only'


def every_option_changes_something(entry: Loss) -> str:
    """Every hyperparameter has an effect."""
    names = []
    for given in settings(entry):
        if given:
            before, after = (losses_of(entry, example(entry, options), options)[0] for options in ({}, given))
            _demand(not np.allclose(before, after, rtol=1e-9, atol=0), f'{given} changes nothing')
            names += given
    return ', '.join(dict.fromkeys(names)) or 'it has none'


def extremes_stay_finite(entry: Loss) -> str:
    """Log-probabilities of 0 and of -10^4 nats a token give finite losses and gradients, in float32."""
    for scale in (0.0, 1e4):
        sample = example(entry, {}, dtype=jnp.float32)
        sides = [side.replace(policy_logps=side.policy_logps * scale) for side in (sample.chosen, sample.rejected)]
        value, gradients = value_and_gradient(entry, replaced(sample, *sides), jnp.ones(PAIRS, jnp.float32))
        _demand(jnp.isfinite(value), f'at {scale:g} times the log-probabilities the loss is {value}')
        for gradient in gradients:
            _demand(jnp.isfinite(gradient.policy_logps).all(), f'at {scale:g} times them a gradient is not finite')
    return 'finite'


def hyperparameters_are_traced(entry: Loss) -> str:
    """A new value compiles nothing, and many values at once (vmap) give what each gives alone."""
    sample = example(entry, {}, dtype=jnp.float32)
    numbers = {name: value for name, value in entry.defaults.items() if not isinstance(value, str)}
    if not numbers:
        return 'it has none'
    stacked = {name: jnp.array([value, value * 1.1, value * 1.2], jnp.float32) for name, value in numbers.items()}
    compiled = jax.jit(lambda numbers: losses_of(entry, sample, numbers)[0])
    together = jax.vmap(compiled)(stacked)
    singly = jnp.stack([compiled({name: values[i] for name, values in stacked.items()}) for i in range(3)])
    # One program for vmap's batched arguments, one for plain ones.
    _demand(compiled._cache_size() <= 2, 'it was compiled again for another value')
    error = float(jnp.abs(together - singly).max() / jnp.maximum(jnp.abs(singly).max(), 1.0))
    _demand(error < 1e-5, f'at once and one by one differ by {error:.1e}')
    return f'one compilation; at once as one by one {_within(error)}'


def shapes_are_as_agreed(entry: Loss) -> str:
    """One loss and two rewards a pair, in the inputs' dtype."""
    for dtype in (jnp.float32, jnp.float64):
        values, rewards = losses_of(entry, example(entry, {}, dtype=dtype), {})
        for what, array in (('losses', values), ('chosen', rewards.chosen), ('rejected', rewards.rejected)):
            _demand(array.shape == (PAIRS,), f'{what} has shape {array.shape}, not {(PAIRS,)}')
            _demand(array.dtype == dtype, f'{what} is {array.dtype} for inputs of {dtype.__name__}')
    return 'losses [B], rewards [B] and [B]'


def it_is_documented(entry: Loss) -> str:
    """A one-sentence summary, a formula, a source, and a word on every hyperparameter."""
    text = inspect.getdoc(entry.function) + ''.join(
        inspect.getdoc(function) or '' for table in entry.parts.values() for function in table.values()
    )
    _demand(entry.summary.endswith('.'), 'the first line is a sentence')
    _demand(entry.formula, 'the second paragraph is the formula')
    _demand(entry.source, 'the source is empty')
    missing = [name for name in entry.defaults if name not in text]
    _demand(not missing, f'nothing is said of {", ".join(missing)}')
    return entry.source


CHECKS = (
    finite_differences,
    padding_has_no_say,
    an_empty_slot_has_no_say,
    a_missing_side_has_no_say,
    it_can_leave_the_reference,
    references_are_read_as_it_says,
    pairs_are_coupled_as_it_says,
    what_it_needs_is_read,
    every_option_changes_something,
    extremes_stay_finite,
    hyperparameters_are_traced,
    shapes_are_as_agreed,
    it_is_documented,
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one check found."""

    statement: str
    held: bool
    found: str


def run(entry: Loss) -> Iterator[Verdict]:
    """Every check of a loss, in turn, in float64. An exception of the loss's own is a check that does not hold."""
    for check in CHECKS:
        statement = inspect.getdoc(check)
        with jax.enable_x64(True):
            try:
                yield Verdict(statement, True, check(entry))
            except Broken as broken:
                yield Verdict(statement, False, str(broken))
            except Exception as error:  # the loss is the user's: whatever it raises is the finding
                yield Verdict(statement, False, f'{type(error).__name__}: {error}')
