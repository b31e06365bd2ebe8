"""Losses that weigh or scale each pair by what the models say of it."""

import math

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion, Rewards

LEAST_ENTROPY = 1e-6  # of the largest possible; its log is finite where a distribution is certain, or a slot empty


@loss('Zhou et al. 2024, arXiv:2406.11827', needs=Needs(statistics=('log_sum_squares',)))
def wpo(chosen: Completion, rejected: Completion, *, beta: float = 0.01):
    """DPO that weighs each pair by how likely the policy is to write both its completions.

    -w * log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected))), w = stop_gradient(min(1, w(chosen) *
    w(rejected))), w(y) = exp(mean over tokens of log pi(y_t) - log sum_v pi(v)^2).

    beta > 0 is the strength of the KL penalty; 0.01 in the authors' configurations. The sum over the vocabulary makes
    w(y) about 1 for completions that the policy samples itself.

    Differs: clamping the product of the weights at 1 is the authors' code's; TRL does not clamp. The paper's other
    alignment, by the most likely token, is not here.

    Unverified: the paper's own text was not read; the formula is the authors' code's.
    """
    log_weight = _alignment(chosen) + _alignment(rejected)
    weight = jax.lax.stop_gradient(jnp.exp(jnp.minimum(log_weight, 0)))
    losses, rewards = links.bradley_terry(beta, scores.log_ratio(chosen), scores.log_ratio(rejected))
    return weight * losses, rewards


def _alignment(completion):
    """Mean over tokens of how much likelier they are than the policy's own samples are on average, nats."""
    return _mean(completion, completion.policy_logps - completion.log_sum_squares)


def _mean(completion, values):
    return (completion.weights * values).sum(axis=-1) / scores.length(completion)


@loss('Zhao et al. 2024, arXiv:2410.04203', needs=Needs(statistics=('reference_entropy',)))
def rainbow_po(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 10.0,
    mixing_alpha: float = 0.25,
    home_advantage: float = 0.1,
    eta: float = 0.29,
):
    """Length-normalised DPO on part of the reference and a constant margin, scaled by the reference's certainty.

    -log sigmoid(beta * phi * (u - mixing_alpha * u_ref - (1 - mixing_alpha) * home_advantage)), u = mean_logp(chosen) -
    mean_logp(rejected) under the policy, u_ref under the reference; phi = -eta * log((H(chosen) + H(rejected)) / 2),
    H(y) the mean over tokens of the reference's entropy divided by log |V|, in (0, 1].

    beta > 0 scales the mean log-probabilities; mixing_alpha in [0, 1] is the reference's share, home_advantage >= 0 the
    margin (nats a token) of the other part, eta > 0 the strength of the scaling: 10, 0.25, 0.1 and 0.29 in the authors'
    configuration. mixing_alpha = 1 is length-normalised DPO scaled by phi; mixing_alpha = 0 is SimPO so scaled, with
    gamma = beta * home_advantage. An entropy below a millionth of log |V| counts as that. The rewards are beta * (mean
    over tokens of log pi - mixing_alpha * log pi_ref), without phi and home_advantage.

    Differs: of the paper's seven components this has the three that it keeps, with the logistic link; the authors' code
    uses home advantage 0.3 in one of its final runs, and logs rewards against the whole reference.

    Unverified: the paper's own text was not read; the formula is the authors' code's.
    """
    entropy = (_mean(chosen, chosen.reference_entropy) + _mean(rejected, rejected.reference_entropy)) / 2
    certainty = -eta * jnp.log(jnp.maximum(entropy / math.log(chosen.vocabulary), LEAST_ENTROPY))
    (chosen_reference,), (rejected_reference,) = chosen.reference_logps, rejected.reference_logps
    chosen_score = _mean(chosen, chosen.policy_logps - mixing_alpha * chosen_reference)
    rejected_score = _mean(rejected, rejected.policy_logps - mixing_alpha * rejected_reference)
    margin = chosen_score - rejected_score - (1 - mixing_alpha) * home_advantage
    return links.logistic(beta * certainty * margin), Rewards(beta * chosen_score, beta * rejected_score)
