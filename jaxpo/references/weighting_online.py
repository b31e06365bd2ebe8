"""Weightings that learn during the run: from the pairs of the steps before, or from what a step earned."""

import math

import jax
import jax.numpy as jnp

from jaxpo.losses import scores
from jaxpo.losses.registry import Range
from jaxpo.references.mixing import sequence_logps
from jaxpo.references.weighting_parts import confidence_in, for_all, normalised, one_hot
from jaxpo.references.weighting_registry import weighting
from jaxpo.types import Completion

LEAST_LOG_WEIGHT = -80.0  # of `learned`: a weight that float32 holds, and from which a reference can return


def _empty_window(references: int, primary: int, *, window: int = 1) -> dict[str, jax.Array]:
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


def _untried(references: int, primary: int) -> dict[str, jax.Array]:
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


def _uniform_logs(references: int, primary: int) -> dict[str, jax.Array]:
    return {'log_weights': jnp.full(references, -math.log(references))}


def _responsibilities(completion: Completion, log_weights: jax.Array) -> jax.Array:
    """w_k * pi_k(y) / sum_j w_j * pi_j(y), `[K, B]`."""
    return jax.nn.softmax(log_weights[:, None] + sequence_logps(completion), axis=0)


def _expected_responsibilities(chosen: Completion, rejected: Completion, *, state, primary: int):
    """Those of a completion of the policy, estimated on each pair, `[K, B]`."""
    ratios = (
        scores.log_ratio(side.replace(reference_logps=side.reference_logps[primary][None]))
        for side in (chosen, rejected)
    )
    logits = jnp.stack([jnp.where(scores.present(side), x, -jnp.inf) for side, x in zip((chosen, rejected), ratios)])
    highest = logits.max(axis=0)
    odds = jnp.exp(logits - jnp.where(jnp.isfinite(highest), highest, 0)[None])
    shares = odds / jnp.maximum(odds.sum(axis=0), 1)[None]
    by_side = (_responsibilities(side, state['log_weights']) for side in (chosen, rejected))
    return sum(share[None] * each for share, each in zip(shares, by_side))


def _towards(state, means, *, rate: float = 0.1):
    """(1 - rate) * w + rate * means, in logs; none below LEAST_LOG_WEIGHT, from which nothing would return."""
    moved = jnp.logaddexp(jnp.log1p(-rate) + state['log_weights'], jnp.log(rate) + jnp.log(means))
    return {'log_weights': jax.nn.log_softmax(jnp.maximum(moved, LEAST_LOG_WEIGHT))}


@weighting(
    'the Blahut-Arimoto step of the mutual-information view, Tutunov, Grosnit and Bou-Ammar 2025, arXiv:2501.01544',
    observes='step',
    init_state=_uniform_logs,
    observe=_expected_responsibilities,
    update=_towards,
    ranges={'rate': Range(0, 1, with_most=True)},
)
def learned(chosen: Completion, rejected: Completion, *, state):
    """Weights that follow the policy: those of the mixture of references that its completions most likely come from.

    w <- (1 - rate) * w + rate * E[r(y)], r_k(y) = w_k * pi_k(y) / sum_j w_j * pi_j(y), y from the policy: expectation
    maximisation, whose fixed point is the mixture nearest to the policy in KL(policy || sum_k w_k * pi_k).

    rate in (0, 1], 0.1, is how far one step moves; all weights are equal at first. The policy's completions are not
    sampled: a pair's two are taken as draws from the primary reference, and weighted by self-normalised importance
    weights, softmax over both of log pi - log pi_primary of the whole completion (sigmoid of DPO's margin for chosen);
    a completion without a partner counts 1. This step's weights come from steps before it, and no log weight
    falls below -80. Under the arithmetic mix the reference is the very mixture.

    Unverified: the paper's prior is free, and its alternation exact; that mixture weights take its place, and the
    estimate from pairs, are ours. Long completions make responsibilities nearly one-hot, and where the primary
    reference did not write the pairs the estimate is biased.
    """
    return for_all(jnp.exp(state['log_weights']), chosen)
