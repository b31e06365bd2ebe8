"""Losses that read every reference by itself, rather than one mixture of them."""

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import loss
from jaxpo.types import Completion, Rewards


@loss('Le et al. 2024, arXiv:2405.16388, the Multi-DPO baseline', many_references=True)
def multi_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """The mean of DPO's losses against each reference, by the references' weights.

    sum_k w_k * -log sigmoid(beta * (log_ratio_k(chosen) - log_ratio_k(rejected))), with the log-ratio to reference k
    summed over the completion and the pair's mixing weights w, 1 / K each where there is no mixture.

    beta > 0 is DPO's. Both completions are weighted as the chosen one. The loss is at least DPO's against the weighted
    geometric mean of the references, and equals it where all of them set the pair equally far apart; the rewards are
    those of that mean. Of the mixture, weights and clip apply, and the mix does not.

    MRPO's authors have it as their baseline, with adaptive weights and an adaptive clip. Wu and Echarghaoui 2025,
    arXiv:2512.10040, call it MDPO and take log-probabilities per token; the loss `mdpo` is another, multimodal one.

    Unverified: the formula is the authors' code's; the paper's own text was not at hand.
    """
    weights = _mixing_weights(chosen)
    chosen_ratios, rejected_ratios = scores.log_ratios(chosen), scores.log_ratios(rejected)
    losses, _ = links.bradley_terry(beta, chosen_ratios, rejected_ratios)
    rewards = Rewards(*(beta * _mean(weights, ratios) for ratios in (chosen_ratios, rejected_ratios)))
    return _mean(weights, losses), rewards


def _mixing_weights(completion: Completion) -> jax.Array:
    """`[K, B]`: those of the completion, or 1 / K."""
    if completion.mixing_weights is not None:
        return completion.mixing_weights
    logps = completion.reference_logps
    return jnp.full(logps.shape[:2], 1 / len(logps), logps.dtype)


def _mean(weights: jax.Array, values: jax.Array) -> jax.Array:
    """`[K, B] -> [B]`: the mean over references by weight."""
    return (weights * values).sum(axis=0)
