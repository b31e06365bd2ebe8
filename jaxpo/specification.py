"""An objective as data, checked before a model is loaded: losses by name, perhaps with a mixture of references.

    {'mixture': {'mix': 'geometric'}, 'dpo': {'beta': 0.1}, 'sft': {'weight': 0.2}}

Numbers are traced (`Objective.hyperparameters`), so a new beta compiles nothing; words are structural and stay in the
function that `jaxpo.objective` makes of it.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpo import losses
from jaxpo.config import Scalar
from jaxpo.errors import InputError, unknown
from jaxpo.losses import Needs
from jaxpo.references import mixture as mixtures
from jaxpo.references.mixture import Mixture

MIXTURE = 'mixture'
_REFERENCE_STATISTICS = {'forward_kl', 'reverse_kl', 'reference_entropy', 'activations'}


@dataclasses.dataclass(frozen=True)
class Term:
    """One loss of an objective with its structural choices."""

    loss: losses.registry.Loss
    choices: tuple[tuple[str, Any], ...]

    @property
    def needs(self) -> Needs:
        return self.loss.needs_of(dict(self.choices))

    @property
    def reads_reference(self) -> bool:
        return self.loss.reads_reference_with(dict(self.choices))


@dataclasses.dataclass(frozen=True)
class Objective:
    """Terms, hashable, and the traced numbers that go with them: `{loss: {hyperparameter: value, 'weight': value}}`."""

    terms: tuple[Term, ...]
    references: tuple[str, ...]
    """Names of the references that `Completion.reference_logps` holds, in order."""
    models: tuple[str, ...]
    """Names of the run's other frozen models, each in a role that a loss names."""
    mixture: Mixture | None
    """What makes one reference of many, before every loss that reads one."""
    hyperparameters: dict[str, dict[str, float]] = dataclasses.field(hash=False, compare=False)

    @property
    def reads_reference(self) -> bool:
        return any(term.reads_reference for term in self.terms)

    @property
    def runs_references(self) -> bool:
        """Whether the references have to be computed: for their log-probabilities, or for what else they say."""
        statistics = bool(_REFERENCE_STATISTICS & {*self.needs.statistics})
        return self.reads_reference or statistics or bool(self.token_masks)

    @property
    def couples_batch(self) -> bool:
        return any(term.loss.couples_batch for term in self.terms)

    @property
    def draws_arm(self) -> bool:
        """Whether the mixture draws a reference for each step; an evaluation takes the likeliest instead."""
        return self.mixture is not None and self.mixture.observes == 'reward'

    @property
    def takes_unpaired(self) -> bool:
        return all(term.loss.takes_unpaired for term in self.terms)

    @property
    def token_masks(self) -> dict[str, Callable]:
        """Functions that make token masks of the reference's hidden states, by loss."""
        return {term.loss.name: term.loss.token_masks for term in self.terms if term.loss.token_masks}

    @property
    def needs(self) -> Needs:
        return functools.reduce(Needs.__or__, (term.needs for term in self.terms))


def mrpo(*, beta: float = 0.1, eps: float = 0.1, **mixture: Scalar) -> dict[str, dict[str, Scalar]]:
    """Multi-Reference Preference Optimization (Le et al. 2024, arXiv:2405.16388) as an objective.

    DPO against the weighted harmonic mean of the references, each clipped to a region around the primary one that is
    wider for the less likely completion of a pair, and weighted, pair by pair, by how far apart it sets them.

    Args:
      beta: DPO's.
      eps: largest relative distance of a clipped sequence log-probability from the primary's; the paper uses 0.1.
      mixture: other words of the mixture, such as `primary='base'`, or another weighting.
    """
    chosen = {'mix': 'harmonic', 'weights': 'arwc', 'clip': 'adaptive', 'eps': eps}
    return {MIXTURE: {**chosen, **mixture}, 'dpo': {'beta': beta}}


def make(spec: Mapping[str, Mapping[str, Scalar]], references: Sequence[str]) -> Objective:
    """Checks an objective and builds it.

    Args:
      spec: losses by name, each with some of its hyperparameters and perhaps a `weight` (default 1); and the `mixture`,
        where there are several references.
      references: names of the run's frozen models. Those named as a role of a loss (`positive`, `earlier`) fill it;
        the others are the references the policy is measured against.

    Raises:
      InputError: unknown loss or hyperparameter, a value of the wrong kind, no loss, an empty role, or the wrong number
        of references.
    """
    given_losses = {name: given for name, given in spec.items() if name != MIXTURE}
    if not given_losses:
        raise InputError(f'objective: names no loss. Known: {", ".join(sorted(losses.LOSSES))}.')
    terms, numbers = [], {}
    for name, given in given_losses.items():
        entry = _find(name)
        given = dict(given)
        weight = given.pop('weight', 1.0)
        losses.registry.check_number(f'{name}.weight', weight)
        entry.check(given)
        values = entry.hyperparameters(given)
        choices = entry.choices(given)
        numbers[name] = {key: float(value) for key, value in values.items() if key not in choices}
        numbers[name]['weight'] = float(weight)
        terms.append(Term(entry, tuple(sorted(choices.items()))))
    measured, models = _roles(terms, references)
    mixture = None
    if MIXTURE in spec:
        _check_mixture(terms, spec[MIXTURE])
        mixture, numbers[MIXTURE] = mixtures.make(spec[MIXTURE], measured)
    objective = Objective(tuple(terms), measured, models, mixture, numbers)
    _check_references(objective)
    if len(objective.token_masks) > 1:
        raise InputError(f'objective: {" and ".join(objective.token_masks)} both make token masks; one loss may.')
    return objective


def _find(name: str) -> losses.registry.Loss:
    if name not in losses.LOSSES:
        raise unknown('loss', name, [*losses.LOSSES, MIXTURE])
    return losses.find(name)


def _roles(terms: Sequence[Term], names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The run's frozen models, as references and as models with a role of their own."""
    roles = {role: term.loss.name for term in terms for role in term.needs.models}
    for role, loss in roles.items():
        if role not in names:
            raise InputError(
                f'objective: {loss} reads a frozen model in the role {role!r}: add it to `references` under that name. '
                f'There are: {", ".join(names) or "none"}.'
            )
    return tuple(name for name in names if name not in roles), tuple(name for name in names if name in roles)


def _check_mixture(terms: Sequence[Term], spec: Mapping[str, Scalar]) -> None:
    readers = [term for term in terms if term.reads_reference or _REFERENCE_STATISTICS & {*term.needs.statistics}]
    if not readers:
        names = ', '.join(term.loss.name for term in terms)
        raise InputError(f'objective: there is a mixture of references, but {names} reads none.')
    unused = [word for word in _words_of_a_mix(readers) if word in spec]
    if unused:
        raise InputError(
            f'objective.mixture.{unused[0]} has no effect: {readers[0].loss.name} reads the references as they are.'
        )


def _words_of_a_mix(readers: Sequence[Term]) -> tuple[str, ...]:
    """Words of a mixture that say nothing where every loss reads the references one by one."""
    return ('mix', 'order') if readers and all(term.loss.many_references for term in readers) else ()


def _check_references(objective: Objective) -> None:
    names = objective.references
    if len(names) > 1 and objective.runs_references and objective.mixture is None:
        raise InputError(
            f'references names {len(names)} models that no loss has a role for ({", ".join(names)}): say how they '
            f"count with a mixture, as in objective={{'mixture': {{'mix': 'geometric'}}, ...}}, or drop all but one."
        )
    if names:
        return
    reads = [term.loss.name for term in objective.terms if term.reads_reference]
    reads += [term.loss.name for term in objective.terms if _REFERENCE_STATISTICS & {*term.needs.statistics}]
    reads += list(objective.token_masks)
    if reads:
        raise InputError(
            f'objective: {", ".join(dict.fromkeys(reads))} reads a reference, but `references` names none.'
        )


def spelled_out(spec: Mapping[str, Mapping[str, Scalar]], references: Sequence[str]) -> dict[str, dict[str, Scalar]]:
    """The objective with every default filled in, so that each can be logged and overridden."""
    full = {
        name: {'weight': 1.0, **_find(name).hyperparameters(given)} for name, given in spec.items() if name != MIXTURE
    }
    if MIXTURE not in spec:
        return full
    terms = [Term(losses.find(name), ()) for name in full]
    terms = [Term(term.loss, tuple(term.loss.choices(spec[term.loss.name]).items())) for term in terms]
    roles = {role for term in terms for role in term.needs.models}
    mixture = mixtures.spelled_out(spec[MIXTURE], [name for name in references if name not in roles])
    # Equal weights go without saying, so that another weighting may be chosen on the command line.
    unused = {*_words_of_a_mix([term for term in terms if term.reads_reference]), *references} - {*spec[MIXTURE]}
    return {MIXTURE: {word: value for word, value in mixture.items() if word not in unused}} | full


def spelled_out_again(
    spec: Mapping[str, Mapping[str, Scalar]],
    changed: Mapping[str, Mapping[str, Scalar]],
    references: Sequence[str],
) -> dict[str, dict[str, Scalar]]:
    """`spelled_out(spec)`, some of whose values are `changed`, with the defaults that then apply.

    A default that nobody wrote goes where it no longer applies: another weighting has other hyperparameters.
    """
    before = spelled_out(spec, references)
    said = {
        name: {
            word: value
            for word, value in given.items()
            if word in spec[name] or word not in before[name] or value != before[name][word]
        }
        for name, given in changed.items()
    }
    return spelled_out(said, references)
