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
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxpo.errors import InputError, unknown
from jaxpo.losses import links
from jaxpo.losses.registry import Needs, Range, loss
from jaxpo.types import Completion

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
    words: Mapping[str, str]
    """The loss's structural words for which it is recovered, where not the default ones."""
    outside: tuple[str, ...]
    """The loss's hyperparameters that weigh terms beside the margin: it is recovered where they are 0."""
    needs: Needs
    reads_reference: bool
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
    matching: Callable[..., dict[str, Any]] = lambda beta, **_: {'alpha': beta},
    summary: str = '',
    words: Mapping[str, str] | None = None,
    outside: tuple[str, ...] = (),
    needs: Needs | None = None,
    reads_reference: bool = True,
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
        PRIORS[own] = Prior(
            function,
            recovers,
            alpha,
            matching,
            summary or inspect.getdoc(function).splitlines()[0],
            words or {},
            outside,
            needs or Needs(),
            reads_reference,
            reads_masks,
            normalised,
            depends_on_policy,
            depends_on_label,
            stopped,
        )
        if not name and not reads_masks:
            CHOICES[own] = function
        return function

    return register


def _needs(prior: str, **words) -> Needs:
    return PRIORS[prior].needs


def _reads_reference(prior: str, **words) -> bool:
    return PRIORS[prior].reads_reference


@loss(
    'Tutunov, Grosnit and Bou-Ammar 2025, arXiv:2501.01544',
    needs=_needs,
    reads_reference=_reads_reference,
    ranges={'alpha': Range(0)},
    parts={'prior': CHOICES},
)
def mi(chosen: Completion, rejected: Completion, *, alpha: float = 0.1, prior: str = 'dpo', **hyperparameters: float):
    """Logistic regression on the margin of log-probabilities measured against a prior of choice.

    -log sigmoid(alpha * ((logp(chosen) - log zeta(chosen)) - (logp(rejected) - log zeta(rejected)))).

    alpha > 0 is the price of a nat of information: beta of DPO, and 1 / beta of the paper, where beta is an inverse
    temperature. 0.1 is DPO's customary value. prior is the name of a prior, whose own hyperparameters are accepted
    beside these. Rewards are alpha * log(pi / zeta), so that they hold margins and offsets too.

    Unverified: the loss is as others summarise the paper, whose body, and so whose table of priors, was not available.
    The priors are derived from the losses they recover, and that its cEntropy is H-DPO (`h_dpo`) is an inference.
    """
    if prior not in PRIORS:
        raise unknown('mi.prior', prior, PRIORS)
    log_zeta = PRIORS[prior].function
    return links.bradley_terry(
        alpha,
        _score(chosen, log_zeta(chosen, rejected, alpha, **hyperparameters)),
        _score(rejected, log_zeta(rejected, None, alpha, **hyperparameters)),
    )


def _score(completion: Completion, log_zeta: jax.Array) -> jax.Array:
    """log pi - log zeta of the completion, nats, subtracted before it is summed."""
    return (completion.weights * (completion.policy_logps - log_zeta)).sum(axis=-1)


def unification_table() -> str:
    """The priors as a Markdown table: one token's log zeta, `alpha` in it that of `mi`, `n` the completion's tokens."""
    lines = ['| method | alpha | log zeta | what zeta is | gradient through zeta |', '|---|---|---|---|---|']
    for entry in PRIORS.values():
        conditions = [*entry.words.items(), *((name, 0) for name in entry.outside)]
        method = ', '.join([f'`{entry.recovers}`', *(f'`{name}={value}`' for name, value in conditions)])
        facts = ['a prior' if entry.genuine else 'not a prior', 'normalised' if entry.normalised else 'not normalised']
        facts += ['depends on the policy'] * entry.depends_on_policy + ['depends on the label'] * entry.depends_on_label
        what = f'{entry.summary.rstrip(".")}: {", ".join(facts)}'
        lines.append(f'| {method} | `{entry.alpha}` | `{entry.formula}` | {what} | {entry.gradient} |')
    return '\n'.join(lines)
