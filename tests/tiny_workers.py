"""A study of 24 cells that trains nothing, run by workers that can be given trouble at a chosen place."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np

from jaxpo import storage
from jaxpo.config import Optimizer, Train
from jaxpo.study import records, runner
from jaxpo.study.design import Cell, Method, Study, expand
from jaxpo.study.measures import PairNumbers, metrics_of
from jaxpo.study.records import FINISHED, Compute, Outcome

ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '8',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
    'PYTHONPATH': str(pathlib.Path(__file__).parent),
}
MODULE = """\
import pathlib
import tiny_workers
FOLDER = pathlib.Path(__file__).parent
def get_study():
    return tiny_workers.study(FOLDER)
def run_cells(cells):
    return tiny_workers.run_cells(FOLDER, cells)
tiny_workers.make_trouble()
"""


@dataclasses.dataclass(frozen=True)
class Base:
    """What the cells share."""

    output: str
    objective: dict = dataclasses.field(default_factory=lambda: {'dpo': {}})
    optimizer: Optimizer = Optimizer()
    train: Train = Train(steps=3)


def study(folder: pathlib.Path) -> Study:
    methods = {
        'dpo': Method({'dpo': {}}, {'objective.dpo.beta': (0.1, 0.3)}),
        'ipo': Method({'ipo': {}}, {'objective.ipo.tau': (0.1, 0.3)}),
    }
    return Study(Base(str(folder / 'study')), methods, seeds=(0, 1, 2, 3))


def write_module(folder: pathlib.Path) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    path = folder / 'experiment.py'
    path.write_text(MODULE)
    return path


def run_cells(folder: pathlib.Path, cells):
    """Cells whose numbers are drawn by their names. Each leaves a line in `ran`; `folder/broken` names one that fails;
    `folder/slow` makes each take a while."""
    for cell in cells:
        trouble('training')
        with (folder / 'ran').open('a') as ran:
            ran.write(f'{cell.id} {os.getpid()}\n')
        broken = folder / 'broken'
        if broken.exists() and cell.id in broken.read_text():
            raise RuntimeError('the dog ate it')
        time.sleep(0.1 if (folder / 'slow').exists() else 0)
        yield cell, outcome(cell)


def outcome(cell: Cell) -> Outcome:
    """What is found of a cell, by its name alone."""
    lines, last = [], {}
    for step in (0, 3):
        for split in ('selection', 'report'):
            last[split] = numbers(np.random.default_rng(int(cell.id, 16)), step)
            lines.append({'step': step, 'split': split, **metrics_of(last[split])})
    return Outcome(FINISHED, lines, last, Compute(0.5, 3, 100, 1, 1))


def numbers(random: np.random.Generator, step: int) -> PairNumbers:
    count, names = 12, [field.name for field in dataclasses.fields(PairNumbers)]
    found = {name: random.normal(size=count) * (1 if 'start' in name else step) for name in names}
    whole = {'pair': np.arange(count), 'prompt': np.arange(count) // 2}
    whole |= {name: random.integers(1, 9, count) for name in ('chosen_tokens', 'rejected_tokens')}
    return PairNumbers(**found | whole)


def ran(folder: pathlib.Path) -> list[str]:
    """Cells in the order in which workers ran them."""
    return [line.split()[0] for line in (folder / 'ran').read_text().splitlines()]


def results(folder: pathlib.Path) -> dict[str, bytes]:
    """What decides a report, by file: no timings."""
    root = folder / 'study'
    files = [*root.glob('cells/*/metrics.jsonl'), *root.glob('cells/*/pairs.jsonl'), *root.glob('done/*')]
    return {str(file.relative_to(root)): file.read_bytes() for file in files}


def kept(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """All files of cells that have ended, with the time they were written at."""
    root, found = folder / 'study', {}
    for cell in records.states(storage.path(root)):
        for file in (root / 'cells' / cell).rglob('*'):
            if file.is_file():
                found[str(file)] = file.stat().st_mtime_ns, file.read_bytes()
    return found


def ids(folder: pathlib.Path) -> list[str]:
    return [cell.id for cell in expand(study(folder))]


_calls: dict[str, int] = {}


def trouble(place: str) -> None:
    """Where the environment says `TROUBLE=PLACE:NUMBER`, the process is killed when it comes by for that time."""
    _calls[place] = _calls.get(place, 0) + 1
    if os.environ.get('TROUBLE') == f'{place}:{_calls[place]}':
        os.kill(os.getpid(), signal.SIGKILL)


def make_trouble() -> None:
    """Lets the runner come by the places of trouble, and wait for others only briefly."""
    runner.LEASE_SECONDS = float(os.environ.get('LEASE_SECONDS', '60'))
    if 'TROUBLE' in os.environ:
        _after(records, '_write_tensorboard', 'files')
        _after(runner, '_acquired', 'lease')


def _after(module, name: str, place: str) -> None:
    plain = getattr(module, name)

    def called(*arguments):
        found = plain(*arguments)
        trouble(place)
        return found

    setattr(module, name, called)


def start(path: pathlib.Path, *words: str, **environment: str) -> subprocess.Popen:
    """`jaxpo study` in a process of its own."""
    command = [sys.executable, '-m', 'jaxpo', 'study', str(path), *words]
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
    return subprocess.Popen(command, env={**os.environ, **ENVIRONMENT, **environment}, **pipes)


def end(process: subprocess.Popen, seconds: float = 240) -> tuple[int, str]:
    """Its exit code and what it said."""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, said
