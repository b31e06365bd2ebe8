"""The state of a run: its shapes on the mesh, and what is read into them from the models' sources."""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import objective as objectives
from jaxpo import sharding, state, step
from jaxpo.models import lora
from jaxpo.models.checkpoint import load_params
from jaxpo.models.decoder import abstract_params
from jaxpo.run import Run
from jaxpo.state import TrainState

_ADAPTER_KEY = 1  # of the run's seed: the random factor of a new adapter


def abstract_state(run: Run) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the TrainState, without making it. InputError where the mesh does not divide it."""

    def create():
        full = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract_params(run.pretrained.architecture)
        )
        params = fresh_adapter(run) if run.lora else full
        base = _frozen(full, run.dtype) if run.lora else {}
        references = {name: _abstract_reference(run, name) for name in run.held('own')}
        averages = dict.fromkeys(run.averages, params if run.lora else full)
        return state.create(params, references, run.optimizer, *init_method(run), base, averages)

    shapes = jax.eval_shape(create)
    shardings = sharding.parameter_shardings(shapes, run.mesh)
    in_host = {name: _in_host(tree) for name, tree in shardings.reference_params.items() if run.in_host(name)}
    shardings = shardings.replace(reference_params={**shardings.reference_params, **in_host})
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return placed, shardings


def jitted_train_step(run: Run):
    """The run's train step, as it is compiled: the state is donated and keeps its shardings, metrics are everywhere."""
    return jax.jit(
        step.make_train_step(run.models, run.objective, run.optimizer, run.averages),
        donate_argnums=0,
        out_shardings=(abstract_state(run)[1], sharding.replicated(run.mesh)),
    )


def _abstract_reference(run: Run, name: str):
    shapes = abstract_params(run.pretrained_of(name).architecture)
    return _frozen(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), run.dtype_of(name))


def _in_host(shardings):
    return jax.tree.map(lambda one: one.with_memory_kind('pinned_host'), shardings)


def fresh_adapter(run: Run) -> dict[str, Any]:
    """The adapter that the run starts with."""
    key = jax.random.fold_in(jax.random.key(run.config.train.seed), _ADAPTER_KEY)
    return lora.init_adapter(run.pretrained.architecture, run.lora, key)


def init_method(run: Run) -> tuple[dict, dict]:
    """What the objective keeps beside the policy, at step 0: running state and trained parts."""
    measured = run.objective.references
    read = run.pretrained_of(measured[0]) if measured and run.objective.token_masks else run.pretrained
    key, architecture = jax.random.key(run.config.train.seed), read.architecture
    params = objectives.init_params(run.objective, key, architecture.layers, architecture.width)
    return objectives.init_state(run.objective), params


def _frozen(params, dtype):
    """A copy with matrices in `dtype`. Vectors stay float32, as they are used: the copy computes the same."""

    def copy(leaf, matrix):
        return jnp.array(leaf, dtype if matrix else leaf.dtype, copy=True)

    return jax.tree.map(copy, params, state.matrices(params))


def load_weights(run: Run, name: str | None, shardings) -> dict[str, Any]:
    """float32 parameters of the policy (None) or a frozen model, from its source, its PEFT adapter merged in."""
    pretrained = run.pretrained if name is None else run.pretrained_of(name)
    adapter = run.adapter_of(name)
    return load_params(pretrained, shardings, run.config.train.seed, adapter=adapter and pathlib.Path(adapter))


def load_frozen(run: Run, name: str) -> dict[str, Any]:
    """Parameters of a frozen model, matrices in the dtype it is held in: a copy of their own, on the mesh."""
    shardings = sharding.parameter_shardings(abstract_params(run.pretrained_of(name).architecture), run.mesh)
    return jax.jit(functools.partial(_frozen, dtype=run.dtype_of(name)))(load_weights(run, name, shardings))


def load_unsaved(run: Run, policy: dict[str, Any] | None = None, *, references: bool = True) -> dict[str, Any]:
    """What no checkpoint holds of a TrainState: `reference_params` and, under an adapter, the policy's `base_params`.

    They are copies, so that a donated policy takes none of them along.

    Args:
      policy: its first weights, where they are in memory already.
      references: whether there is a use for them.
    """
    _, shardings = abstract_state(run)
    held = {}
    for name in run.held('own') if references else ():
        placed = shardings.reference_params[name]
        copies = policy is not None and run.copies_policy(name)
        source = policy if copies else load_weights(run, name, _on_device(placed))
        frozen = jax.jit(functools.partial(_frozen, dtype=run.dtype_of(name)))(source)
        held[name] = jax.device_put(frozen, placed) if run.in_host(name) else frozen
    base = {}
    if run.lora:
        source = load_weights(run, None, shardings.base_params) if policy is None else policy
        base = jax.jit(functools.partial(_frozen, dtype=run.dtype))(source)
    return {'reference_params': held, 'base_params': base}


def _on_device(shardings):
    return jax.tree.map(lambda one: one.with_memory_kind('device'), shardings)


def load_state(run: Run) -> TrainState:
    """The state at step 0, read from the models' sources into its shardings."""
    start, (_, shardings) = load_start(run), abstract_state(run)
    return start.replace(opt_state=jax.jit(run.optimizer.init, out_shardings=shardings.opt_state)(start.trained))


def load_start(run: Run, *, policy: dict[str, Any] | None = None, references: bool = True) -> TrainState:
    """The state at step 0 without its optimizer, as evaluation reads it; with the policy alone, as sampling does.

    Args:
      policy: its weights, where they are in memory already. They are copied.
      references: whether there is a use for them.
    """
    _, shardings = abstract_state(run)
    copy = jax.jit(lambda tree: jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), tree))
    held = policy
    if held is None:
        held = load_weights(run, None, shardings.base_params if run.lora else shardings.params)
    unsaved = load_unsaved(run, held, references=references)
    if run.lora:
        params = jax.jit(functools.partial(fresh_adapter, run), out_shardings=shardings.params)()
    else:
        params = held if policy is None else copy(held)
    averages = {name: copy(_first_average(run, name, params, shardings)) for name in run.averages if references}
    method_shardings = (shardings.method_state, shardings.method_params)
    method_state, method_params = jax.jit(functools.partial(init_method, run), out_shardings=method_shardings)()
    step = jax.device_put(np.zeros((), np.int32), shardings.step)
    state_ = TrainState(step, params, {}, (), method_state, method_params, average_params=averages)
    return state_.replace(**unsaved)


def _first_average(run: Run, name: str, params, shardings: TrainState):
    return params if run.copies_policy(name) else load_weights(run, name, shardings.average_params[name])
