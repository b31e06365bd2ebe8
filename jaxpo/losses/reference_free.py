"""Losses that read no reference."""

from jaxpo.losses import links, scores
from jaxpo.losses.registry import loss
from jaxpo.types import Completion


@loss('Meng, Xia and Chen 2024, arXiv:2405.14734, Eq. 6', reads_reference=False)
def simpo(chosen: Completion, rejected: Completion, *, beta: float = 2.0, gamma: float = 0.5):
    """Logistic regression on the margin of mean token log-probabilities, less a target margin.

    -log sigmoid(beta * logp(chosen) / |chosen| - beta * logp(rejected) / |rejected| - gamma).

    beta > 0 scales the mean log-probabilities; gamma >= 0 is the target margin of rewards, nats.

    Differs: the authors' code asks for the ratio gamma / beta (default 0.25 at beta 2.0); here gamma is the paper's.
    """
    rewards = scores.rewards(scores.mean_logp, chosen, rejected, beta)
    return links.logistic(rewards.chosen - rewards.rejected - gamma), rewards


@loss('Gupta et al. 2025, arXiv:2501.03884', reads_reference=False)
def alpha_po(chosen: Completion, rejected: Completion, *, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25):
    """SimPO with the shape of the reward bent by a power.

    -log sigmoid(beta * (1 - p(chosen)^-alpha) / alpha - beta * (1 - p(rejected)^-alpha) / alpha - gamma), with p the
    geometric mean of the token probabilities, exp(logp / length).

    beta > 0 scales the reward. gamma >= 0 is the target margin of rewards, nats. alpha bends the reward: 0 is SimPO,
    the logarithm; above 0 it falls more steeply for unlikely completions, below 0 less. The defaults are reported as
    the paper's for Mistral-Instruct (Table 3). Beyond p^-alpha = exp(30) the power goes on along its tangent.

    Unverified: whether the paper's 0.1 is gamma, as public code reads it, or its ratio to beta, as in SimPO's tables.
    """

    def score(completion):
        return scores.deformed_log(scores.mean_logp(completion), alpha)

    rewards = scores.rewards(score, chosen, rejected, beta)
    return links.logistic(rewards.chosen - rewards.rejected - gamma), rewards


@loss('Zhao et al. 2023, arXiv:2305.10425', reads_reference=False)
def slic(chosen: Completion, rejected: Completion, *, delta: float = 1.0, nll_weight: float = 0.1):
    """SLiC-HF: hinge loss on log-probabilities, with the likelihood of the chosen completion as regulariser.

    max(0, delta - logp(chosen) + logp(rejected)) - nll_weight * logp(chosen), all summed over the completion.

    delta > 0 is the margin that log-probabilities should reach, nats. nll_weight >= 0 is the paper's lambda, the weight
    of the regulariser. Rewards are log-probabilities. Both defaults are those of a public implementation; the paper's
    were not at hand.

    Differs: the paper regularises towards the target of supervised fine-tuning, which a preference pair does not
    carry; the chosen completion stands in, as in public code. That code averages this term over tokens, which
    `nll_weight=0` beside the term `sft` does here.
    """
    rewards = scores.rewards(scores.logp, chosen, rejected, 1.0)
    return links.hinge(rewards.chosen - rewards.rejected, delta) - nll_weight * rewards.chosen, rewards


@loss('Xu et al. 2024, arXiv:2401.08417', reads_reference=False)
def cpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, nll_weight: float = 1.0):
    """DPO with a uniform reference, plus the likelihood of the chosen completion.

    -log sigmoid(beta * (logp(chosen) - logp(rejected))) - nll_weight * logp(chosen), all summed over the completion.

    beta > 0 scales the log-probabilities; nll_weight >= 0 is the weight of the second term, 1 in the paper.

    Differs: public code averages the second term over the chosen tokens of the whole batch: that is `nll_weight=0`
    here, beside the term `sft`. The paper writes the log-probability of the whole completion, as here.

    Unverified: the paper's equation is taken from others who quote it.
    """
    rewards = scores.rewards(scores.logp, chosen, rejected, beta)
    return links.logistic(rewards.chosen - rewards.rejected) - nll_weight * scores.logp(chosen), rewards


@loss('Hong, Lee and Thorne 2024, arXiv:2403.07691, Eq. 6', reads_reference=False)
def orpo(chosen: Completion, rejected: Completion, *, odds_ratio_weight: float = 0.1):
    """Odds-ratio preference optimisation: supervised fine-tuning that also weighs the odds of the pair.

    -logp(chosen) / |chosen| - odds_ratio_weight * log sigmoid(log_odds(chosen) - log_odds(rejected)), with
    log_odds = log(p / (1 - p)) and p the geometric mean of the token probabilities, exp(logp / length).

    odds_ratio_weight >= 0 is the paper's lambda; 0.1 is the default of the field. Rewards are odds_ratio_weight times
    the mean token log-probabilities, as the field logs them.

    Differs: public code takes the first term over prompt and completion and averages it over the tokens of the batch;
    here it is the completion's alone, averaged within each pair.
    """
    log_odds_ratio = scores.log_odds(chosen) - scores.log_odds(rejected)
    losses = odds_ratio_weight * links.logistic(log_odds_ratio) - scores.mean_logp(chosen)
    return losses, scores.rewards(scores.mean_logp, chosen, rejected, odds_ratio_weight)


@loss('Pang et al. 2024, arXiv:2404.19733 (as a regulariser)', reads_reference=False, normaliser='tokens')
def sft(chosen: Completion, rejected: Completion):
    """Negative log-likelihood of the chosen completion, averaged over the chosen tokens of the whole batch.

    -logp(chosen), summed here and divided by the batch's chosen tokens. Rewards are mean token log-probabilities.

    Differs: Pang et al. average within each completion, so that every pair weighs the same.
    """
    return -scores.logp(chosen), scores.rewards(scores.mean_logp, chosen, rejected, 1.0)
