"""The one error a user causes: it names what is wrong, where, and the nearest valid choice."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: a missing file, a wrong key, a contradictory setting. The command line ends with exit code 2."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> InputError:
    """An InputError for a name that is not among `choices`, naming the nearest and listing all of them."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    return InputError(f'Unknown {kind} {name!r}.{hint} Known: {", ".join(choices) or "none"}.')


class TrainingError(RuntimeError):
    """A run that had to stop: what happened, at which step, and what is left intact. Exit code 1."""


class Interrupted(RuntimeError):
    """A run that was asked to stop and saved its state first. Exit code 75: the same command resumes it."""
