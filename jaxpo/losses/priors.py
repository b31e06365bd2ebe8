"""The mutual-information view of "Many of Your DPOs are Secretly One" (Tutunov, Grosnit and Bou-Ammar 2025).

A policy that earns reward r while its completions tell little of the prompt maximises E[r] - alpha * KL(pi || zeta) for
a prior zeta, so that r = alpha * log(pi / zeta) up to a term of the prompt alone. Preferences are then fitted by `mi`,
and a method is its prior: a function

    (completion, preferred_to, alpha, *, hyperparameters) -> log zeta of each token [B, C], nats,

registered by `prior`. `preferred_to` is the rejected completion where `completion` is the chosen one, and None where it
is the rejected one: only priors that are no function of the completion look at it. What belongs to the whole completion
is spread evenly over its tokens, so that sums are exact; a weightless token has no say.

The paper's beta is an inverse temperature: alpha is 1 / that beta, and is DPO's beta. The paper's table of priors was
not available: the priors here were derived from the losses, whose values and gradients the tests hold them to.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxpo.errors import InputError, unknown
from jaxpo.losses import links, scores
from jaxpo.losses.registry import Needs, loss
from jaxpo.types import Completion, Rewards

PRIORS: dict[str, 'Prior'] = {}
CHOICES: dict[str, Callable] = {}
"""Those of PRIORS that an objective may name: not a second name of another, and none that reads trained masks."""


@dataclasses.dataclass(frozen=True)
class Prior:
    """A prior and what is true of it."""

    function: Callable
    recovers: str
    """The method: the name of a registered loss, or one that shares a loss's formula."""
    alpha: str
    """`mi`'s alpha in the loss's own hyperparameters."""
    matching: Callable[..., dict[str, Any]]
    """The loss's hyperparameters to those of `mi` that give the same loss."""
    summary: str
    """What zeta is."""
    needs: Needs
    reads_masks: bool
    """Whether it reads `Completion.masks`, which are trained: only another loss than `mi` trains them."""
    normalised: bool
    """Whether exp(log zeta), as it stands, sums to 1 over the completions of a prompt."""
    depends_on_policy: bool
    """Whether zeta changes with the policy: a stop-gradient then changes the loss's gradient."""
    depends_on_label: bool
    """Whether zeta of a completion depends on its being the chosen one, or on the other completion."""
    stopped: str
    """The part of zeta behind a stop-gradient, which the loss has too; empty where there is none."""

    @property
    def formula(self) -> str:
        """log zeta of a token: the docstring's second paragraph."""
        return ' '.join(inspect.getdoc(self.function).split('\n\n')[1].split())

    @property
    def genuine(self) -> bool:
        """Whether zeta is fixed before policy and label, as a prior is. A normaliser may be lacking: it cancels."""
        return not self.depends_on_policy and not self.depends_on_label

    @property
    def gradient(self) -> str:
        """What a stop-gradient on log zeta would do."""
        if not self.depends_on_policy:
            return 'none to stop'
        return f'flows, but not through {self.stopped}' if self.stopped else 'flows: must not be stopped'


def prior(
    recovers: str,
    *,
    name: str = '',
    alpha: str = 'beta',
    matching: Callable[..., dict[str, Any]] = lambda beta: {'alpha': beta},
    summary: str = '',
    needs: Needs | None = None,
    reads_masks: bool = False,
    normalised: bool = False,
    depends_on_policy: bool = False,
    depends_on_label: bool = False,
    stopped: str = '',
):
    """Registers a prior under its function's name. Tests hold it to what it says; arguments as the fields of Prior.

    Args:
      name: another name, where the function has one already.
      summary: what zeta is; the docstring's first line unless given.
    """

    def register(function):
        own = name or function.__name__
        known = PRIORS.get(own)
        if known and inspect.getsourcefile(known.function) != inspect.getsourcefile(function):
            raise InputError(f'The prior {own!r} is registered already: it recovers {known.recovers}.')
        said = summary or inspect.getdoc(function).splitlines()[0]
        facts = (normalised, depends_on_policy, depends_on_label, stopped)
        PRIORS[own] = Prior(function, recovers, alpha, matching, said, needs or Needs(), reads_masks, *facts)
        if not name and not reads_masks:
            CHOICES[own] = function
        return function

    return register


def _needs(prior: str, **words) -> Needs:
    return PRIORS[prior].needs


@loss(
    'Tutunov, Grosnit and Bou-Ammar 2025, arXiv:2501.01544',
    needs=_needs,
    parts={'prior': CHOICES},
)
def mi(chosen: Completion, rejected: Completion, *, alpha: float = 0.1, prior: str = 'dpo', **hyperparameters: float):
    """Logistic regression on the margin of log-probabilities measured against a prior of choice.

    -log sigmoid(alpha * ((logp(chosen) - log zeta(chosen)) - (logp(rejected) - log zeta(rejected)))).

    alpha > 0 is the price of a nat of information, 1 / beta of the paper and beta of DPO; 0.1 is DPO's customary value,
    since the paper names none. prior is the name of a prior, whose own hyperparameters are accepted beside these.

    Unverified: the paper's table of priors was not available. The priors are derived from the losses they recover.
    """
    if prior not in PRIORS:
        raise unknown('mi.prior', prior, PRIORS)
    log_zeta = PRIORS[prior].function
    rewards = Rewards(
        alpha * _score(chosen, log_zeta(chosen, rejected, alpha, **hyperparameters)),
        alpha * _score(rejected, log_zeta(rejected, None, alpha, **hyperparameters)),
    )
    return links.logistic(rewards.chosen - rewards.rejected), rewards


def _score(completion: Completion, log_zeta: jax.Array) -> jax.Array:
    """log pi - log zeta of the completion, nats, subtracted before it is summed."""
    return (completion.weights * (completion.policy_logps - log_zeta)).sum(axis=-1)


def _reference(completion: Completion) -> jax.Array:
    (reference_logps,) = completion.reference_logps
    return reference_logps


def _token_log_ratio(completion: Completion) -> jax.Array:
    return completion.policy_logps - _reference(completion)


def _length(completion: Completion) -> jax.Array:
    """`[B, 1]`: what a part that belongs to the whole completion is divided by."""
    return scores.length(completion)[:, None]


@prior('dpo', normalised=True)
@prior('DICE', name='dice', summary='The previous iterate, frozen, as the reference.', normalised=True)
def dpo(completion: Completion, preferred_to: Completion | None, alpha):
    """The reference.

    log_ref

    DICE's own are its data, which the previous iterate samples and scores: its loss is DPO's.
    """
    return _reference(completion)


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
def r_dpo(completion: Completion, preferred_to: Completion | None, alpha, *, length_penalty: float = 0.05):
    """The reference, less by a factor for every token.

    log_ref - length_penalty / alpha

    length_penalty >= 0 is the loss's own alpha, nats of reward a token.
    """
    return _reference(completion) - length_penalty / alpha


@prior('ln_dpo', depends_on_policy=True)
def ln_dpo(completion: Completion, preferred_to: Completion | None, alpha):
    """A geometric mixture of policy and reference, the reference's share 1 / n for n tokens.

    log_pi - (log_pi - log_ref) / n
    """
    return completion.policy_logps - _token_log_ratio(completion) / _length(completion)


@prior(
    'simpo',
    matching=lambda beta, gamma: {'alpha': beta, 'gamma': gamma},
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

    log_ref - KL(ref || pi)
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

    log_ref - divergence_weight * KL(ref || pi), KL behind a stop-gradient if chosen

    divergence_weight >= 0 is the loss's own alpha. The label changes no value of zeta, only its gradient.
    """
    divergence = completion.forward_kl
    if preferred_to is not None:
        divergence = jax.lax.stop_gradient(divergence)
    return _reference(completion) - divergence_weight * divergence


@prior(
    'sparse_po',
    matching=lambda beta, **_: {'alpha': beta},
    needs=Needs(statistics=('forward_kl',)),
    reads_masks=True,
    depends_on_policy=True,
)
def sparse_po(completion: Completion, preferred_to: Completion | None, alpha):
    """A geometric mixture of policy and reference, token by token as a learned mask says, less where they part.

    log_pi - reward_mask * (log_pi - log_ref) - kl_mask * KL(ref || pi)

    The L1 penalty of SparsePO stands outside.
    """
    masks = completion.masks
    return (
        completion.policy_logps - masks['reward'] * _token_log_ratio(completion) - masks['kl'] * completion.forward_kl
    )


def unification_table() -> str:
    """The priors as a Markdown table: log zeta is that of one token, `n` the completion's tokens."""
    lines = ['| method | alpha | log zeta of a token | what zeta is | gradient through zeta |', '|---|---|---|---|---|']
    for entry in PRIORS.values():
        facts = ['a prior' if entry.genuine else 'not a prior']
        facts += ['normalised' if entry.normalised else 'not normalised']
        facts += ['depends on the policy'] * entry.depends_on_policy + ['depends on the label'] * entry.depends_on_label
        lines.append(
            f'| `{entry.recovers}` | `{entry.alpha}` | `{entry.formula}` | {entry.summary} ({", ".join(facts)}) '
            f'| {entry.gradient} |'
        )
    return '\n'.join(lines)
