"""Models of a run, opened and held against its settings and one another; no weights are read."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from jaxpo import config
from jaxpo.errors import InputError
from jaxpo.models.architecture import padded
from jaxpo.models.source import Pretrained, open_model, open_sizes
from jaxpo.objective import Objective


def open_for_mesh(
    settings: config.Config, mesh: Mesh, name: str, wanted: config.Model | config.Reference, *, sizes: bool
) -> Pretrained:
    """A model as this run holds it, its vocabulary padded as asked; or its `sizes` alone.

    InputError where the mesh does not divide it.
    """
    if sizes:
        opened = open_sizes(wanted.source, wanted.revision)
    else:
        opened = open_model(wanted.source, wanted.revision, wanted.tokenizer)
    architecture = padded(opened.architecture, settings.model.vocabulary_multiple)
    for what in ('heads', 'key_value_heads'):
        number = getattr(architecture, what)
        if number % mesh.shape['tensor']:
            raise InputError(
                f'mesh.tensor {mesh.shape["tensor"]}: {name} has {number} {what}, which do not divide over it.'
            )
    return dataclasses.replace(opened, architecture=architecture)


def check_reference(name: str, reference: config.Reference, opened: Pretrained, policy: Pretrained) -> None:
    if reference.update_every and opened.architecture != policy.architecture:
        raise InputError(
            f'references.{name}: it cannot follow the policy (update_every) with another architecture than it.'
        )


def check_tokenizers(settings: config.Config, objective: Objective, others: Mapping[str, Any]) -> None:
    """InputError where a reference with another tokenizer is to be compared token by token."""
    for name in others:
        if not settings.references[name].table:
            raise InputError(
                f'references.{name}: its tokenizer differs from the policy, so their tokens cannot be compared. Its '
                f'log-probabilities of whole completions can be read from a table: set references.{name}.table.'
            )
        if name in objective.models:
            raise InputError(f'references.{name}: its tokenizer differs from the policy, but a loss reads its tokens.')
        by_token = {*objective.needs.statistics} & {'reference_entropy'}
        if by_token or objective.needs.companions:
            what = ', '.join((*by_token, *(f'companion {name}' for name in objective.needs.companions)))
            raise InputError(
                f'references.{name}: its tokenizer differs from the policy, and it gives completions of pairs a '
                f'number each; the objective also asks for: {what}.'
            )


def check_vocabularies(objective: Objective, policy: Pretrained, references: Mapping[str, Pretrained]) -> None:
    """InputError where a KL divergence is asked for between heads of different sizes (padded differently, say)."""
    if not {'forward_kl', 'reverse_kl'} & {*objective.needs.statistics}:
        return
    ours = policy.architecture.vocabulary
    for name in objective.references:
        theirs = references.get(name, policy).architecture.vocabulary
        if theirs != ours:
            names = ', '.join(term.loss.name for term in objective.terms)
            raise InputError(
                f'references.{name}: its head has {theirs} entries and the policy {ours}, so that no KL divergence '
                f'between them is defined, which {names} needs.'
            )
