"""Metrics of a run: metrics.jsonl is the truth, TensorBoard a view of it. Process 0 alone writes.

In a local directory every line is on disk at once. Objects of a bucket cannot grow: there both are kept in a local
temporary directory, and copied whole at evaluations, before checkpoints, at the end, and at lines that come
SECONDS_BETWEEN_COPIES after the last copy. A process that is killed loses the lines since; none of them is older than
its last checkpoint, and those steps are trained, and logged, again.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

import jax

from jaxpo import storage
from jaxpo.errors import InputError

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

NAME = 'metrics.jsonl'
SECONDS_BETWEEN_COPIES = 30.0


@dataclasses.dataclass
class MetricsLog:
    """An open log. On processes other than 0 both files are None, and writing does nothing."""

    lines: TextIO | None
    tensorboard: 'SummaryWriter | None'
    copy: Callable[[], None]  # what was written, to the run's directory
    copied: float = dataclasses.field(default_factory=time.monotonic)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of plain numbers for `step`."""
        if self.lines is not None:
            self.lines.write(json.dumps({'step': step, **values}) + '\n')
            self.lines.flush()
            for name, value in values.items():
                self.tensorboard.add_scalar(name, value, step)
            if time.monotonic() - self.copied > SECONDS_BETWEEN_COPIES:
                self.publish()

    def publish(self) -> None:
        """All that was written so far can be read in the run's directory, wherever that is, once this returns."""
        if self.lines is not None:
            self.tensorboard.flush()
            self.copy()
            self.copied = time.monotonic()

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text sample, in Markdown, for TensorBoard."""
        if self.tensorboard is not None:
            self.tensorboard.add_text(name, text, step)

    def write_hyperparameters(self, hyperparameters: Mapping[str, Any], results: Mapping[str, float]) -> None:
        """The run's settings and final numbers, for TensorBoard's HParams view."""
        if self.tensorboard is not None:
            self.tensorboard.add_hparams(dict(hyperparameters), dict(results), name='hparams')


@contextlib.contextmanager
def open_metrics(directory: storage.Path, resume_step: int) -> Iterator[MetricsLog]:
    """The log of a run resumed at `resume_step` (0: new). What an interrupted run logged beyond it is dropped."""
    if jax.process_index() != 0:
        yield MetricsLog(None, None, lambda: None)
        return
    kept = [line for line in _lines(directory / NAME) if line['step'] <= resume_step]
    with storage.grown_locally(directory) as (local, copy):
        path = local / NAME
        temporary = path.with_suffix('.tmp')
        temporary.write_text(''.join(json.dumps(line) + '\n' for line in kept), encoding='utf-8')
        temporary.replace(path)
        tensorboard = tensorboard_writer(
            local / 'tensorboard',
            purge_step=resume_step + 1 if resume_step else 0,
            filename_suffix=f'.{resume_step}',  # names hold whole seconds: a quick resume would overwrite
        )
        with path.open('a', encoding='utf-8') as lines, tensorboard:
            yield MetricsLog(lines, tensorboard, copy)


def tensorboard_writer(directory: storage.Path, **options: Any) -> 'SummaryWriter':
    """A writer of event files in a local `directory`; to be closed."""
    # Not at the top: where PyTorch is installed it is imported too, and every command would wait a second for it.
    from tensorboardX import SummaryWriter

    return SummaryWriter(str(directory), **options)


def read_metrics(directory: storage.Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl. InputError where the run has none."""
    path = directory / NAME
    if not path.exists():
        raise InputError(f'{path} does not exist: nothing was trained there.')
    return _lines(path)


def _lines(path: storage.Path) -> list[dict[str, float]]:
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
