"""Losses whose margin is shifted or scaled: by scores, by length, by temper."""

import jax
import jax.numpy as jnp

from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion

LEAST_DIFFERENCE = 1e-6  # of two scores, where its logarithm is taken


@loss('Amini, Vieira and Cotterell 2024, arXiv:2402.10571', needs=Needs(completion_columns=('score',)))
def odpo(chosen: Completion, rejected: Completion, *, beta: float = 0.5, alpha: float = 1.0):
    """DPO with an offset: the margin has to exceed what the scores of the pair say.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected)) - alpha * log(score(chosen) - score(rejected))).

    beta > 0 is DPO's; the authors' commands use 0.05 to 0.7, and 0.5 for summaries. alpha >= 0 scales the offset; 1 is
    the authors' default, 0 is DPO. The data's columns `chosen_score` and `rejected_score` should have the chosen side
    strictly ahead. The logarithm diverges at ties: a difference below 1e-6, or one of the wrong sign, counts as 1e-6,
    so that such a pair asks next to nothing of the policy (the paper's limit). Differences below 1 make the offset
    negative: the unit of the scores matters.

    Unverified: the offset is as the authors' code has it; the paper itself was not at hand.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    offset = alpha * log_difference(chosen, rejected)
    return links.logistic(rewards.chosen - rewards.rejected - offset), rewards


def log_difference(chosen: Completion, rejected: Completion) -> jax.Array:
    """log(score(chosen) - score(rejected)), `[B]`; a difference below 1e-6 counts as that."""
    return jnp.log(jnp.maximum(chosen.columns['score'] - rejected.columns['score'], LEAST_DIFFERENCE))


@loss('Park et al. 2024, arXiv:2403.19159, Eq. 9')
def r_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, alpha: float = 0.01):
    """DPO with a reward for length taken out: a longer chosen completion has margin already.

    -log sigmoid(beta * (log_ratio(chosen) - log_ratio(rejected)) + alpha * (|chosen| - |rejected|)), lengths in tokens.

    beta > 0 is DPO's. alpha >= 0, nats per token, is how much length is penalised; 0 is DPO. Rewards are beta times the
    log-ratio: what is left of the reward once the penalty is paid.

    Differs: several public codes subtract the term, by which length bias grows (for them a negative alpha is right),
    and one averages log-probabilities over tokens; here the sign follows from the paper's objective, on sums.

    Unverified: the default alpha is ours, small because completions differ by tens of tokens; others report searching
    alpha in 0.05 to 1 with beta in 0.01 to 0.1.
    """
    rewards = scores.rewards(scores.log_ratio, chosen, rejected, beta)
    longer = scores.length(chosen) - scores.length(rejected)
    return links.logistic(rewards.chosen - rewards.rejected + alpha * longer), rewards


@loss('Ahrabian et al. 2024, arXiv:2407.15229')
def ln_dpo(chosen: Completion, rejected: Completion, *, beta: float = 5.0):
    """Length-normalised DPO: log-ratios are averaged over tokens.

    -log sigmoid(beta * (log_ratio(chosen) / |chosen| - log_ratio(rejected) / |rejected|)), lengths in tokens.

    beta > 0 multiplies a mean, so that it is larger than DPO's by about a completion's length; 5 is the setting of
    Tulu 3, which trains with this loss.

    Unverified: that the paper's name belongs to this formula is taken from others who cite it.
    """
    rewards = scores.rewards(scores.mean_log_ratio, chosen, rejected, beta)
    return links.logistic(rewards.chosen - rewards.rejected), rewards


@loss('Omura, Fujita and Kataoka 2024, arXiv:2411.07595')
def h_dpo(chosen: Completion, rejected: Completion, *, beta: float = 0.1, alpha: float = 0.9):
    """DPO with the policy's entropy weighed apart from its cross-entropy with the reference.

    -log sigmoid(alpha * beta * (logp(chosen) - logp(rejected)) - beta * (ref_logp(chosen) - ref_logp(rejected))),
    log-probabilities summed over the completion.

    beta > 0 is DPO's. alpha > 0 weighs the entropy: below 1 the policy becomes sharper, above 1 more diverse, and 1 is
    DPO.

    Unverified: the formula is from others who quote the paper, and follows from its objective; that the paper explores
    0.8 to 1.2 and does best a little below 1 is from memory, and the default is ours.
    """

    def score(completion):
        return scores.tempered_log_ratio(completion, alpha)

    rewards = scores.rewards(score, chosen, rejected, beta)
    return links.logistic(rewards.chosen - rewards.rejected), rewards
