"""Losses for several objectives: margins from other rewards, rounds and auxiliary rewards."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.pairwise import dpo
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion, Rewards


def _log_ratio_between(completion: Completion, newer, older):
    """log newer - log older of the completion, nats, from token log-probabilities `[B, C]` of two models."""
    return (completion.weights * (newer - older)).sum(axis=-1)


def _margin_needs(margin: str) -> Needs:
    return Needs(models=('margin',)) if margin == 'model' else Needs(completion_columns=('margin_reward',))


@loss('Zhou et al. 2023, arXiv:2310.03708', needs=_margin_needs)
def modpo(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.1,
    preference_weight: float = 0.5,
    margin: Literal['column', 'model'] = 'column',
):
    """MODPO: DPO on one objective's preferences, with the other objectives' rewards as a margin.

    -log sigmoid(reward(chosen) - reward(rejected)), reward = (beta * log_ratio - (1 - preference_weight) *
    margin_reward) / preference_weight, log-ratios summed over the completion; with `margin='model'`, margin_reward =
    beta * (log pi_margin - log pi_ref).

    beta > 0 is the strength of the KL penalty. preference_weight, above 0 to 1, is w_k of the paper: the share of the
    objective whose preferences are the data; all other weights sum to 1 - preference_weight, and 1 is DPO. The paper's
    runs sweep it; 0.5 is the middle. margin: 'column' reads the columns `chosen_margin_reward` and
    `rejected_margin_reward`, the mean of the other objectives' rewards under their weights divided by their sum
    (1 - preference_weight), in nats: a reward that is implicit has its beta in it already. 'model' takes it from the
    frozen model in the role `margin`, trained by DPO with this beta and reference on the one other objective.
    """
    rewards = Rewards(*(_modpo_reward(side, beta, preference_weight, margin) for side in (chosen, rejected)))
    return links.logistic(rewards.chosen - rewards.rejected), rewards


def _modpo_reward(completion, beta, preference_weight, margin):
    if margin == 'column':
        margin_reward = completion.columns['margin_reward']
    else:
        (reference_logps,) = completion.reference_logps
        margin_reward = beta * _log_ratio_between(completion, completion.model_logps['margin'], reference_logps)
    return (beta * scores.log_ratio(completion) - (1 - preference_weight) * margin_reward) / preference_weight


@loss('Lou et al. 2024, arXiv:2405.12739', needs=Needs(models=('earlier',)))
def spo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, multiplier: float = 0.5):
    """Sequential preference optimisation: a round learns a new objective and keeps those of earlier rounds.

    -log sigmoid(reward(chosen) - reward(rejected)), reward = beta * (log_ratio - multiplier * (log pi_ref -
    log pi_earlier)), log-ratios summed over the completion; the reference is the last round's policy.

    beta > 0 is the strength of the KL penalty, multiplier >= 0 (the paper's lambda, a Lagrange multiplier) the weight
    of earlier objectives; 0 is DPO. In round n the reference is pi_(n-1); the frozen model in the role `earlier` is the
    policy before the first round to be protected: pi_0 protects all of them. One model is enough: with one multiplier
    the gains of rounds 1 to n-1, log pi_i - log pi_(i-1), add up to log pi_(n-1) - log pi_0.

    Unverified: the paper's coefficients were not seen (0.1 and 0.5 are ours), and the form with more than two rounds is
    derived from its Lagrangian, which has a multiplier for each round.
    """
    return links.bradley_terry(beta, *(_sequential_score(side, multiplier) for side in (chosen, rejected)))


def _sequential_score(completion, multiplier):
    (reference_logps,) = completion.reference_logps
    protected = _log_ratio_between(completion, reference_logps, completion.model_logps['earlier'])
    return scores.log_ratio(completion) - multiplier * protected


@loss('Li et al. 2025, arXiv:2502.14354')
def sipo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, nll_weight: float = 0.1):
    """SIPO's second stage: DPO on self-made Pareto-optimal answers, which are also imitated.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected))) - nll_weight * logp(chosen) / length(chosen),
    log-ratios summed over the completion, length in tokens of the completion.

    beta > 0 is the strength of the KL penalty, nll_weight >= 0 the weight of the chosen answer's negative
    log-likelihood per token; 0.1 and 0.1 are the official code's.

    Differs: the official code divides by the length of prompt, completion and padding together, so that its second term
    is smaller and depends on the batch.
    """
    losses, rewards = dpo(chosen, rejected, beta=beta)
    return losses - nll_weight * scores.mean_logp(chosen), rewards


def _init_value_head(key, *, layers, width):
    """A linear value head that starts at 0: its gradient is that of regression, so no symmetry is to be broken."""
    return {'kernel': jnp.zeros((width,)), 'bias': jnp.zeros(())}


@loss(
    'Badrinath et al. 2024, arXiv:2405.17956',
    needs=Needs(statistics=('prompt_hidden',), completion_columns=('auxiliary_reward',)),
    init_params=_init_value_head,
)
def hpo(
    chosen: Completion,
    rejected: Completion,
    *,
    params,
    beta: float = 0.1,
    auxiliary_weight: float = 0.1,
    temperature: float = 0.1,
    cap: float = 20.0,
    expectile: float = 0.7,
):
    """Hybrid preference optimisation: DPO plus advantage-weighted likelihood of auxiliary rewards.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected))) + mean over both completions of (-auxiliary_weight *
    min(exp(A / temperature), cap) * logp / length + |expectile - [A < 0]| * A^2), A = auxiliary_reward - V(prompt); A
    is a constant in the middle term, and V is learned from the last one only.

    beta > 0 is the strength of DPO's KL penalty; auxiliary_weight >= 0 (the paper's gamma) weighs the likelihood term,
    where an answer counts the more the larger its advantage A over `temperature` > 0 (in units of the auxiliary
    reward), `cap` > 0 times at most; expectile, above 0 and below 1, is that of the rewards the value V regresses to
    (0.5 is their mean). V is a linear head on the policy's last hidden state of the prompt, whose gradient stops there;
    the columns `chosen_auxiliary_reward` and `rejected_auxiliary_reward` hold the sum of the auxiliary rewards with
    their weights.

    Differs: the paper's preference part is KTO's in its main runs and DPO's in others; this is DPO's.

    Unverified: expectile regression and advantage-weighted likelihood are the paper's; their exact form, dividing by
    length, the cap and all defaults are ours.
    """
    losses, rewards = dpo(chosen, rejected, beta=beta)
    extra = [_auxiliary(side, params, auxiliary_weight, temperature, cap, expectile) for side in (chosen, rejected)]
    return losses + (extra[0] + extra[1]) / 2, rewards


def _auxiliary(completion, params, auxiliary_weight, temperature, cap, expectile):
    """Advantage-weighted negative log-likelihood of one completion, and its value's regression loss."""
    hidden = jax.lax.stop_gradient(completion.prompt_hidden)
    advantage = completion.columns['auxiliary_reward'] - (hidden @ params['kernel'] + params['bias'])
    strength = jnp.minimum(jnp.exp(jax.lax.stop_gradient(advantage) / temperature), cap)
    likelihood = strength * scores.mean_logp(completion)
    return links.expectile(advantage, expectile) - auxiliary_weight * likelihood
