"""Metrics of a run: metrics.jsonl is the truth, TensorBoard a view of it. Process 0 alone writes."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from tensorboardX import SummaryWriter

from jaxpo.errors import InputError


@dataclasses.dataclass(frozen=True)
class MetricsLog:
    """An open log. On processes other than 0 both files are None, and writing does nothing."""

    lines: Any
    tensorboard: SummaryWriter | None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of plain numbers for `step`."""
        if self.lines is not None:
            self.lines.write(json.dumps({'step': step, **values}) + '\n')
            self.lines.flush()
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text sample, in Markdown, for TensorBoard."""
        if self.tensorboard is not None:
            self.tensorboard.add_text(name, text, step)

    def write_hyperparameters(self, hyperparameters: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's settings and final numbers, for TensorBoard's HParams view."""
        if self.tensorboard is not None:
            self.tensorboard.add_hparams(dict(hyperparameters), dict(results), name='hparams')


@contextlib.contextmanager
def open_metrics(directory: pathlib.Path, resume_step: int) -> Iterator[MetricsLog]:
    """The log of a run resumed at `resume_step` (0: new). What an interrupted run logged beyond it is dropped."""
    if jax.process_index() != 0:
        yield MetricsLog(None, None)
        return
    path = directory / 'metrics.jsonl'
    kept = [line for line in _lines(path) if line['step'] <= resume_step]
    temporary = path.with_suffix('.tmp')
    temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept), encoding='utf-8')
    temporary.replace(path)
    tensorboard = SummaryWriter(
        str(directory / 'tensorboard'),
        purge_step=resume_step + 1 if resume_step else 0,
        filename_suffix=f'.{resume_step}',  # names hold whole seconds: a quick resume would overwrite
    )
    with path.open('a', encoding='utf-8') as lines, tensorboard:
        yield MetricsLog(lines, tensorboard)


def read_metrics(directory: pathlib.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl. InputError where the run has none."""
    path = directory / 'metrics.jsonl'
    if not path.exists():
        raise InputError(f'{path} does not exist: nothing was trained there.')
    return _lines(path)


def _lines(path: pathlib.Path) -> list[dict[str, float]]:
    """Whole lines of the log; a line that an interruption cut short is no line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines(keepends=True) if line[-1] == '\n']


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested settings -> `section.field` to a string, a number or a bool (None and lists become words)."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f'{prefix}{name}.')
        else:
            flat[prefix + name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat
