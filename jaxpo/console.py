"""What a person sees: a progress bar on a terminal, a plain line now and then elsewhere, and tables. Process 0 only."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 15.0
# What a line of progress has room for: the metric, and its short name there.
SHOWN = (
    ('loss', 'loss'),
    ('rewards/accuracies', 'accuracy'),
    ('rewards/margins', 'margin'),
    ('tokens_per_second', 'tokens/s'),
)


def console() -> Console:
    """Where to print; silent on processes other than 0."""
    return Console(quiet=jax.process_index() != 0, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(steps: int, done: int = 0, what: str = 'step') -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """Gives `show(step, metrics)`, to be called as steps, or what else is counted, finish."""
    out = console()
    if not out.is_terminal:
        yield _plain_lines(out, steps, what)
        return
    columns = (
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn('{task.fields[status]}'),
    )
    with Progress(*columns, console=out) as bar:
        task = bar.add_task(what, total=steps, completed=done, status='compiling')
        yield lambda step, metrics: bar.update(task, completed=step, status=_status(metrics))


def _plain_lines(out: Console, steps: int, what: str) -> Callable[[int, Mapping[str, float]], None]:
    last = -SECONDS_BETWEEN_LINES

    def show(step, metrics):
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES or step == steps:
            last = time.monotonic()
            out.print(f'{what} {step}/{steps}  {_status(metrics)}'.rstrip())

    return show


def _status(metrics: Mapping[str, float]) -> str:
    return '  '.join(f'{short} {number(metrics[name], 3)}' for name, short in SHOWN if name in metrics)


def number(value: float, digits: int = 4) -> str:
    """A number at a readable precision."""
    return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:.{digits}g}'


def bytes_text(count: float) -> str:
    """Bytes in binary units."""
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if count < 1024:
            return f'{count:.4g} {unit}'
        count /= 1024
    return f'{count:.4g} TiB'


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table: words at the left, numbers at the right."""
    made = Table(title=title, title_justify='left', title_style='bold')
    for place, name in enumerate(header):
        made.add_column(name, justify='right' if place else 'left', overflow='fold')
    for row in rows:
        made.add_row(*row)
    return made
