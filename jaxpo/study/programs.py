"""The jitted programs of a study: a training step and a measurement, of one cell on its mesh or of many side by side.

Many cells lie on a leading axis of their states, batches and settings, which is split over the mesh axis `cell`; what
they share (a frozen base, references) is there once on each device. A device computes `lanes` of its cells at once and
the others in turn. No device waits for another: their programs do not communicate.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpo import objective as objectives
from jaxpo import sharding, step
from jaxpo.completions import merged
from jaxpo.loading import abstract_state
from jaxpo.losses import scores
from jaxpo.objective import Objective
from jaxpo.run import Run
from jaxpo.scoring import Models, fetched, sides
from jaxpo.state import TrainState
from jaxpo.types import Batch

CELL = 'cell'
SHARED = ('reference_params', 'base_params')
NAMES = ('train_cells', 'measure_cells', 'train_cell', 'measure_cell')
"""Of the programs, as the compiler calls them."""


class Programs(NamedTuple):
    """A step and a measurement of n cells, and how what they read is placed."""

    train: Callable[[TrainState, Batch, dict[str, Any]], tuple[TrainState, dict[str, jax.Array]]]
    """State, batch and settings of n cells to their state after a step, and metrics `[n]`."""
    measure: Callable[[TrainState, Batch, dict[str, Any]], dict[str, jax.Array]]
    """State of n cells, one batch for all and their settings to numbers by pair, `[n, A * R * P]`."""
    place: Callable[[Any], Any]
    """What n cells have each, stacked on the host, to the devices."""
    place_shared: Callable[[Any], Any]
    """What all cells read, such as a batch to measure by, to the devices."""
    start_optimizer: Callable[[Any], Any]
    """The optimizer's state before the first step of what n cells train."""


def of_one(run: Run) -> Programs:
    """Programs of one cell on the run's own mesh, however its model is split; its metrics have a first axis of 1."""
    replicated = sharding.replicated(run.mesh)
    plain_train = step.make_train_step(run.models, run.objective, run.optimizer, run.averages)
    plain_measure = make_pair_step(run.models, run.objective)

    def train_cell(state, batch, settings):
        state, metrics = plain_train(state, batch, settings)
        return state, jax.tree.map(lambda metric: jnp.asarray(metric)[None], metrics)

    def measure_cell(state, batch, settings):
        return jax.tree.map(lambda values: values[None], plain_measure(state, batch, settings))

    def put(batch):
        return sharding.put(batch, run.mesh, sharding.MICROBATCHES)

    return Programs(
        jax.jit(train_cell, donate_argnums=0, out_shardings=(abstract_state(run)[1], replicated)),
        jax.jit(measure_cell, out_shardings=replicated),
        lambda stacked: put(jax.tree.map(lambda array: array[0], stacked)),
        put,
        jax.jit(run.optimizer.init, out_shardings=abstract_state(run)[1].opt_state),
    )


def of_many(run: Run, lanes: int | None, devices: Sequence[jax.Device] | None = None) -> Programs:
    """Programs of cells side by side on a mesh `cell` of all devices, each cell whole on one.

    Args:
      run: prepared for one device.
      lanes: see `Study.lanes`.
    """
    mesh = cell_mesh(devices)
    models = dataclasses.replace(run.models, mesh=None)
    train = step.make_train_step(models, run.objective, run.optimizer, run.averages)
    measure = make_pair_step(models, run.objective)
    lanes = lanes or (1 if mesh.devices.flat[0].platform == 'cpu' else None)

    def train_cells(state, batch, settings):
        def one(given):
            own, batch, settings = given
            new, metrics = train(own.replace(**shared), batch, settings)
            return new.replace(**nothing), metrics

        shared = {name: getattr(state, name) for name in SHARED}
        nothing = {name: {} for name in SHARED}
        own, metrics = _side_by_side(one, (state.replace(**nothing), batch, settings), lanes)
        return own.replace(**shared), metrics

    def measure_cells(state, batch, settings):
        def one(given):
            own, settings = given
            return measure(own.replace(**shared), batch, settings)

        shared = {name: getattr(state, name) for name in SHARED}
        own = state.replace(opt_state=(), **{name: {} for name in SHARED})
        return _side_by_side(one, (own, settings), lanes)

    each, same = P(CELL), P()
    parts = {field.name: same if field.name in SHARED else each for field in dataclasses.fields(TrainState)}
    states = TrainState(**parts)
    bare = states.replace(opt_state=P())
    return Programs(
        jax.jit(_mapped(train_cells, mesh, (states, each, each), (states, each)), donate_argnums=0),
        _without_optimizer(jax.jit(_mapped(measure_cells, mesh, (bare, same, each), each))),
        lambda stacked: sharding.put(stacked, mesh, each),
        lambda batch: sharding.put(batch, mesh, same),
        jax.jit(jax.vmap(run.optimizer.init), out_shardings=NamedSharding(mesh, each)),
    )


def cell_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, or those given, on one axis."""
    devices = jax.devices() if devices is None else devices
    return Mesh(np.array(devices), (CELL,), axis_types=(AxisType.Auto,))


def _mapped(function: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    mapped.__name__ = function.__name__
    return mapped


def _without_optimizer(measure: Callable) -> Callable:
    return lambda state, batch, settings: measure(state.replace(opt_state=()), batch, settings)


def _side_by_side(function: Callable, given, lanes: int | None):
    """`function` of each cell of this device: `lanes` of them at once."""
    count = len(jax.tree.leaves(given)[0])
    if lanes is None or lanes >= count:
        return jax.vmap(function)(given)
    return jax.lax.map(function, given, batch_size=lanes if lanes > 1 else None)


def make_pair_step(models: Models, objective: Objective) -> Callable[..., dict[str, jax.Array]]:
    """The step `(state, batch [A, R, ...], settings) -> numbers` by pair, each `[A * R * P]`, 0 where there is none.

    `loss`, `chosen_reward`, `rejected_reward` by the objective; `chosen_logps`, `rejected_logps` of the policy.
    """

    def pair_step(state, batch, settings):
        frozen = fetched(models, state.frozen)
        key = jax.random.fold_in(jax.random.key(settings['seed']), state.step)

        def numbers(pairs):
            parts = {'state': state.method_state, 'params': state.method_params, 'key': key}
            loss, rewards = objectives.by_pair(objective, settings['objective'], *pairs, **parts)
            chosen, rejected = (scores.logp(side) for side in pairs)
            found = {'chosen_reward': rewards.chosen, 'rejected_reward': rewards.rejected, 'loss': loss}
            return found | {'chosen_logps': chosen, 'rejected_logps': rejected}

        def score(microbatch):
            return sides(models, objective, state.trained, frozen, microbatch)

        if objective.couples_batch:
            return numbers(tuple(merged(side) for side in jax.lax.map(score, batch)))
        by_microbatch = jax.lax.map(lambda part: numbers(score(part)), batch)
        return jax.tree.map(lambda values: values.reshape(-1), by_microbatch)

    return pair_step
