"""What a frozen decoder holds on the way to its final hidden states: kept only where a call asks for it.

Layers report to two Flax collections, which exist only while `apply_collecting` runs: any other call computes nothing
of it.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

STATES, MEANS = 'hidden_states', 'activation_means'  # the collections


class Collected(NamedTuple):
    """What was asked for of one call. Never differentiated."""

    hidden_states: jax.Array | None
    """[L, R, T, D] in the compute dtype: the residual stream behind each layer, the last one too before the final norm.
    """
    activations: dict[str, jax.Array]
    """Kind -> [N, R, T] float32: means over features of N activations of each kind, which are, of every layer:

    mlp: the input of the last projection (activation of gate, times up).
    attention: queries, keys and values as projected (before norms of heads), queries and keys after rotation, and the
    mixed values before the output projection.
    residual: the stream ahead of the layer, as normed for attention, the update by attention, the stream with it, as
    normed for the MLP, the update by the MLP, the stream with it. An update is what is added: where there are
    post-norms, it is normed. Two more are the (scaled) embedding and the final norm's result: N is 7 L + 2.
    """


def apply_collecting(
    decoder: nn.Module,
    params: dict[str, Any],
    tokens: jax.Array,
    positions: jax.Array,
    segment: jax.Array,
    branch: jax.Array,
    *,
    hidden_states: bool,
    activations: bool,
) -> tuple[jax.Array, Collected]:
    """What `decoder.apply` returns of `[R, T]` arrays as in `jaxpo.types.Batch`, and what was asked for beside it.

    The kinds of activations are those of MaPO (Christopoulou et al. 2024, arXiv:2410.05102) in the authors' code, where
    masks are averaged within a kind, then over kinds. Its fourth kind, the mean of logits, needs the vocabulary: it is
    `jaxpo.logps`'s statistic `mean_logit`.

    Differs: `hidden_states` of the transformers library, which the authors read, are normed by the final norm in the
    last layer's place.

    Unverified: the authors have hooks for GPT-2, GPT-BigCode, GPT-J and GPT-NeoX; what stands here for gated MLPs,
    normed heads and post-norms is our reading.
    """
    asked = [name for name, wanted in ((STATES, hidden_states), (MEANS, activations)) if wanted]
    frozen = {'params': jax.lax.stop_gradient(params)}
    hidden, collections = decoder.apply(frozen, tokens, positions, segment, branch, mutable=asked)
    states = jax.tree.leaves(collections.get(STATES))
    return hidden, Collected(states[0] if states else None, _by_kind(collections.get(MEANS, {})))


def keep_state(module: nn.Module, hidden: jax.Array) -> None:
    """Keeps a layer's result [R, T, D] where a call asks for it."""
    if _asked(module, STATES):
        module.sow(STATES, 'hidden', hidden)


def keep_means(module: nn.Module, kind: str, *values: jax.Array) -> None:
    """Keeps the means over features of activations [R, T, ...] where a call asks for them."""
    if _asked(module, MEANS):
        for value in values:
            features = tuple(range(2, value.ndim))
            module.sow(MEANS, kind, jnp.mean(value, axis=features, dtype=jnp.float32))


def _asked(module: nn.Module, collection: str) -> bool:
    """Initialisation makes every collection: it is not asked for anything but parameters."""
    return module.is_mutable_collection(collection) and not module.is_initializing()


def _by_kind(kept: dict[str, Any]) -> dict[str, jax.Array]:
    """Means [R, T] of the decoder and [L, R, T] of its layers, by kind, on one axis."""
    kinds: dict[str, list[jax.Array]] = {}
    for path, means in jax.tree.leaves_with_path(kept):
        kind = next(entry.key for entry in reversed(path) if isinstance(entry, jax.tree_util.DictKey))
        kinds.setdefault(kind, []).append(means.reshape(-1, *means.shape[-2:]))
    return {kind: jnp.concatenate(parts) for kind, parts in kinds.items()}
