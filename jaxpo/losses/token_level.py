"""Losses that weigh the tokens of a completion, or measure their distributions."""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion, Rewards

FORWARD_KL = Needs(statistics=('forward_kl',))
TOKEN_WEIGHT = Needs(token_columns=('token_weight',))


@loss('Zeng et al. 2024, arXiv:2404.11999 (TDPO1)', needs=FORWARD_KL)
def tdpo1(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """DPO with each completion's forward KL, token by token, in its reward.

    -log sigmoid(beta * (log_ratio(chosen) + D(chosen) - log_ratio(rejected) - D(rejected))), D(y) the sum over tokens
    of KL(reference || policy) of the next token.

    beta > 0 is the strength of the KL penalty; 0.1 in the authors' configuration.

    Both D are differentiated, so that the loss also falls where the chosen completion's KL grows; `tdpo2` stops that.
    """
    return links.bradley_terry(beta, *(scores.log_ratio(side) + scores.forward_kl(side) for side in (chosen, rejected)))


@loss('Zeng et al. 2024, arXiv:2404.11999 (TDPO2)', needs=FORWARD_KL)
def tdpo2(chosen: Completion, rejected: Completion, *, beta: float = 0.1, alpha: float = 0.5):
    """TDPO1 with a weaker KL term that does not differentiate the chosen completion's KL.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected) - alpha * (D(rejected) - stop_gradient(D(chosen))))),
    D(y) the sum over tokens of KL(reference || policy) of the next token.

    beta > 0 is the strength of the KL penalty, 0.1 in the authors' configuration. alpha >= 0 is the KL term's share,
    0.5 in the authors' code: 0 is DPO, and 1 has the value of TDPO1, not its gradient.

    The rewards are beta * (log_ratio + D), as the authors log them, and do not know alpha.
    """
    ratios = [scores.log_ratio(side) for side in (chosen, rejected)]
    kls = [scores.forward_kl(side) for side in (chosen, rejected)]
    margin = ratios[0] - ratios[1] - alpha * (kls[1] - jax.lax.stop_gradient(kls[0]))
    rewards = Rewards(beta * (ratios[0] + kls[0]), beta * (ratios[1] + kls[1]))
    return links.logistic(beta * margin), rewards


def column_weights(chosen: Completion, rejected: Completion):
    """Importance weights of tokens from the data: the column `token_weight`."""
    return chosen.columns['token_weight'], rejected.columns['token_weight']


def model_weights(chosen: Completion, rejected: Completion, *, k: float = 1.0, lower: float = -0.5, upper: float = 1.5):
    """Importance weights of tokens from two frozen models: one that leans to chosen completions, one to rejected."""

    def clipped(side):
        return jnp.clip(side.model_logps['positive'] - side.model_logps['negative'], lower, upper)

    return k * jnp.exp(clipped(chosen)), k * jnp.exp(-clipped(rejected))


def _tis_needs(weights):
    models = Needs(models=('positive', 'negative'))
    return {'column': TOKEN_WEIGHT, 'models': models}[weights] | Needs(statistics=('reverse_kl',))


TIS_WEIGHTS = {'column': column_weights, 'models': model_weights}


@loss('Liu et al. 2024, arXiv:2410.04350, Eq. 19 (weights)', needs=_tis_needs, parts={'weights': TIS_WEIGHTS})
def tis_dpo(
    chosen: Completion,
    rejected: Completion,
    *,
    beta: float = 0.1,
    kl_weight: float = 1.0,
    weights: Literal['column', 'models'] = 'models',
    **own,
):
    """DPO whose tokens carry importance weights, estimated by two models that lean to chosen and to rejected.

    -log sigmoid(beta * (S(chosen) - S(rejected))), S(y) = sum_t w_t * (log_ratio_t - kl_weight * KL_t), KL_t =
    KL(policy || reference) of the next token, w_t = k * exp(+-clip(log positive_t - log negative_t, lower, upper)),
    + for chosen and - for rejected tokens, or the column `token_weight`. The weights are constants.

    beta > 0 is the strength of the KL penalty, 0.1 in the authors' code. kl_weight >= 0 is the share of the KL term,
    1 in the paper. `weights` says where w comes from: `models` are the frozen models of the roles `positive` and
    `negative` (two fine-tunings, two DPO models, the second on swapped labels, or one model behind two prompts, its
    results then a column); `column` is the data's own `chosen_token_weight` and `rejected_token_weight`. With
    `models`, k > 0 is the scale, and lower <= upper bound the log-ratio of the two models, in nats.

    Differs: the authors' configuration drops the KL term (kl_weight=0), and weighs it by 0.5 where it is switched on.
    Their code maps the scores' ranks, or the clipped scores, linearly to [0.7, 1.3] instead of the exponential: give
    such weights as the column.

    Unverified: the bounds -0.5 and 1.5 are recalled, and the sign of the exponent read in a secondary source.
    """
    by_token = jax.lax.stop_gradient(TIS_WEIGHTS[weights](chosen, rejected, **own))
    weighted = [scores.reweighted(side, by) for side, by in zip((chosen, rejected), by_token)]
    return links.bradley_terry(
        beta, *(scores.log_ratio(side) - kl_weight * scores.reverse_kl(side) for side in weighted)
    )


@loss('Liu et al. 2024, arXiv:2409.06411')
def ld_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, alpha: float = 0.5):
    """DPO that discounts the tokens by which one completion is longer than the other.

    -log sigmoid(beta * (S(chosen) - S(rejected))), S(y) = sum_{t <= n} log_ratio_t + alpha * sum_{t > n} log_ratio_t,
    n the tokens of the shorter completion.

    beta > 0 is the strength of the KL penalty, as in DPO. alpha, 0 to 1, is what a token beyond the other completion's
    length counts: 1 is DPO, 0 ignores such tokens, and 0.5 is between.

    Differs: earlier implementations discount the policy's log-probabilities only, so that a policy equal to its
    reference has a margin. Here both are discounted, as TRL does now.

    Unverified: that the paper discounts both, and about alpha=0.5, are recalled.
    """
    shared = jnp.minimum(scores.length(chosen), scores.length(rejected))[:, None]

    def score(side):
        place = jnp.cumsum(side.weights, axis=-1)
        return scores.log_ratio(scores.reweighted(side, jnp.where(place <= shared, 1.0, alpha)))

    return links.bradley_terry(beta, score(chosen), score(rejected))


@loss('Kong et al. 2025, arXiv:2501.01821', needs=Needs(token_columns=('segment',)))
def sdpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """DPO on a segment of a dialogue: the turns from the error on, as many in both completions.

    -log sigmoid(beta * (S(chosen) - S(rejected))), S(y) the sum of log_ratio_t over the tokens whose column `segment`
    is above 0.

    beta > 0 is the strength of the KL penalty, 0.1 in the authors' configuration.

    The columns `chosen_segment` and `rejected_segment` mark the agent's tokens of the segment. The partition functions
    cancel, by the paper, only where both segments have the same number of turns; the data must see to that. Not to be
    mistaken for sDPO (arXiv:2403.19270), which is DPO in steps with a new reference for each.

    Unverified: the loss is from a secondary source; data and settings are from the authors' code.
    """

    def score(side):
        return scores.log_ratio(scores.reweighted(side, side.columns['segment'] > 0))

    return links.bradley_terry(beta, score(chosen), score(rejected))


@loss(
    'Xu et al. 2024, arXiv:2406.02756 (token labels from minimal edits; the DPO form is an analogue)',
    needs=TOKEN_WEIGHT,
)
def token_weighted_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """DPO whose tokens carry weights from the data, as fine-grained supervision gives them.

    -log sigmoid(beta * (S(chosen) - S(rejected))), S(y) = sum_t w_t * log_ratio_t, w_t the column `token_weight`.

    beta > 0 is the strength of the KL penalty, as in DPO.

    The columns `chosen_token_weight` and `rejected_token_weight` say how much each token counts, any number: where a
    completion was minimally edited, 1 for tokens that the edit changed and little for the rest; 1 throughout is DPO.

    Differs: the paper trains a reward model on such token labels, and a policy on its rewards with PPO. This is the
    analogue without a reward model, and no published method; `tis_dpo` adds a KL term to it and estimates the weights.
    """
    weighted = [scores.reweighted(side, side.columns['token_weight']) for side in (chosen, rejected)]
    return links.bradley_terry(beta, *map(scores.log_ratio, weighted))
