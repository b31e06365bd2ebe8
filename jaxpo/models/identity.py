"""Which model this is: what its numbers depend on, wherever its files lie."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxpo.models import peft
from jaxpo.models.architecture import Architecture
from jaxpo.models.source import Pretrained


def weights_identity(pretrained: Pretrained, adapter: pathlib.Path | None = None, seed: int = 0) -> dict[str, Any]:
    """What a model's log-probabilities depend on besides tokens and compute dtype, as JSON.

    The same bytes elsewhere are the same model: no path is part of it, and neither are names that can be changed.

    Args:
      adapter: directory of the PEFT adapter that is merged into the weights.
      seed: of random weights; ignored where the weights are in files.

    Raises:
      InputError: the adapter is incomplete, or none of this architecture.
    """
    identity = {'architecture': dataclasses.asdict(pretrained.architecture), **_source(pretrained, seed)}
    return identity if adapter is None else {**identity, 'adapter': _adapter(adapter, pretrained.architecture)}


def directory_digest(paths: Iterable[pathlib.Path]) -> str:
    """sha256 of the contents of the files of one directory, in the order of their names, as 64 hex digits.

    Files are streamed. Names count by their order alone.
    """
    # Digests are of one length, so bytes cannot pass from the end of a file to the start of the next unnoticed.
    return hashlib.sha256(b''.join(_digest(path) for path in sorted(paths))).hexdigest()


def _digest(path: pathlib.Path) -> bytes:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').digest()


def _source(pretrained: Pretrained, seed: int) -> dict[str, Any]:
    if pretrained.revision is not None:
        return {'hub': pretrained.source, 'revision': pretrained.revision}
    if pretrained.tensors is None:
        return {'random': seed}
    return {'weights': directory_digest(pretrained.tensors.files)}


def _adapter(directory: pathlib.Path, architecture: Architecture) -> dict[str, Any]:
    """Its rank and targets are those of its tensors; its config adds the scale alone."""
    settings, tensors = peft.open_adapter(directory, architecture)
    return {'weights': directory_digest(tensors.files), 'scale': settings.scale}
