"""Weightings: how much each of K references counts, by the config, by the pair itself, or by validation pairs.

A weighting is one function that gives weights `[K, B]`: at least 0, sum 1 over K, the same for both completions of a
pair, and constants to the gradient. Those that learn during the run are in `weighting_online`.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jaxpo.losses import scores
from jaxpo.references import weighting_online as weighting_online
from jaxpo.references.weighting_parts import both_there, confidence_in, for_all, normalised
from jaxpo.references.weighting_registry import WEIGHTINGS as WEIGHTINGS
from jaxpo.references.weighting_registry import Weighting as Weighting
from jaxpo.references.weighting_registry import find as find
from jaxpo.references.weighting_registry import weighting
from jaxpo.types import Completion


@weighting('the config')
def fixed(chosen: Completion, rejected: Completion, *, given: jax.Array):
    """The numbers of the config: one for each reference, by its name.

    w_k = given_k / sum_j given_j, 1 each unless the config says otherwise.
    """
    return for_all(normalised(given), chosen)


@weighting('Le et al. 2024, arXiv:2405.16388')
def arwc(chosen: Completion, rejected: Completion, *, confidence: Literal['sum', 'mean'] = 'sum'):
    """MRPO's adaptive weights: each pair's own, by how far apart a reference puts its completions.

    w_k = c_k / sum_j c_j, c_k = |lp_k(chosen) - lp_k(rejected)|, log-probabilities summed over a completion, or, with
    confidence='mean', per token of the reference's own tokenizer; uniform where every c_k is 0 or a completion is
    missing.

    The sign has no say: a reference that is sure of the wrong order counts as much. A pair's weights come from the pair
    itself, so that the mix is not one distribution over a prompt's completions. 'mean' is as Wu and Echarghaoui 2025,
    arXiv:2512.10040, have it.

    Differs: public code adds 1e-6 to the sum, so that weights sum to a little less than 1.

    Unverified: the formula is the authors' code's; the paper's own text was not at hand.
    """
    return normalised(confidence_in(chosen, rejected, confidence))


def _uniform(references: int) -> dict[str, jax.Array]:
    return {'weights': jnp.full(references, 1 / references)}


def _normalised_means(state, means):
    return {'weights': normalised(means)}


@weighting(
    'Wu and Echarghaoui 2025, arXiv:2512.10040',
    observes='validation',
    init_state=_uniform,
    observe=confidence_in,
    update=_normalised_means,
)
def vdw(chosen: Completion, rejected: Completion, *, state):
    """By discriminative confidence on validation pairs, the same for the whole run.

    w_k = sum_i c_k(i) / sum_j sum_i c_j(i) over validation pairs i, c_k = |m_k(chosen) - m_k(rejected)|, m_k the
    log-probability per token of the reference's own tokenizer; uniform where all are 0, and before validation.

    Unverified: the formula is the authors' code's; the paper's own text was not at hand.
    """
    return for_all(state['weights'], chosen)


def _observed_accuracy(chosen: Completion, rejected: Completion):
    """1 where the reference prefers chosen by token, 1/2 at a tie, else 0, also where a side is missing; `[K, B]`."""
    order = jnp.sign(scores.mean_reference_logps(chosen) - scores.mean_reference_logps(rejected))
    return jnp.where(both_there(chosen, rejected), (order + 1) / 2, 0)


@weighting(
    'Wu and Echarghaoui 2025, arXiv:2512.10040',
    observes='validation',
    init_state=_uniform,
    observe=_observed_accuracy,
    update=_normalised_means,
)
def vaw(chosen: Completion, rejected: Completion, *, state):
    """By preference accuracy on validation pairs, the same for the whole run.

    w_k = n_k / sum_j n_j, n_k the number of validation pairs with m_k(chosen) > m_k(rejected), m_k the log-probability
    per token of the reference's own tokenizer; uniform where all are 0, and before validation.

    Differs: a tie counts one half; in public code it counts nothing.

    Unverified: the formula is the authors' code's; the paper's own text was not at hand.
    """
    return for_all(state['weights'], chosen)
