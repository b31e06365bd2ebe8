"""The training state: everything a step reads and changes."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpo import config
from jaxpo.models.lora import combined


@flax.struct.dataclass
class TrainState:
    """Policy, frozen references and optimizer. References are read under stop_gradient and never written; averages that
    follow the policy are written, never differentiated."""

    step: jax.Array  # [] int32: optimizer steps taken
    params: Any  # what is trained of the policy, float32: all of it, or its adapter
    reference_params: dict[str, Any]  # by name: those that have weights of their own, in the dtype they are held in
    opt_state: optax.OptState  # of `trained`; empty in a state that is only evaluated
    method_state: dict[str, Any] = flax.struct.field(default_factory=dict)
    """Running state of the losses that have one (moments), by loss."""
    method_params: dict[str, Any] = flax.struct.field(default_factory=dict)
    """Trained parts of the losses that have them (masks, value heads), by loss; float32."""
    base_params: dict[str, Any] = flax.struct.field(default_factory=dict)
    """The policy's frozen weights beneath its adapter, matrices in the compute dtype; empty where all are trained."""
    average_params: dict[str, Any] = flax.struct.field(default_factory=dict)
    """References that follow the policy, by name, float32: trees as `params`."""

    @property
    def trained(self) -> dict[str, Any]:
        """What the optimizer changes: the policy, and the method's own parts."""
        return {'policy': self.params, 'method': self.method_params}

    @property
    def frozen(self) -> dict[str, Any]:
        """What no gradient reaches: the policy's `base`, and the parameters of `references` by name."""
        return {'base': self.base_params, 'references': {**self.reference_params, **self.average_params}}

    @property
    def policy(self) -> dict[str, Any]:
        """The policy's whole parameter tree."""
        return combined(self.base_params, self.params)


def make_optimizer(settings: config.Optimizer) -> optax.GradientTransformation:
    """The update of `TrainState.trained` up to the learning rates, which the step applies: traced, new ones compile
    nothing.

    Policy and method parts are clipped each by their own norm, and decay each by their own rate; both are AdamW's or
    both Adafactor's. The learning rate is the size of a step in either: an update of Adafactor has, by matrix or
    vector, a root mean square of 1 at most, and is not scaled by that of the parameter.
    """
    scale = _adam(settings) if settings.kind == 'adamw' else _adafactor()
    scale_by_layer = scale if settings.kind == 'adamw' else _by_layer(scale)

    def descent(scale, weight_decay, mask):
        clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm is not None else optax.identity()
        return optax.chain(clip, scale, optax.add_decayed_weights(weight_decay, mask=mask))

    parts = {
        'policy': descent(scale_by_layer, settings.weight_decay, matrices),
        'method': descent(scale, settings.method_weight_decay, None),
    }
    return optax.partition(parts, {name: name for name in parts})


def _adam(settings: config.Optimizer) -> optax.GradientTransformation:
    # Not a Python number: times a bfloat16 moment, that would be rounded to bfloat16 itself, to 0.898 for 0.9.
    beta1, moment_dtype = np.float32(settings.beta1), jnp.dtype(settings.moment_dtype)
    return optax.scale_by_adam(beta1, settings.beta2, settings.epsilon, mu_dtype=moment_dtype)


def _adafactor() -> optax.GradientTransformation:
    """Adafactor without a first moment or a scale of its own: Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4
    and 5 with their constants, alpha left to the caller. Every matrix is factored, however small."""
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8, epsilon=1e-30, min_dim_size_to_factor=1),
        optax.clip_by_block_rms(1.0),
    )


def _by_layer(scale: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same for each layer's own matrices and vectors where they are stacked: else layers would be a dimension to
    factor by, and share one bound on the update."""

    def labels(params):
        return jax.tree.map_with_path(lambda path, _: 'stacked' if _stacked(path) else 'single', params)

    each = optax.GradientTransformation(jax.vmap(scale.init), jax.vmap(scale.update))
    return optax.partition({'stacked': each, 'single': scale}, labels)


def matrices(params):
    """True for leaves that weight decay applies to: matrices, not norms or biases (vectors, stacked over layers)."""
    return jax.tree.map_with_path(lambda path, leaf: leaf.ndim - _stacked(path) >= 2, params)


def _stacked(path) -> bool:
    """Whether the leaf at this path of a policy's parameters has a first axis of layers."""
    return 'layers' in jax.tree_util.keystr(path, simple=True, separator='/').split('/')


def learning_rate_schedule(settings: config.Optimizer, steps: int, peak: float) -> optax.Schedule:
    """Warm-up from 0 to the peak, then decay to its final ratio at step `steps` (constant: none)."""
    decay_steps = max(steps - settings.warmup_steps, 1)
    final = peak * settings.final_learning_rate_ratio
    decay = {
        'constant': optax.constant_schedule(peak),
        'linear': optax.linear_schedule(peak, final, decay_steps),
        'cosine': optax.cosine_decay_schedule(peak, decay_steps, settings.final_learning_rate_ratio),
    }[settings.schedule]
    # The first of n warm-up steps takes 1/n of the peak: a step at rate 0 would be wasted.
    warmup = optax.linear_schedule(peak / max(settings.warmup_steps, 1), peak, max(settings.warmup_steps - 1, 1))
    return optax.join_schedules([warmup, decay], [settings.warmup_steps])


def learning_rates(settings: config.Optimizer, steps: int) -> Callable[[int], dict[str, np.ndarray]]:
    """Step -> `learning_rate` and `method_learning_rate`, as a step takes them."""
    peaks = {'learning_rate': settings.learning_rate, 'method_learning_rate': settings.method_learning_rate}
    schedules = {name: learning_rate_schedule(settings, steps, peak) for name, peak in peaks.items()}
    return lambda step: {name: np.float32(schedule(step)) for name, schedule in schedules.items()}


def create(
    params,
    reference_params: dict[str, Any],
    optimizer: optax.GradientTransformation,
    method_state: dict[str, Any] | None = None,
    method_params: dict[str, Any] | None = None,
    base_params: dict[str, Any] | None = None,
    average_params: dict[str, Any] | None = None,
) -> TrainState:
    """A state at step 0. No buffer may be shared between policy and references: the step donates the state."""
    step = jnp.zeros((), jnp.int32)
    beside = (method_state, method_params, base_params, average_params)
    state = TrainState(step, params, reference_params, (), *(part or {} for part in beside))
    return state.replace(opt_state=optimizer.init(state.trained))
