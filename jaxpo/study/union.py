"""Many objectives in one program: the losses of all, and traced numbers that say which of them each cell has.

A loss works on one number a pair or a token, so computing all of them and taking one costs little beside the model.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxpo.config import Scalar
from jaxpo.objective import TURNS, Objective


def joins(objective: Objective, others: Sequence[Objective]) -> bool:
    """Whether an objective can be computed together with these, which can be with each other.

    They read the same statistics, references and mixture, couple the pairs of a step all or none, make no token masks,
    and no loss stands among them with two choices of its words.
    """
    words = {term.loss.name: term.choices for other in others for term in other.terms}
    alike = all(_kind(objective) == _kind(other) for other in others)
    return alike and all(words.get(term.loss.name, term.choices) == term.choices for term in objective.terms)


def _kind(objective: Objective) -> tuple:
    masks = objective if objective.token_masks else None
    sets = tuple(frozenset(getattr(objective.needs, f.name)) for f in dataclasses.fields(objective.needs))
    flags = (objective.couples_batch, objective.takes_unpaired)
    return (sets, objective.references, objective.models, objective.mixture, flags, masks)


def union(objectives: Sequence[Objective]) -> Objective:
    """The losses of all, each once. Its hyperparameters are those of the first that has them."""
    terms, numbers = {}, {}
    for objective in objectives:
        terms |= {term.loss.name: term for term in objective.terms if term.loss.name not in terms}
        numbers = {**objective.hyperparameters, **numbers}
    return dataclasses.replace(objectives[0], terms=tuple(terms.values()), hyperparameters=numbers)


def traced(whole: Objective, objective: Objective) -> dict[str, dict[str, np.ndarray]]:
    """Hyperparameters of `whole` that make it one of the objectives it holds; all float32 scalars."""
    own = [term.loss.name for term in objective.terms]
    numbers = {**whole.hyperparameters, **objective.hyperparameters}
    turns = {
        term.loss.name: {
            'active': np.float32(term.loss.name in own),
            'place': np.int32(own.index(term.loss.name) if term.loss.name in own else -1),
        }
        for term in whole.terms
    }
    floats = {name: {key: np.float32(value) for key, value in given.items()} for name, given in numbers.items()}
    return {**floats, TURNS: turns}


def specification(whole: Objective) -> dict[str, dict[str, Scalar]]:
    """The losses of `whole` as a config has them; a mixture aside."""
    return {term.loss.name: {**whole.hyperparameters[term.loss.name], **dict(term.choices)} for term in whole.terms}
