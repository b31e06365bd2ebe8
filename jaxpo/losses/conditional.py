"""Losses that compare a completion under two conditions."""

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion


@loss('Wang et al. 2024, arXiv:2406.11839', needs=Needs(companions=('corrupted',)))
def mdpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, delta: float = 0.0):
    """mDPO: the chosen answer also beats itself behind a corrupted prompt, and its reward stays positive.

    -log sigmoid(reward(chosen) - reward(rejected)) - log sigmoid(reward(chosen) - reward(corrupted)) -
    log sigmoid(reward(chosen) - delta), reward = beta * log_ratio summed over the completion; `corrupted` is the chosen
    completion behind the row's `corrupted_prompt`, under policy and reference alike.

    beta > 0 is the strength of the KL penalty; delta, in nats, is what the chosen reward should exceed (any sign). 0.1
    and 0 are the paper's.

    Differs: the paper corrupts an image by cropping it; here the prompt's text is corrupted (truncated, say). The
    official code draws another crop for the reference than for the policy; here both read the same prompt.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    corrupted = beta * scores.log_ratio(chosen.companions['corrupted'])
    preference = links.logistic(rewards.chosen - rewards.rejected)
    conditional = links.logistic(rewards.chosen - corrupted)
    return preference + conditional + links.logistic(rewards.chosen - delta), rewards
