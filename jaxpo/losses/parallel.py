"""Losses inside programs that see a share of the pairs: `jax.pmap` and `jax.shard_map`.

Under `jax.jit` with NamedShardings a loss sees all pairs however they are split, and nothing here is needed. A program
that runs once for each device sees its own pairs only, which is not enough for a loss that sorts the pairs of a step
or takes means of them. With its data-parallel form a training loop of your own reads, for one loss:

    kernel = data_parallel(losses.find('kto'), 'devices')

    def step(params, share, pair_weight):
        def loss(params):
            chosen, rejected = completions_of(params, share)
            counts = objective.counts_of(*jax.lax.all_gather((chosen.weights, rejected.weights), 'devices', tiled=True))
            values, _ = kernel(chosen, rejected)
            return jax.lax.psum((values * pair_weight).sum() / counts[kernel.normaliser], 'devices')

        value, gradient = jax.value_and_grad(loss)(params)
        return value, jax.lax.pmean(gradient, 'devices')

    jax.pmap(step, 'devices', in_axes=(None, 0, 0))

Value and gradient are those of one device that holds all pairs, also where some devices have more empty slots than
others, which a mean of the devices' means would not be. The sum over devices is the last thing inside of what is
differentiated, and the mean of the gradients stands outside: under pmap, and under shard_map with `check_vma=False`, a
device's gradient is that of the sum of all devices' values by its own copy of the parameters; with `check_vma` it is
whole on each already, and the mean leaves it. By arrays that are split like the pairs, differentiate the device's own
sum, without psum or pmean.

An objective of several terms is `dataclasses.replace(objective, terms=...)` with the data-parallel form of each term's
loss; `objective.evaluate` gives the device's share of the value and of the metrics: psum both as above.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxpo.losses.registry import Loss

# Fields of a Completion that have references or activations before their pairs; everywhere else pairs come first.
_PAIRS_SECOND = ('reference_logps', 'by_reference', 'reference_lengths', 'mixing_weights', 'activations')


def by_pair(function: Callable[[jax.Array, int], Any], completions: Any) -> Any:
    """`function(array, axis of the pairs)` of each array of Completions or Rewards, in a tree as theirs."""

    def apply(path, array):
        field = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)][-1]
        return function(array, int(field in _PAIRS_SECOND))

    return jax.tree.map_with_path(apply, completions)


def data_parallel(loss: Loss, axis_name: str | tuple[str, ...]) -> Loss:
    """The loss for programs that run once for each device along `axis_name`, with B / n pairs of a step's B each.

    It is called as the loss is, with the device's own Completions, and returns the losses and Rewards of its own pairs
    `[B / n]`. All devices hold as many slots; fill with empty ones. Pairs are numbered in the order of the devices.
    What is not of pairs (`state`, `params`, `key`, hyperparameters) must be the same on all. `updated` returns the same
    state on all, after all pairs of the step. Losses that neither couple the batch nor draw run as they are; the
    others gather the Completions from all devices, and the gradient returns to the device that a pair lies on.

    Args:
      axis_name: the mapped axis, or those, major first, that the pairs are split over.
    """
    if not loss.couples_batch and 'key' not in inspect.signature(loss.function).parameters:
        return loss
    update = loss.update_state and _of_all_updated(loss.update_state, axis_name)
    return dataclasses.replace(loss, function=_of_all(loss.function, axis_name), update_state=update)


def _gathered(completions, axis_name):
    return by_pair(lambda array, axis: jax.lax.all_gather(array, axis_name, axis=axis, tiled=True), completions)


def _of_all(function, axis_name):
    @functools.wraps(function)
    def of_all(chosen, rejected, **given):
        def own(array, axis):
            size = array.shape[axis] // jax.lax.axis_size(axis_name)
            return jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index(axis_name) * size, size, axis)

        losses, rewards = function(*_gathered((chosen, rejected), axis_name), **given)
        return own(losses, 0), by_pair(own, rewards)

    return of_all


def _of_all_updated(update_state, axis_name):
    @functools.wraps(update_state)
    def updated(state, chosen, rejected, **given):
        new = update_state(state, *_gathered((chosen, rejected), axis_name), **given)
        # Equal already; only after a reduction does shard_map know it, and a maximum of equals rounds nothing.
        return jax.tree.map(lambda value: jax.lax.pmax(value, axis_name), jax.lax.stop_gradient(new))

    return updated
