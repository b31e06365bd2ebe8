"""Losses whose tokens are weighed by masks made of the reference's activations."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion

SOURCE = 'Christopoulou et al. 2024, arXiv:2410.05102'
NORM_EPSILON = 1e-5
INITIAL_NOISE = 0.1


def masked_score(completion: Completion, reward_mask: jax.Array, kl_mask: jax.Array) -> jax.Array:
    """TDPO1's score with a mask `[B, C]` on the tokens' log-ratios, and one on their forward KLs; `[B]`, nats."""
    rewarded, constrained = scores.reweighted(completion, reward_mask), scores.reweighted(completion, kl_mask)
    return scores.log_ratio(rewarded) + scores.forward_kl(constrained)


def activation_mask(completion: Completion) -> jax.Array:
    """How active the reference was at each token, `[B, C]` in 0 to 1: 0 outside the completion, never differentiated.

    Each activation is scaled to [0, 1] over the completion's tokens; the scaled are averaged within their kind, then
    over kinds. One that is the same at every token (a completion of one token always is) makes none of them stand out
    and counts 1 at each.
    """
    inside = completion.weights[None] > 0

    def scaled(values):
        lowest = values.min(axis=-1, keepdims=True, where=inside, initial=jnp.inf)
        span = values.max(axis=-1, keepdims=True, where=inside, initial=-jnp.inf) - lowest
        share = jnp.where(span > 0, (values - lowest) / jnp.where(span > 0, span, 1.0), 1.0)
        return jnp.where(inside, share, 0.0).mean(axis=0)

    by_kind = [scaled(values) for values in completion.activations.values()]
    return jax.lax.stop_gradient(jnp.stack(by_kind).mean(axis=0))


@loss(SOURCE + ' (MaPO)', needs=Needs(statistics=('activations', 'forward_kl')))
def mapo(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """TDPO1 whose tokens count by how active the reference model was at them.

    -log sigmoid(beta * (S(chosen) - S(rejected))), S(y) = sum_t m_t * (log_ratio_t + KL_t), KL_t =
    KL(reference || policy) of the next token, m_t the mean of the reference's activations at the token, each scaled
    to [0, 1] over the completion.

    beta > 0 is the strength of the KL penalty; the paper uses 0.1 for dialogue, 0.8 for sentiment and summarisation.

    The mask is constant; the KL is differentiated on both sides. The authors standardise an activation before they
    scale it to [0, 1], which changes nothing but rounding, and is left out. Theirs is not a number for a completion of
    one token, or an activation that is the same at every token: here such an activation counts 1 at each token.
    """
    masks = [activation_mask(side) for side in (chosen, rejected)]
    return links.bradley_terry(
        beta, masked_score(chosen, masks[0], masks[0]), masked_score(rejected, masks[1], masks[1])
    )


def init_params(key: jax.Array, *, layers: int, width: int, masks: str) -> dict[str, Any]:
    """Parameters of the mask, `{'common': ...}`, or of the two, `{'reward': ..., 'kl': ...}`; float32.

    A mask begins near 1 at every token, so that training begins at TDPO1: each layer's linear map is noise of standard
    deviation 0.1 behind the norm, its bias is 1, and the layers are averaged. A mask that is 0 throughout has no
    gradient to leave 0 by.
    """
    names = {'common': ('common',), 'independent': ('reward', 'kl')}[masks]
    return {name: _init_mask(part, layers, width) for name, part in zip(names, jax.random.split(key, len(names)))}


def _init_mask(key, layers, width):
    noise = jax.random.normal(key, (layers, width), jnp.float32) * (INITIAL_NOISE / width**0.5)
    return {
        'norm_scale': jnp.ones(width, jnp.float32),
        'norm_bias': jnp.zeros(width, jnp.float32),
        'weights': noise,
        'bias': jnp.ones(layers, jnp.float32),
        'mixing': jnp.full(layers, 1.0 / layers, jnp.float32),
    }


def token_masks(params: dict[str, Any], hidden: jax.Array) -> dict[str, jax.Array]:
    """Masks `[N]`, at least 0, by name: `reward` on log-ratios and `kl` on KLs; the same mask where it is common.

    Args:
      params: as of `init_params`.
      hidden: `[L, N, D]`, the reference's hidden states behind each layer at N tokens; never differentiated.
    """
    masks = {name: _mask(mask, jax.lax.stop_gradient(hidden)) for name, mask in params.items()}
    return {name: masks.get(name, masks.get('common')) for name in ('reward', 'kl')}


def _mask(params, hidden):
    # One layer at a time, and again for the gradient: normalised hidden states of all layers are never held at once.
    @jax.checkpoint
    def of_layer(layer):
        states, weights, bias = layer
        states = states.astype(weights.dtype)
        centred = states - states.mean(axis=-1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + NORM_EPSILON)
        return jax.nn.relu(normal @ (params['norm_scale'] * weights) + (params['norm_bias'] @ weights + bias))

    by_layer = jax.lax.map(of_layer, (hidden, params['weights'], params['bias']))
    return jax.nn.relu(params['mixing'] @ by_layer)


@loss(
    SOURCE + ' (SparsePO)',
    needs=Needs(statistics=('forward_kl',)),
    init_params=init_params,
    token_masks=token_masks,
)
def sparse_po(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.1,
    reward_sparsity: float = 0.0,
    kl_sparsity: float = 0.0,
    masks: Literal['common', 'independent'] = 'common',
):
    """TDPO1 with learned sparse masks on the tokens' rewards and KLs.

    -log sigmoid(beta * (S(chosen) - S(rejected))) + s * sum_t (reward_sparsity * u_t + kl_sparsity * d_t) over the
    tokens of both, S(y) = sum_t (u_t * log_ratio_t + d_t * KL_t), KL_t = KL(reference || policy) of the next token,
    masks u_t, d_t = relu(sum_l mixing_l * relu(linear_l(norm(hidden_l,t)))) of the reference's hidden states behind
    every layer l; s = 1, or 1/2 where u = d.

    beta > 0 is the strength of the KL penalty; the paper uses 0.1 for dialogue, 0.8 for sentiment and summarisation.
    reward_sparsity >= 0 and kl_sparsity >= 0 weigh the masks' L1 norms (the paper's lambda_u, lambda_d): 0 by default,
    1e-3 each in the paper's dialogue runs with a common mask. `masks` says whether one mask serves both (`common`), or
    each has its own (`independent`).

    Both KLs are differentiated, and so are both masks, through both terms; a norm is shared by all layers, and the
    mixing has no bias. A common mask is one mask under two penalties: the authors halve both, so that its norm is
    counted once, at their mean.

    Differs: the authors' masks begin as their framework draws them, which may be 0 everywhere and then stays there;
    here they begin near 1. Their dropout on masks is left out: it is switched off with the models' own by default.
    """
    halving = {'common': 0.5, 'independent': 1.0}[masks]
    sides = (chosen, rejected)
    losses, rewards = links.bradley_terry(
        beta, *(masked_score(side, side.masks['reward'], side.masks['kl']) for side in sides)
    )
    for side in sides:
        density = reward_sparsity * jnp.abs(side.masks['reward']) + kl_sparsity * jnp.abs(side.masks['kl'])
        losses += halving * (side.weights * density).sum(axis=-1)
    return losses, rewards
