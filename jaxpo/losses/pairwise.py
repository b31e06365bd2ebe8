"""Losses on the margin between chosen and rejected, measured against a reference."""

from typing import Literal

from jaxpo.losses import links, scores
from jaxpo.losses.registry import loss
from jaxpo.types import Completion, Rewards


@loss('Rafailov et al. 2023, arXiv:2305.18290, Eq. 7')
def dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1):
    """Logistic regression on the margin of log-ratios.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected))), log-ratios summed over the completion.

    beta > 0 is the strength of the KL penalty; the paper uses 0.1 to 0.5.
    """
    rewards = Rewards(beta * scores.log_ratio(chosen), beta * scores.log_ratio(rejected))
    return links.logistic(rewards.chosen - rewards.rejected), rewards


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
    by_length = {'mean': scores.length, 'sum': lambda completion: 1.0}[reduction]
    chosen_score = scores.log_ratio(chosen) / by_length(chosen)
    rejected_score = scores.log_ratio(rejected) / by_length(rejected)
    losses = links.squared(chosen_score - rejected_score, 1 / (2 * tau))
    return losses, Rewards(tau * chosen_score, tau * rejected_score)
