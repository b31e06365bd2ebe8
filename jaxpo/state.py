"""The training state: everything a step reads and changes."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from jaxpo import config


@flax.struct.dataclass
class TrainState:
    """Policy, frozen references and optimizer. References are read under stop_gradient and never written."""

    step: jax.Array  # [] int32: optimizer steps taken
    params: Any  # policy, float32
    reference_params: dict[str, Any]  # by name, matrices in the compute dtype; K = len(reference_params), may be 0
    opt_state: optax.OptState


def make_optimizer(settings: config.Optimizer) -> optax.GradientTransformation:
    """AdamW up to the learning rate, which the step applies: it is traced, so a new one compiles nothing."""
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm is not None else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon),
        optax.add_decayed_weights(settings.weight_decay, mask=matrices),
    )


def matrices(params):
    """True for leaves that weight decay applies to: matrices, not norms or biases (vectors, stacked over layers)."""

    def decayed(path, leaf):
        stacked = jax.tree_util.keystr(path, simple=True, separator='/').startswith('layers/')
        return leaf.ndim - stacked >= 2

    return jax.tree.map_with_path(decayed, params)


def learning_rate_schedule(settings: config.Optimizer, steps: int) -> optax.Schedule:
    """Warm-up from 0 to the peak, then decay to its final ratio at step `steps` (constant: none)."""
    peak, final = settings.learning_rate, settings.learning_rate * settings.final_learning_rate_ratio
    decay_steps = max(steps - settings.warmup_steps, 1)
    decay = {
        'constant': optax.constant_schedule(peak),
        'linear': optax.linear_schedule(peak, final, decay_steps),
        'cosine': optax.cosine_decay_schedule(peak, decay_steps, settings.final_learning_rate_ratio),
    }[settings.schedule]
    # The first of n warm-up steps takes 1/n of the peak: a step at rate 0 would be wasted.
    warmup = optax.linear_schedule(peak / max(settings.warmup_steps, 1), peak, max(settings.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, decay], [settings.warmup_steps])


def create(params, reference_params: dict[str, Any], optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0. No buffer may be shared between policy and references: the step donates the state."""
    return TrainState(jnp.zeros((), jnp.int32), params, reference_params, optimizer.init(params))
