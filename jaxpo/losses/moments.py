"""Losses that remember the pairs of the steps before: running moments of log-ratios."""

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import loss
from jaxpo.types import Completion, Rewards

LEAST_BETA = 1e-3  # beta_dpo's, of a step


def _no_means():
    return {'count': jnp.zeros(2), 'mean': jnp.zeros(2)}


def _counted(state, chosen, rejected):
    """Counts and means of the log-ratios of all completions so far: `[2]`, chosen and rejected. Nats, without beta."""
    sides = (chosen, rejected)
    there = jnp.stack([scores.present(side) for side in sides])
    ratios = jnp.stack([scores.log_ratio(side) for side in sides])
    count = state['count'] + there.sum(axis=1)
    moved = jnp.where(there, ratios - state['mean'][:, None], 0).sum(axis=1)
    return {'count': count, 'mean': state['mean'] + moved / jnp.maximum(count, 1)}


@loss(
    'Jung et al. 2024, arXiv:2404.04656',
    couples_batch=True,
    takes_unpaired=True,
    init_state=_no_means,
    update_state=_counted,
)
def bco(chosen: Completion, rejected: Completion, *, state, beta: float = 0.01):
    """Binary classification of each completion on its own, with the running mean reward as threshold.

    -log sigmoid(reward(chosen) - delta) - log sigmoid(-(reward(rejected) - delta)), a missing completion's term left
    out; reward = beta * log_ratio; delta = (E[reward(chosen)] + E[reward(rejected)]) / 2 over all completions so far,
    stop-gradient.

    beta > 0 is the strength of the KL penalty; 0.01 as TRL lists the paper's setting. The mean is over rows, and a pair
    counts once with both its halves: twice what a mean over completions, as TRL takes it, would be. The state holds
    the count and the mean log-ratio of each half, from the first step on, this step's included; until a half has been
    seen, delta is the other's mean.

    Differs: TRL's delta (in the versions that have one) is a single running mean over the completions of both halves:
    the same for pairs, and nearer the larger half for unpaired rows of unequal numbers. The optional reweighting of
    rejected prompts (underlying distribution matching) is not here.

    Unverified: that delta is the midpoint of the two halves is recalled from the paper, not read again; whether its
    running mean forgets, likewise.
    """
    seen = state['count'] > 0
    delta = beta * jnp.where(seen, state['mean'], 0).sum() / jnp.maximum(seen.sum(), 1)
    delta = jax.lax.stop_gradient(delta)
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    losses = jnp.where(scores.present(chosen), links.logistic(rewards.chosen - delta), 0)
    return losses + jnp.where(scores.present(rejected), links.logistic(delta - rewards.rejected), 0), rewards


def _no_moments():
    return {'mean': jnp.zeros(()), 'std': jnp.zeros(())}


def _moved(state, gaps, present, momentum):
    """Moments after a step's `gaps [B]`: each `momentum` of what it was. One pair alone has no deviation to add."""
    pairs = present.sum()
    mean = jnp.where(present, gaps, 0).sum() / jnp.maximum(pairs, 1)
    squares = jnp.where(present, jnp.square(gaps - mean), 0).sum()
    std = jnp.sqrt(squares / jnp.maximum(pairs - 1, 1))
    return {
        'mean': jnp.where(pairs > 0, momentum * state['mean'] + (1 - momentum) * mean, state['mean']),
        'std': jnp.where(pairs > 1, momentum * state['std'] + (1 - momentum) * std, state['std']),
    }


def _standardised(gaps, state):
    """(gaps - mean) / std, without a gradient; 0 while the running deviation is 0, as where policy is reference."""
    std = state['std']
    return jax.lax.stop_gradient(jnp.where(std > 0, (gaps - state['mean']) / jnp.where(std > 0, std, 1), 0))


def _summed_gap(chosen, rejected):
    return scores.log_ratio(chosen) - scores.log_ratio(rejected)


def _summed_gap_moments(state, chosen, rejected, *, momentum: float = 0.9):
    return _moved(state, _summed_gap(chosen, rejected), scores.present(chosen), momentum)


@loss(
    'Wu et al. 2024, arXiv:2407.08639',
    couples_batch=True,
    init_state=_no_moments,
    update_state=_summed_gap_moments,
)
def beta_dpo(
    chosen: Completion, rejected: Completion, *, state, key, beta: float = 0.1, alpha: float = 0.6, rho: float = 0.2
):
    """DPO with a beta that follows the step's mean margin, on pairs drawn for margins that are not outliers.

    -log sigmoid(beta_step * h) of the pairs kept, h = log_ratio(chosen) - log_ratio(rejected); beta_step = max(0.001,
    beta * (1 + alpha * (mean of h over the kept - M))), stop-gradient; floor((1 - rho) * N) of the step's N pairs are
    kept, drawn without replacement with probability proportional to exp(-((h - M) / S)^2 / 2).

    beta > 0 is the strength of the KL penalty at the running margin, alpha >= 0 how fast it moves with the step's
    margin, rho in [0, 1) the share of pairs left out: 0.1, 0.6 and 0.2 in the authors' instructions. momentum in
    [0, 1), 0.9, is how much of the running mean M and standard deviation S of h is kept at each step; both start at 0
    and include this step's pairs (S by its N - 1 formula), as in the authors' code. While S is 0 all pairs are as
    likely. At least one pair is kept. A kept pair's loss is multiplied by N / kept, and a dropped one's is 0, so that
    a mean over all N pairs is the mean over those kept.

    Differs: the authors' code moves M and S in evaluation too.

    Unverified: the paper's own text was not read; h, M and S without the factor beta are the authors' code's.
    """
    gap, present = _summed_gap(chosen, rejected), scores.present(chosen)
    margins = jax.lax.stop_gradient(gap)
    kept, share = _drawn(key, -jnp.square(_standardised(margins, state)) / 2, present, rho)
    mean = jnp.where(kept, margins, 0).sum() / jnp.maximum(kept.sum(), 1)
    beta_step = jnp.maximum(beta * (1 + alpha * (mean - state['mean'])), LEAST_BETA)
    losses = jnp.where(kept, links.logistic(jax.lax.stop_gradient(beta_step) * gap) / share, 0)
    return losses, scores.rewards(scores.log_ratio, chosen, rejected, beta)


def _drawn(key, log_weights, present, rho):
    """Which of the slots `[B]` to keep, drawn without replacement, and the share of those present that they are.

    The Gumbel top-k: the largest of log weight + noise are such a draw. Ranks, because how many is traced. A pair's
    noise goes by its place among the pairs there are, so that empty slots between them change nothing.
    """
    pairs = jnp.maximum(present.sum(), 1)
    # A product that should be whole may round to just below it.
    count = jnp.clip(jnp.floor((1 - rho) * pairs + 1e-3), 1, pairs)
    place = jnp.maximum(jnp.cumsum(present) - 1, 0)
    noise = jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i), (), log_weights.dtype))(place)
    rank = jnp.argsort(jnp.lexsort((-(log_weights + noise), ~present)))
    return present & (rank < count), count / pairs


def _mean_gap(chosen, rejected):
    return scores.mean_log_ratio(chosen) - scores.mean_log_ratio(rejected)


def _mean_gap_moments(state, chosen, rejected, *, momentum: float = 0.9):
    return _moved(state, _mean_gap(chosen, rejected), scores.present(chosen), momentum)


@loss(
    'Wu et al. 2024, arXiv:2410.10148',
    couples_batch=True,
    init_state=_no_moments,
    update_state=_mean_gap_moments,
)
def alpha_dpo(
    chosen: Completion, rejected: Completion, *, state, beta: float = 2.5, gamma: float = 1.5, alpha: float = 0.2
):
    """SimPO whose target margin grows with how far the policy has moved from the reference on the pair.

    -log sigmoid(beta * (mean_logp(chosen) - mean_logp(rejected) - stop_gradient(alpha * z)) - gamma), z = (g - M) / S,
    g the margin of log-ratios averaged over tokens, M and S its running mean and standard deviation.

    beta > 0 scales the mean log-probabilities, gamma >= 0 is the fixed target margin (nats of reward), alpha >= 0 the
    adaptive one; 2.5, 1.5 and 0.2 are the authors' for Llama-3-Instruct (gamma / beta 0.6); alpha = 0 is SimPO.
    momentum in [0, 1), 0.9, is how much of M and S is kept at each step; this step's pairs are included, S by its
    N - 1 formula. While S is 0, as where the policy is the reference, z is 0. The rewards are beta * (mean_logp -
    alpha * mean log-ratio), as the authors log them.

    Differs: the authors' code asks for the ratio gamma / beta; here gamma is the reward margin, as for simpo. As in
    that code M and S start at 0 and are not corrected for it, so that the first ten or so steps see z up to ten times
    too large; the code divides by S = 0 where the policy is still the reference. It moves M and S in evaluation too.

    Unverified: the paper's own text was not read; the formula is the authors' code's.
    """
    shift = jax.lax.stop_gradient(alpha * _standardised(_mean_gap(chosen, rejected), state))
    margin = scores.mean_logp(chosen) - scores.mean_logp(rejected)
    rewards = (beta * (scores.mean_logp(side) - alpha * scores.mean_log_ratio(side)) for side in (chosen, rejected))
    return links.logistic(beta * (margin - shift) - gamma), Rewards(*rewards)
