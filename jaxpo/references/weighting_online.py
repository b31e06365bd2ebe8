"""Weightings that learn during the run: from the pairs of the steps before, or from what a step earned."""

import jax
import jax.numpy as jnp

from jaxpo.losses import scores
from jaxpo.losses.blahut_arimoto import responsibilities
from jaxpo.losses.registry import Range
from jaxpo.references.mixing import differences
from jaxpo.references.weighting_parts import confidence_in, for_all, normalised, one_hot
from jaxpo.references.weighting_registry import weighting
from jaxpo.types import Completion

LARGEST_LOG_RATIO = 5.0
"""Nats: an importance weight of `learned` is at most e^5 = 148. Those of completions from the primary reference have a
mean of 1, but a variance that a single completion can make up, and the weights would follow whichever was seen last.
More would be less bias where the policy has moved further than that, and more noise."""
LEAST_SHARE = 1e-15  # of `learned`, of the sum of shares, and that sum: float32 holds both, and one can return from it


def _empty_window(references: int, *, window: int = 1) -> dict[str, jax.Array]:
    return {'window': jnp.zeros((window, references))}


def _slid(state, means):
    return {'window': jnp.concatenate([state['window'][1:], means[None]])}


@weighting(
    'Wu and Echarghaoui 2025, arXiv:2512.10040',
    observes='step',
    init_state=_empty_window,
    observe=confidence_in,
    update=_slid,
    ranges={'window': Range(1, with_least=True)},
)
def swcw(chosen: Completion, rejected: Completion, *, state):
    """Sliding window: by discriminative confidence in the pairs of the last steps, this one's left out.

    w_k = C_k / sum_j C_j, C_k the sum over the last `window` steps of the step's mean c_k, c_k = |m_k(chosen) -
    m_k(rejected)|, m_k the log-probability per token of the reference's own tokenizer; uniform at the first step.

    window >= 1 counts steps; 1 is the authors'.

    Differs: public code weighs row i of a batch by what row i of the batch before had, two pairs that have nothing to
    do with each other; here all pairs of a step have the same weights.

    Unverified: the paper's own text was not at hand.
    """
    return for_all(normalised(state['window'].sum(axis=0)), chosen)


@weighting(
    'Wu and Echarghaoui 2025, arXiv:2512.10040',
    observes='step',
    init_state=_empty_window,
    observe=confidence_in,
    update=_slid,
    ranges={'window': Range(1, with_least=True)},
)
def swcw_one_hot(chosen: Completion, rejected: Completion, *, state, primary: int):
    """Sliding window, one reference at a time: the one most confident in the pairs of the last steps.

    w = 1 for argmax_k C_k, C_k the sum over the last `window` steps of the step's mean c_k, c_k = |m_k(chosen) -
    m_k(rejected)|, m_k the log-probability per token of the reference's own tokenizer; the primary at the first step.

    window >= 1 counts steps; 1 is the authors'. At a tie the primary is taken, or else the first.

    Unverified: the formula is the authors' code's; the paper's own text was not at hand.
    """
    return for_all(one_hot(state['window'].sum(axis=0), primary), chosen)


def _untried(references: int) -> dict[str, jax.Array]:
    return {'successes': jnp.zeros(references), 'failures': jnp.zeros(references)}


def _arm(state, key, primary, prior) -> jax.Array:
    """One-hot `[K]`: the arm drawn, or without a key the one of the highest posterior mean."""
    successes, failures = prior + state['successes'], prior + state['failures']
    if key is None:
        return one_hot(successes / (successes + failures), primary)
    return one_hot(jax.random.beta(key, successes, failures), primary)


def _credited(state, reward, *, key, primary, prior: float = 5.0):
    arm = _arm(state, key, primary, prior)
    return {'successes': state['successes'] + reward * arm, 'failures': state['failures'] + (1 - reward) * arm}


@weighting(
    'Wu and Echarghaoui 2025, arXiv:2512.10040',
    observes='reward',
    init_state=_untried,
    update=_credited,
    ranges={'prior': Range(0)},
)
def tsw(chosen: Completion, rejected: Completion, *, state, key, primary: int, prior: float = 5.0):
    """Thompson sampling: one reference a step, drawn by how often its steps raised validation accuracy.

    w = 1 for argmax_k theta_k, theta_k drawn from Beta(prior + s_k, prior + f_k), s_k and f_k being the successes and
    failures of the steps taken on reference k: a step succeeds where the policy's validation accuracy rises by it.

    prior > 0 is both counts of every reference before it is tried; 5, as the authors' (who also use 10). A reward
    between 0 and 1 is credited in parts. In evaluation nothing is drawn: the reference of the highest posterior mean is
    taken, at a tie the primary.

    Unverified: the formula is the authors' code's; the paper's own text was not at hand.
    """
    return for_all(_arm(state, key, primary, prior), chosen)


def _equal_shares(references: int) -> dict[str, jax.Array]:
    return {'shares': jnp.full(references, 1 / references)}


def _weighted_responsibilities(chosen: Completion, rejected: Completion, *, state, primary: int):
    """Responsibilities times importance weight, summed over the pair's completions, `[K, B]`; 0 of an empty slot."""
    return sum(_importance(side, primary)[None] * _responsibilities(side, state) for side in (chosen, rejected))


def _importance(completion: Completion, primary: int) -> jax.Array:
    """pi / pi_primary of the completion, truncated, `[B]`; 0 where it is missing."""
    ratio = scores.log_ratios(completion)[primary]
    return jnp.where(scores.present(completion), jnp.exp(jnp.minimum(ratio, LARGEST_LOG_RATIO)), 0)


def _responsibilities(completion: Completion, state) -> jax.Array:
    """`[K, B]`, by differences between references: alike references have alike ones, however long the completion."""
    weights = normalised(state['shares'])
    return responsibilities(jnp.log(weights), differences(completion, for_all(weights, completion)))


def _towards(state, means, *, rate: float = 0.1):
    """(1 - rate) * shares + rate * means, where anything was seen; above 0, from which nothing would return."""
    moved = (1 - rate) * state['shares'] + rate * means
    moved = jnp.where(moved.sum() > 0, moved, state['shares'])
    total = moved.sum()
    held = jnp.maximum(total, LEAST_SHARE)
    return {'shares': jnp.maximum(moved * (held / total), LEAST_SHARE * held)}


@weighting(
    'Tutunov, Grosnit and Bou-Ammar 2025, arXiv:2501.01544, by the online EM of Cappe and Moulines 2009, '
    'arXiv:0712.4273',
    observes='step',
    init_state=_equal_shares,
    observe=_weighted_responsibilities,
    update=_towards,
    ranges={'rate': Range(0, 1, with_most=True)},
)
def learned(chosen: Completion, rejected: Completion, *, state):
    """Weights that follow the policy: those of the mixture of references that its completions most likely come from.

    w_k = s_k / sum_j s_j, s <- (1 - rate) * s + rate * mean of sum_y omega(y) * r(y), r_k(y) = w_k * pi_k(y) / sum_j
    w_j * pi_j(y), omega(y) = pi(y) / pi_primary(y), over a step's pairs and the completions y of each.

    This is expectation maximisation, step by step, for the mixture nearest to the policy in
    KL(policy || sum_k w_k * pi_k), the best prior of the mutual-information objective among mixtures; under the
    arithmetic mix the reference is that very mixture. The policy is not sampled: omega is the importance weight of a
    completion that the primary reference wrote, with log omega at most 5 nats, and sums over k to what normalises the
    weights, over all that was seen. A missing completion counts nothing. rate in (0, 1], 0.1, is how far one step
    moves; all weights are equal at first, each step's come from the steps before it, and none is lost for good.

    Where the primary reference wrote both completions of every pair, labels aside, and no omega is truncated, a step's
    mean is an unbiased estimate of twice what EM would make of the weights, so that ever smaller rates lead to its
    fixed point; a constant rate hovers around it, more widely the fewer pairs a step has. With completions that
    something else wrote, or omega truncated where the policy has moved far, the mixture found is nearest to something
    else than the policy. Long completions make responsibilities nearly one-hot: which reference is likeliest then
    decides alone. And while the policy still equals the primary reference the best mixture *is* the primary: the
    weights start towards it, and leave as the policy does.

    Unverified: the paper's prior is free, and its alternation exact; that mixture weights take its place, and the
    estimate from pairs, are ours. Of Cappe and Moulines the abstract was at hand, the algorithm from memory.
    """
    return for_all(normalised(state['shares']), chosen)
