"""The priors that recover known methods; `priors` says what a prior is.

In their formulas `log_pi`, `log_ref`, `forward_kl` (of reference and policy) and `reverse_kl` are a token's, and `n` is
the number of the completion's tokens.
"""

import jax
import jax.numpy as jnp

from jaxpo.losses import margins, masks, scores, token_level
from jaxpo.losses.priors import prior
from jaxpo.losses.registry import Needs
from jaxpo.types import Completion


def _reference(completion: Completion) -> jax.Array:
    (reference_logps,) = completion.reference_logps
    return reference_logps


def _token_log_ratio(completion: Completion) -> jax.Array:
    return completion.policy_logps - _reference(completion)


def _length(completion: Completion) -> jax.Array:
    """`[B, 1]`: what a part that belongs to the whole completion is divided by."""
    return scores.length(completion)[:, None]


@prior('DICE', name='dice', summary='The previous iterate, frozen, as the reference.', normalised=True)
@prior('dpo', normalised=True)
def dpo(completion: Completion, preferred_to: Completion | None, alpha):
    """The reference.

    log_ref

    DICE's own are its data, which the previous iterate samples and scores: its loss is DPO's.
    """
    return _reference(completion)


@prior('cpo', outside=('nll_weight',), reads_reference=False)
def uniform(completion: Completion, preferred_to: Completion | None, alpha):
    """Uniform over completions, finitely many of which could be normalised.

    0

    Where both completions have n tokens it also gives SimPO without gamma, with alpha = beta / n.
    """
    return jnp.zeros_like(completion.policy_logps)


@prior(
    'h_dpo',
    alpha='alpha * beta',
    matching=lambda beta, alpha: {'alpha': alpha * beta, 'entropy_weight': alpha},
)
def h_dpo(completion: Completion, preferred_to: Completion | None, alpha, *, entropy_weight: float = 0.9):
    """The reference, tempered.

    log_ref / entropy_weight

    entropy_weight > 0 is the loss's own alpha.

    Unverified: that the paper's name cEntropy means this method is inferred.
    """
    return _reference(completion) / entropy_weight


@prior('r_dpo', matching=lambda beta, alpha: {'alpha': beta, 'length_penalty': alpha})
def r_dpo(completion: Completion, preferred_to: Completion | None, alpha, *, length_penalty: float = 0.01):
    """The reference, less by a factor for every token.

    log_ref - length_penalty / alpha

    length_penalty >= 0 is the loss's own alpha, nats of reward a token.
    """
    return _reference(completion) - length_penalty / alpha


@prior('ln_dpo', depends_on_policy=True)
def ln_dpo(completion: Completion, preferred_to: Completion | None, alpha):
    """Geometric combination of policy and reference, the reference's share 1 / n for n tokens.

    log_pi - (log_pi - log_ref) / n
    """
    return completion.policy_logps - _token_log_ratio(completion) / _length(completion)


@prior(
    'simpo',
    matching=lambda beta, gamma: {'alpha': beta, 'gamma': gamma},
    reads_reference=False,
    depends_on_policy=True,
    depends_on_label=True,
)
def simpo(completion: Completion, preferred_to: Completion | None, alpha, *, gamma: float = 0.5):
    """The policy to the power 1 - 1 / n for n tokens, raised by gamma where the completion is the chosen one.

    log_pi - log_pi / n, plus gamma / (alpha * n) if chosen

    gamma >= 0 is the target margin of rewards, nats; without it zeta does not depend on the label.
    """
    log_zeta = completion.policy_logps - completion.policy_logps / _length(completion)
    return log_zeta if preferred_to is None else log_zeta + gamma / (alpha * _length(completion))


@prior('tdpo1', needs=Needs(statistics=('forward_kl',)), depends_on_policy=True)
def tdpo1(completion: Completion, preferred_to: Completion | None, alpha):
    """The reference, less where it and the policy part.

    log_ref - forward_kl
    """
    return _reference(completion) - completion.forward_kl


@prior(
    'tdpo2',
    matching=lambda beta, alpha: {'alpha': beta, 'divergence_weight': alpha},
    needs=Needs(statistics=('forward_kl',)),
    depends_on_policy=True,
    depends_on_label=True,
    stopped='the divergence of the chosen completion',
)
def tdpo2(completion: Completion, preferred_to: Completion | None, alpha, *, divergence_weight: float = 0.5):
    """The reference, less where it and the policy part; on the chosen side the divergence is held constant.

    log_ref - divergence_weight * forward_kl, that behind a stop-gradient if chosen

    divergence_weight >= 0 is the loss's own alpha. The label changes no value of zeta, only its gradient.
    """
    divergence = completion.forward_kl
    if preferred_to is not None:
        divergence = jax.lax.stop_gradient(divergence)
    return _reference(completion) - divergence_weight * divergence


@prior(
    'tis_dpo',
    matching=lambda beta, **own: {'alpha': beta, **own},
    needs=Needs(statistics=('reverse_kl',), models=('positive', 'negative')),
    depends_on_policy=True,
    depends_on_label=True,
)
def tis_dpo(
    completion: Completion,
    preferred_to: Completion | None,
    alpha,
    *,
    kl_weight: float = 1.0,
    k: float = 1.0,
    lower: float = -0.5,
    upper: float = 1.5,
):
    """Geometric combination of policy and reference, the reference's share a token's importance; more where they part.

    log_pi - w * (log_pi - log_ref) + kl_weight * w * reverse_kl

    w = k * exp(clip(log_positive - log_negative, lower, upper)) if chosen, with -clip if rejected; all four
    hyperparameters are the loss's own.
    """
    of_chosen, of_rejected = token_level.model_weights(completion, completion, k=k, lower=lower, upper=upper)
    return _importance_weighted(completion, of_rejected if preferred_to is None else of_chosen, kl_weight)


@prior(
    'tis_dpo',
    matching=lambda beta, kl_weight: {'alpha': beta, 'kl_weight': kl_weight},
    words={'weights': 'column'},
    needs=Needs(statistics=('reverse_kl',), token_columns=('token_weight',)),
    depends_on_policy=True,
)
def tis_dpo_column(completion: Completion, preferred_to: Completion | None, alpha, *, kl_weight: float = 1.0):
    """The same with a token's importance from the data, which knows the label if that does.

    log_pi - w * (log_pi - log_ref) + kl_weight * w * reverse_kl

    w is the column `token_weight`; kl_weight is the loss's own.
    """
    return _importance_weighted(completion, completion.columns['token_weight'], kl_weight)


def _importance_weighted(completion, importance, kl_weight):
    score = _token_log_ratio(completion) - kl_weight * completion.reverse_kl
    return completion.policy_logps - jax.lax.stop_gradient(importance) * score


@prior('mapo', needs=Needs(statistics=('activations', 'forward_kl')), depends_on_policy=True)
def mapo(completion: Completion, preferred_to: Completion | None, alpha):
    """Geometric combination of policy and reference, the reference's share how active it was, less where they part.

    log_pi - m * (log_pi - log_ref) - m * forward_kl
    """
    mask = masks.activation_mask(completion)
    return _masked(completion, mask, mask)


@prior(
    'sparse_po',
    outside=('reward_sparsity', 'kl_sparsity'),
    needs=Needs(statistics=('forward_kl',)),
    reads_masks=True,
    depends_on_policy=True,
)
def sparse_po(completion: Completion, preferred_to: Completion | None, alpha):
    """Geometric combination of policy and reference, the reference's share a learned mask, less where they part.

    log_pi - reward_mask * (log_pi - log_ref) - kl_mask * forward_kl
    """
    return _masked(completion, completion.masks['reward'], completion.masks['kl'])


def _masked(completion, reward_mask, kl_mask):
    return completion.policy_logps - reward_mask * _token_log_ratio(completion) - kl_mask * completion.forward_kl


@prior(
    'odpo',
    matching=lambda beta, alpha: {'alpha': beta, 'offset': alpha},
    needs=Needs(completion_columns=('score',)),
    depends_on_label=True,
)
def odpo(completion: Completion, preferred_to: Completion | None, alpha, *, offset: float = 1.0):
    """The reference, raised on the chosen completion by how far its score is ahead of the rejected one's.

    log_ref, plus offset * log(score - score_rejected) / (alpha * n) if chosen

    offset >= 0 is the loss's own alpha. zeta of a completion depends on which other it was compared with.
    """
    if preferred_to is None:
        return _reference(completion)
    ahead = margins.log_difference(completion, preferred_to)
    return _reference(completion) + offset * ahead[:, None] / (alpha * _length(completion))
