"""Losses that read no reference."""

from jaxpo.losses import links, scores
from jaxpo.losses.registry import loss
from jaxpo.types import Completion, Rewards


@loss('Meng, Xia and Chen 2024, arXiv:2405.14734, Eq. 6', reads_reference=False)
def simpo(chosen: Completion, rejected: Completion, *, beta: float = 2.0, gamma: float = 0.5):
    """Logistic regression on the margin of mean token log-probabilities, less a target margin.

    -log sigmoid(beta * logp(chosen) / |chosen| - beta * logp(rejected) / |rejected| - gamma).

    beta > 0 scales the mean log-probabilities; gamma >= 0 is the target margin of rewards, nats.

    Differs: the authors' code asks for the ratio gamma / beta (default 0.25 at beta 2.0); here gamma is the paper's.
    """
    rewards = Rewards(
        beta * scores.logp(chosen) / scores.length(chosen), beta * scores.logp(rejected) / scores.length(rejected)
    )
    return links.logistic(rewards.chosen - rewards.rejected - gamma), rewards


@loss('Pang et al. 2024, arXiv:2404.19733 (as a regulariser)', reads_reference=False, normaliser='tokens')
def sft(chosen: Completion, rejected: Completion):
    """Negative log-likelihood of the chosen completion, averaged over the chosen tokens of the whole batch.

    -logp(chosen), summed here and divided by the batch's chosen tokens. Rewards are mean token log-probabilities.

    Differs: Pang et al. average within each completion, so that every pair weighs the same.
    """
    rewards = Rewards(scores.logp(chosen) / scores.length(chosen), scores.logp(rejected) / scores.length(rejected))
    return -scores.logp(chosen), rewards
