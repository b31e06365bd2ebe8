"""One Flax Linen decoder for every family: its fields come from an `Architecture`, its layers from one scan.

Parameters are float32; linear kernels are `[in, out]`; the layers' parameters are stacked on their first axis:

    embedding [V, D]                                     final_norm [D]      head [V, D], only where untied
    layers/attention_norm, mlp_norm, attention_post_norm?, mlp_post_norm? [L, D]
    layers/attention/query [L, D, H * Dh], key, value [L, D, K * Dh], output [L, H * Dh, D],
                     query_bias?, key_bias?, value_bias?, output_bias?, query_norm?, key_norm? [L, Dh]
    layers/mlp/gate, up [L, D, F], down [L, F, D]
    beside a kernel [L, in, out] with an adapter: NAME_lora_a [L, in, r], NAME_lora_b [L, r, out] (`models.lora`)

Norm weights are as in the checkpoint: where `norm_offset` is 1 they are what is added to 1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpo.errors import unknown
from jaxpo.models.activations import MEANS, STATES, keep_means, keep_state
from jaxpo.models.architecture import Architecture
from jaxpo.models.attention import rotary, rotate
from jaxpo.models.attention_choice import check
from jaxpo.models.attention_kernels import Sight, mix, sight, within
from jaxpo.models.cache import Cache, extended
from jaxpo.models.embedding import looked_up
from jaxpo.models.lora import Lora, initializer

REMAT_POLICIES = {
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    'silu': jax.nn.silu,
    'gelu_pytorch_tanh': lambda gate: jax.nn.gelu(gate, approximate=True),
}
_normal = nn.initializers.normal(0.02)


def _normal_and_zeros(key: jax.Array, shape: tuple[int, int], padding: int) -> jax.Array:
    return jnp.concatenate([_normal(key, shape), jnp.zeros((padding, shape[1]))])


class Surroundings(NamedTuple):
    """What every layer of one call is told: who sees whom, and how positions turn heads."""

    sight: Sight
    cosine: jax.Array  # [R, T, 1, Dh / 2]
    sine: jax.Array


class Decoder(nn.Module):
    """Tokens to final hidden states; the head is applied elsewhere (see `head_weight`).

    `dtype` is that of activations and matrix products (norms, rotations and softmax are float32). `remat` says what
    the backward pass recomputes of each layer: 'none', 'dots' (all but matrix products) or 'full'. `rows` is how rows
    lie on a mesh, as `PartitionSpec((..., axis))`, where the last axis is the one that splits the parameters by width.
    It must be given where parameters are split: else XLA may keep hidden states split by width, and devices repeat
    each other's work. With `lora` the parameters must hold the adapters it describes; without, any that they hold are
    off.

    `attention` names a kernel (`attention_choice`); one that the architecture, dtype or row length rule out is
    an InputError. A call with a cache always takes xla: it has one query to many keys. `branches` is how many
    completions may share a prompt's segment: those beyond it splash would not tell apart (xla and cudnn would).
    """

    architecture: Architecture
    dtype: Any = jnp.float32
    remat: str = 'none'
    rows: jax.sharding.NamedSharding | None = None
    lora: Lora | None = None
    attention: str = 'xla'
    branches: int = 2

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment: jax.Array,
        branch: jax.Array,
        cache: Cache | None = None,
    ) -> Any:
        """Hidden states `[R, T, D]` after the final norm, of int32 `[R, T]` arrays as in `jaxpo.types.Batch`.

        A token id outside the vocabulary makes its row NaN. With a `cache` the tokens also see what it holds and are
        added to it, and the result is (hidden, new cache); the caller keeps `used + T` within its slots.
        """
        architecture = self.architecture
        kernel = self.attention if cache is None else 'xla'
        check(kernel, architecture, dtype=self.dtype, lengths=tokens.shape[1:], branches=self.branches)
        shape = (architecture.vocabulary, architecture.width)
        embedding = self.param('embedding', _normal_and_zeros, shape, architecture.padding)
        if not architecture.tied:
            # Applied elsewhere, but made and checked with the rest.
            self.param('head', _normal_and_zeros, shape, architecture.padding)
        hidden = looked_up(embedding, tokens, self.dtype, self.rows)
        hidden = _pin(hidden * jnp.asarray(architecture.embedding_scale, self.dtype), self.rows)
        keep_means(self, 'residual', hidden)

        place = (positions, segment, branch)
        cached, past = None, None
        if cache is not None:
            cached = (cache.positions, cache.segment, jnp.zeros_like(cache.segment))
            past = (cache.key, cache.value)
        seen = sight(kernel, place, cached, self.branches)
        surroundings = Surroundings(seen, *rotary(architecture, positions))
        layers = _scanned(self.remat, architecture.layers)(
            architecture, self.dtype, self.rows, self.lora, kernel, name='layers'
        )
        hidden, new = layers(hidden, past, _windows(architecture), surroundings)
        hidden = _norm(self, 'final_norm', hidden)
        keep_means(self, 'residual', hidden)
        return hidden if cache is None else (hidden, extended(cache, new, positions, segment))


class Layer(nn.Module):
    """One decoder layer. Returns (hidden, its tokens' keys and values where there is a cache)."""

    architecture: Architecture
    dtype: Any
    rows: jax.sharding.NamedSharding | None
    lora: Lora | None
    kernel: str

    @nn.compact
    def __call__(
        self,
        hidden: jax.Array,
        past: tuple[jax.Array, jax.Array] | None,
        window: jax.Array | None,
        surroundings: Surroundings,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        surroundings = surroundings._replace(sight=within(surroundings.sight, window))
        normed = _norm(self, 'attention_norm', hidden)
        attention = Attention(self.architecture, self.dtype, self.rows, self.lora, self.kernel, name='attention')
        update, new = attention(normed, past, surroundings)
        if self.architecture.post_norms:
            update = _norm(self, 'attention_post_norm', update)
        keep_means(self, 'residual', hidden, normed, update, hidden + update)
        hidden = hidden + update
        normed = _norm(self, 'mlp_norm', hidden)
        update = MLP(self.architecture, self.dtype, self.lora, name='mlp')(normed)
        if self.architecture.post_norms:
            update = _norm(self, 'mlp_post_norm', update)
        hidden = _pin(hidden + update, self.rows)
        keep_means(self, 'residual', normed, update, hidden)
        keep_state(self, hidden)
        return hidden, new


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; returns (update, keys and values as `Layer` does)."""

    architecture: Architecture
    dtype: Any
    rows: jax.sharding.NamedSharding | None
    lora: Lora | None
    kernel: str

    @nn.compact
    def __call__(
        self, hidden: jax.Array, past: tuple[jax.Array, jax.Array] | None, surroundings: Surroundings
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        architecture = self.architecture
        bias = architecture.qkv_bias
        query = self._heads('query', hidden, architecture.heads, bias)
        key = self._heads('key', hidden, architecture.key_value_heads, bias)
        value = self._heads('value', hidden, architecture.key_value_heads, bias)
        keep_means(self, 'attention', query, key, value)
        if architecture.query_key_norm:
            query = _norm(self, 'query_norm', query)
            key = _norm(self, 'key_norm', key)
        query, key, value = (_pin(heads, _by_heads(self.rows)) for heads in (query, key, value))
        query = rotate(query, surroundings.cosine, surroundings.sine)
        key = rotate(key, surroundings.cosine, surroundings.sine)
        new = (key, value)
        mixed = mix(self.kernel, query, new, past, surroundings.sight, architecture, self.rows)
        keep_means(self, 'attention', query, key, mixed)
        update = _linear(self, 'output', mixed, architecture.width, architecture.output_bias)
        return update, None if past is None else new

    def _heads(self, name: str, hidden: jax.Array, heads: int, bias: bool) -> jax.Array:
        flat = _linear(self, name, hidden, heads * self.architecture.head_dim, bias)
        return flat.reshape(*hidden.shape[:-1], heads, self.architecture.head_dim)


class MLP(nn.Module):
    """Gated feed-forward block."""

    architecture: Architecture
    dtype: Any
    lora: Lora | None

    @nn.compact
    def __call__(self, hidden: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.architecture.activation]
        gate = _linear(self, 'gate', hidden, self.architecture.hidden)
        up = _linear(self, 'up', hidden, self.architecture.hidden)
        active = activation(gate) * up
        keep_means(self, 'mlp', active)
        return _linear(self, 'down', active, self.architecture.width)


def init_params(architecture: Architecture, key: jax.Array) -> dict[str, Any]:
    """Random float32 parameters: kernels and embeddings normal with deviation 0.02, norms identity, biases 0."""
    place = jnp.zeros((1, 1), jnp.int32)
    return Decoder(architecture).init(key, place, place, place, place)['params']


def abstract_params(architecture: Architecture) -> dict[str, Any]:
    """The parameter tree as shapes and dtypes (`jax.ShapeDtypeStruct`), without making any array."""
    return jax.eval_shape(lambda key: init_params(architecture, key), jax.random.key(0))


def head_weight(params: dict[str, Any]) -> jax.Array:
    """The head `[V, D]`: that of the tree, or the embedding where they are tied."""
    return params['head'] if 'head' in params else params['embedding']


def _pin(hidden: jax.Array, sharding: jax.sharding.NamedSharding | None) -> jax.Array:
    return hidden if sharding is None else jax.lax.with_sharding_constraint(hidden, sharding)


def _by_heads(rows: jax.sharding.NamedSharding | None) -> jax.sharding.NamedSharding | None:
    """How `[R, T, H, Dh]` lies: as rows do, its heads over the devices that share a row."""
    if rows is None:
        return None
    return jax.sharding.NamedSharding(rows.mesh, jax.sharding.PartitionSpec(rows.spec[0], None, 'tensor', None))


def _norm(module: nn.Module, name: str, values: jax.Array) -> jax.Array:
    """RMSNorm of the last axis, in float32, by the module's own parameter `name`."""
    architecture = module.architecture
    weight = module.param(name, nn.initializers.constant(1 - architecture.norm_offset), (values.shape[-1],))
    values32 = values.astype(jnp.float32)
    mean_square = jnp.mean(values32 * values32, axis=-1, keepdims=True)
    normal = values32 * jax.lax.rsqrt(mean_square + architecture.norm_epsilon)
    scale = (architecture.norm_offset + weight).reshape((1,) * (values.ndim - 1) + weight.shape)
    return (normal * scale).astype(module.dtype)


def _linear(module: nn.Module, name: str, values: jax.Array, width: int, bias: bool = False) -> jax.Array:
    """values @ kernel, plus what its adapter and its bias add, by the module's own parameters `name`, `name`_bias."""
    kernel = module.param(name, _normal, (values.shape[-1], width))
    product = values @ kernel.astype(module.dtype)
    if module.lora is not None and name in module.lora.targets:
        product = product + _low_rank(module, name, values, width)
    if bias:
        weight = module.param(f'{name}_bias', nn.initializers.zeros, (width,))
        product = product + weight.astype(module.dtype).reshape((1,) * (values.ndim - 1) + (width,))
    return product


def _low_rank(module: nn.Module, name: str, values: jax.Array, width: int) -> jax.Array:
    """scale * values @ A @ B, by the module's own parameters `name`_lora_a and `name`_lora_b."""
    lora = module.lora
    a = module.param(f'{name}_lora_a', initializer(lora, 'a'), (values.shape[-1], lora.rank))
    b = module.param(f'{name}_lora_b', initializer(lora, 'b'), (lora.rank, width))
    # Scaled in float32: scale itself may not be a number of the compute dtype.
    return values @ a.astype(module.dtype) @ (lora.scale * b).astype(module.dtype)


def _scanned(remat: str, layers: int) -> Any:
    """The `Layer` class, rematerialised as asked and scanned over parameters, cache and windows."""
    if remat not in ('none', *REMAT_POLICIES):
        raise unknown('remat', remat, ('none', *REMAT_POLICIES))
    layer = Layer
    if remat != 'none':
        layer = nn.remat(Layer, policy=REMAT_POLICIES[remat], prevent_cse=False)  # scan prevents it already
    return nn.scan(
        layer,
        variable_axes={'params': 0, STATES: 0, MEANS: 0},
        split_rngs={'params': True},
        in_axes=(0, 0, nn.broadcast),
        length=layers,
    )


def _windows(architecture: Architecture) -> jax.Array | None:
    """int32 [L]: the window of each layer, beyond any distance where it has none; None where no layer has one."""
    if all(window is None for window in architecture.windows):
        return None
    unlimited = jnp.iinfo(jnp.int32).max
    return jnp.asarray([window or unlimited for window in architecture.windows], jnp.int32)
