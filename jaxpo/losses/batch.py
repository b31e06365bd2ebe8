"""Losses that look at all pairs of a step at once: order statistics, and a baseline taken over the batch."""

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion, Rewards


@loss(
    'Ethayarajh et al. 2024, arXiv:2402.01306, Eq. 8',
    normaliser='completions',
    couples_batch=True,
    takes_unpaired=True,
    needs=Needs(companions=('mismatched',)),
)
def kto(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
):
    """Human utility of each completion on its own, against the step's mean log-ratio of mismatched completions.

    desirable_weight * (1 - sigmoid(beta * (log_ratio(chosen) - z))) + undesirable_weight * (1 - sigmoid(beta * (z -
    log_ratio(rejected)))), a missing completion's term left out; z = stop_gradient(max(0, mean of log_ratio(mismatched)
    over the step's mismatched completions)), which estimates the KL divergence from the reference, nats.

    beta > 0 is the strength of the KL penalty, 0.1 as in the authors' and TRL's code. desirable_weight and
    undesirable_weight >= 0 are the paper's lambda_D and lambda_U, 1 by default; for unequal halves the paper asks that
    desirable_weight * (desirable completions) / (undesirable_weight * (undesirable ones)) lie in 1 to 4/3. A step with
    no mismatched completion has z = 0. Losses sum both completions of a pair; the objective divides by completions.

    Differs: z is a mean over the whole step's mismatched completions, as the paper has it; TRL takes one for each
    microbatch on a device and averages those.

    Unverified: the equation's number in the paper.
    """
    mismatched = chosen.companions['mismatched']
    there = scores.present(mismatched)
    baseline = jnp.where(there, scores.log_ratio(mismatched), 0).sum() / jnp.maximum(there.sum(), 1)
    baseline = jax.lax.stop_gradient(jnp.maximum(baseline, 0))
    chosen_score, rejected_score = scores.log_ratio(chosen), scores.log_ratio(rejected)
    desirable = desirable_weight * jax.nn.sigmoid(-beta * (chosen_score - baseline))
    undesirable = undesirable_weight * jax.nn.sigmoid(-beta * (baseline - rejected_score))
    losses = jnp.where(scores.present(chosen), desirable, 0) + jnp.where(scores.present(rejected), undesirable, 0)
    return losses, Rewards(beta * chosen_score, beta * rejected_score)


@loss('Melnyk et al. 2024, arXiv:2406.05882 (paired)', couples_batch=True)
def aot(chosen: Completion, rejected: Completion, *, beta: float = 0.01, label_smoothing: float = 0.0):
    """Makes the policy's margins dominate the reference's as distributions: sorted against sorted, over the step.

    -(1 - label_smoothing) * log sigmoid(beta * delta) - label_smoothing * log sigmoid(-beta * delta), delta_(i) =
    policy margin_(i) - reference margin_(i), each margin logp(chosen) - logp(rejected), sorted over the step's pairs.

    beta > 0 scales the difference of order statistics; 0.01 is reported as the paper's.
    label_smoothing in [0, 0.5) is the chance that a preference is flipped. The i-th loss is given to the pair whose
    policy margin is the i-th. Larger steps compare finer distributions.

    Differs: label_smoothing is TRL's, not the paper's; 0 is the paper's loss. The sort is the hard one.
    """
    policy_margin = scores.logp(chosen) - scores.logp(rejected)
    reference_margin = _reference_logp(chosen) - _reference_logp(rejected)
    matched = _of_equal_rank(policy_margin, reference_margin, scores.present(chosen))
    # The log-ratios' margin first: exact where a pair is matched with itself, as all are where policy is reference.
    delta = scores.log_ratio(chosen) - scores.log_ratio(rejected) + (reference_margin - matched)
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    return links.smoothed(beta * delta, label_smoothing), rewards


@loss('Melnyk et al. 2024, arXiv:2406.05882 (unpaired)', couples_batch=True)
def aot_unpaired(chosen: Completion, rejected: Completion, *, beta: float = 0.01, label_smoothing: float = 0.0):
    """Makes the rewards of chosen completions dominate those of rejected ones as distributions, over the step.

    -(1 - label_smoothing) * log sigmoid(beta * delta) - label_smoothing * log sigmoid(-beta * delta), delta_(i) =
    log_ratio(chosen)_(i) - log_ratio(rejected)_(i), each sorted over the step's completions: who was paired with whom
    is not used.

    beta > 0 scales the difference of order statistics; 0.01 is reported as the paper's.
    label_smoothing in [0, 0.5) is the chance that a preference is flipped. The i-th loss is given to the pair whose
    chosen completion is the i-th. There must be as many rejected completions as chosen ones.

    Differs: label_smoothing is TRL's, not the paper's; 0 is the paper's loss. The sort is the hard one.
    """
    chosen_score, rejected_score = scores.log_ratio(chosen), scores.log_ratio(rejected)
    delta = chosen_score - _of_equal_rank(chosen_score, rejected_score, scores.present(chosen))
    return links.smoothed(beta * delta, label_smoothing), Rewards(beta * chosen_score, beta * rejected_score)


def _of_equal_rank(values, others, present):
    """For each of `values [B]`, that of `others` of equal rank among those `present`. Differentiable in `others`."""

    def order(x):
        # Empty slots come last on both sides, and are matched with one another.
        return jnp.argsort(jnp.where(present, jax.lax.stop_gradient(x), jnp.inf))

    rank = jnp.argsort(order(values))
    return others[order(others)][rank]


def _reference_logp(completion):
    (reference_logps,) = completion.reference_logps
    return (completion.weights * reference_logps).sum(axis=-1)
