"""Losses on the margin between chosen and rejected, measured against a reference."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Range, loss
from jaxpo.types import Completion, Rewards


@loss('Rafailov et al. 2023, arXiv:2305.18290, Eq. 7')
def dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """Logistic regression on the margin of log-ratios.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected))), log-ratios summed over the completion.

    beta > 0 is the strength of the KL penalty; the paper uses 0.1 to 0.5.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    return links.logistic(rewards.chosen - rewards.rejected), rewards


@loss('Mitchell 2023, A note on DPO with noisy preferences and relationship to IPO')
def cdpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, label_smoothing: float = 0.1):
    """Conservative DPO: labels are taken to be wrong with a known probability.

    -(1 - label_smoothing) * log sigmoid(z) - label_smoothing * log sigmoid(-z), with DPO's margin
    z = beta * (log_ratio(chosen) - log_ratio(rejected)).

    beta > 0 is DPO's. label_smoothing in [0, 0.5) is the probability that a label is wrong: the loss is least at
    z = log((1 - label_smoothing) / label_smoothing) rather than at infinity. 0.1 is where the author's code suggests
    to start, untested there; another public implementation uses 0.2.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    return links.smoothed(rewards.chosen - rewards.rejected, label_smoothing), rewards


@loss('Chowdhury, Kini and Natarajan 2024, arXiv:2403.00409')
def robust_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, label_smoothing: float = 0.1):
    """An unbiased estimate of the DPO loss of clean labels, from labels of which some are wrong.

    (-(1 - label_smoothing) * log sigmoid(z) + label_smoothing * log sigmoid(-z)) / (1 - 2 * label_smoothing), with
    DPO's margin z = beta * (log_ratio(chosen) - log_ratio(rejected)).

    beta > 0 is DPO's. label_smoothing in [0, 0.5) is the probability that a label is wrong; at 0.5 a label says nothing
    and the loss has no value. Where it is above 0 the loss falls without bound as z grows, below 0 too. Public
    code reports both defaults as the paper's.

    Unverified: defaults and formula are as public code gives them; the paper itself was not at hand.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    # Taking the noise back is smoothing by a negative probability.
    negative = -label_smoothing / (1 - 2 * label_smoothing)
    return links.smoothed(rewards.chosen - rewards.rejected, negative), rewards


@loss('Liu et al. 2023 (RSO), arXiv:2309.06657, hinge-norm')
def hinge(chosen: Completion, rejected: Completion, *, beta: float = 0.05):
    """Hinge loss on DPO's margin, as a support vector machine has it.

    max(0, 1 - beta * (log_ratio(chosen) - log_ratio(rejected))), log-ratios summed over the completion.

    beta > 0 is the reciprocal of the margin of log-ratios that a pair should reach, nats; the paper uses 0.05.

    Differs: the hinge of SLiC-HF, which reads no reference and adds the likelihood of a target, is `slic`.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    return links.hinge(rewards.chosen - rewards.rejected, 1.0), rewards


@loss('Ji et al. 2024, arXiv:2402.00856', ranges={'label_smoothing': Range(0, 0.5)})
def exo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, label_smoothing: float = 1e-3):
    """Efficient exact optimisation: reverse KL from the policy's preference to the smoothed label.

    q * log(q / (1 - label_smoothing)) + (1 - q) * log((1 - q) / label_smoothing), with q = sigmoid(z) and DPO's margin
    z = beta * (log_ratio(chosen) - log_ratio(rejected)).

    beta > 0 is DPO's. label_smoothing in (0, 0.5) is the probability that the label gives to the rejected completion:
    the KL is infinite at 0, so that a value below the least positive number of the dtype counts as that number. 1e-3 is
    the default of public code.

    Differs: the authors' code writes the label's log-probabilities as (0, -10), not (log(1 - label_smoothing),
    log(label_smoothing)), and so is shifted by a constant and scaled in its tail.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    margin = rewards.chosen - rewards.rejected
    label_smoothing = jnp.maximum(label_smoothing, jnp.finfo(margin.dtype).tiny)
    log_q, log_not_q = -links.logistic(margin), -links.logistic(-margin)
    losses = jnp.exp(log_q) * (log_q - jnp.log1p(-label_smoothing))
    losses += jnp.exp(log_not_q) * (log_not_q - jnp.log(label_smoothing))
    return losses, rewards


@loss('Lu et al. 2024, arXiv:2406.08414, DiscoPOP, the log-ratio modulated loss')
def discopop(chosen: Completion, rejected: Completion, *, beta: float = 0.05, tau: float = 0.05):
    """Logistic and exponential loss of the margin, mixed by the margin itself.

    (1 - w) * -log sigmoid(z) + w * exp(-z), with w = sigmoid(z / tau) and DPO's margin
    z = beta * (log_ratio(chosen) - log_ratio(rejected)).

    beta > 0 is DPO's. tau in (0, 1] is the width over which the two are mixed, in units of z; above 1 the exponential
    outgrows its weight where z is very negative. 0.05 is the paper's for both. The gradient flows through w, so that
    the loss is not convex: at tau = 0.05 it has a local minimum at z = -0.119, into which a policy
    that equals the reference, at z = 0, is drawn.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    margin = rewards.chosen - rewards.rejected
    # One exponent for w * exp(-z): apart, 0 meets infinity where z is very negative.
    exponential = jnp.exp(-links.logistic(margin / tau) - margin)
    return jax.nn.sigmoid(-margin / tau) * links.logistic(margin) + exponential, rewards


@loss('Azar et al. 2023, arXiv:2310.12036, Eq. 17')
def ipo(
    chosen: Completion,
    rejected: Completion,
    *,
    tau: float = 0.1,
    reduction: Literal['mean', 'sum'] = 'mean',
):
    """Squared distance of the margin of log-ratios from 1 / (2 tau).

    (h - 1 / (2 tau))^2 with h = log_ratio(chosen) - log_ratio(rejected), each averaged over its tokens, or summed.

    tau > 0 is the strength of the regularisation.

    Differs: the paper's Eq. 17 writes sequence log-probabilities, which `reduction='sum'` takes literally. Its authors
    are reported (in the discussion of the peers' implementations) to average over tokens, so that the target does not
    depend on length: the default here, as in the field.
    """
    score = {'mean': scores.mean_log_ratio, 'sum': scores.log_ratio}[reduction]
    chosen_score, rejected_score = score(chosen), score(rejected)
    losses = links.squared(chosen_score - rejected_score, 1 / (2 * tau))
    return losses, Rewards(tau * chosen_score, tau * rejected_score)


def reverse_kl(log_ratio: jax.Array) -> jax.Array:
    """f'(u) = log u + 1 for f(u) = u log u, less its value at u = 1: DPO's score."""
    return log_ratio


def forward_kl(log_ratio: jax.Array) -> jax.Array:
    """f'(u) = -1 / u for f(u) = -log u, less its value at u = 1."""
    return scores.deformed_log(log_ratio, 1.0)


def jensen_shannon(log_ratio: jax.Array) -> jax.Array:
    """f'(u) = log(2 u / (1 + u)) for f(u) = u log u - (u + 1) log((u + 1) / 2)."""
    return math.log(2.0) - links.logistic(log_ratio)


def alpha_divergence(log_ratio: jax.Array, *, alpha: float = 0.5) -> jax.Array:
    """f'(u) = (1 - u^-alpha) / alpha: reverse KL as alpha goes to 0, forward KL at 1."""
    return scores.deformed_log(log_ratio, alpha)


DIVERGENCES = {
    'reverse_kl': reverse_kl,
    'forward_kl': forward_kl,
    'jensen_shannon': jensen_shannon,
    'alpha': alpha_divergence,
}


@loss('Wang et al. 2023, arXiv:2309.16240', parts={'divergence': DIVERGENCES})
def f_dpo(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.1,
    divergence: Literal['reverse_kl', 'forward_kl', 'jensen_shannon', 'alpha'] = 'reverse_kl',
    **hyperparameters,
):
    """DPO under another f-divergence than the reverse KL.

    -log sigmoid(beta * (f'(u(chosen)) - f'(u(rejected)))), with u = exp(log_ratio) of the whole completion and f'(u):
    log u for reverse_kl, 1 - 1 / u for forward_kl, log(2 u / (1 + u)) for jensen_shannon, (1 - u^-alpha) / alpha for
    alpha.

    beta > 0 is DPO's. divergence is the one that keeps the policy near the reference; reverse_kl is DPO. alpha, which
    only the divergence `alpha` has, is in [0, 1]: 0 is reverse_kl, 1 is forward_kl, and the default is halfway. Each f'
    is less its value at u = 1, which cancels in the loss: rewards are 0 where the policy equals the reference.

    Beyond u^-alpha = exp(30) the power goes on along its tangent, so that a completion that the policy has all but
    ruled out still has a finite loss and a gradient.

    Differs: current public code writes the alpha divergence's f' as u^(a - 1) / (a - 1), which is a = 1 - alpha here;
    the two agree at 0.5 alone.
    """
    score = functools.partial(DIVERGENCES[divergence], **hyperparameters)
    rewards = scores.rewards(lambda completion: score(scores.log_ratio(completion)), chosen, rejected, beta)
    return links.logistic(rewards.chosen - rewards.rejected), rewards
