"""Runs the cells of a study that have not ended, bundle by bundle, beside other workers of the same directory."""

import contextlib
import dataclasses
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import jax
from rich.markup import escape

from jaxpo import processes, provenance, report, storage
from jaxpo.console import console, progress
from jaxpo.errors import Interrupted
from jaxpo.experiment import Reward
from jaxpo.study import compilations, language_model, records, reporting
from jaxpo.study.bundles import Bundle, single
from jaxpo.study.design import Cell, Study
from jaxpo.study.leases import Lease, Leases, holding
from jaxpo.study.records import ERROR, Compute, Outcome
from jaxpo.study.workshop import Workshop

LEASE_SECONDS = 60.0

Outcomes = Iterator[tuple[Cell, Outcome]]


@dataclasses.dataclass(frozen=True)
class Training:
    """How cells are trained."""

    check: Callable[[Sequence[Bundle]], None]
    """InputError for what cannot be trained, before anything is."""
    train: Callable[[Bundle], Outcomes]


def own_way(run_cells: Callable[[Sequence[Cell]], Outcomes]) -> Training:
    """As the experiment's module does it."""
    return Training(lambda bundles: None, lambda bundle: run_cells(bundle.cells))


def language_models(study: Study, path: pathlib.Path, reward: Reward | None) -> Training:
    """By the steps of `jaxpo train`."""
    workshop = Workshop(study, path, reward, report.print_tables)

    def check(bundles: Sequence[Bundle]) -> None:
        for bundle in {bundle.kind: bundle for bundle in bundles}.values():
            workshop.check(bundle)

    def train(bundle: Bundle) -> Outcomes:
        with progress(workshop.schedule(bundle, bundle.cells[0]).steps) as show:
            yield from language_model.run_bundle(workshop, bundle, lambda step: show(step, {}))

    return Training(check, train)


def run(
    root: storage.Path,
    study: Study,
    cells: Sequence[Cell],
    bundles: Sequence[Bundle],
    training: Training,
    shard: tuple[int, int],
    worker: str,
    retry: bool,
) -> int:
    """Runs what has not ended, then writes the report; returns the exit code: 0, or 1 where cells ended with an error.

    Raises:
      InputError: another design in this directory, or cells that cannot be trained; before any is.
      Interrupted: SIGTERM or Ctrl-C. Cells that ended are kept, the same command goes on.
    """
    out, started = console(), time.monotonic()
    processes.decide(lambda: records.check(root, study, cells))
    before = _states(root)
    wanted = [bundle for bundle in bundles if _open_cells(bundle, before, retry)]
    training.check(wanted)
    processes.decide(lambda: records.claim(root, study, cells))
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update('jax_compilation_cache_dir', str(storage.absolute(root / 'compiled')))
    out.print(f'{len(cells)} cells in {len(bundles)} programs, {_counted(before) or "none has ended"}')
    with compilations.counting() as compiled, _interruption():
        _work(root, wanted, training, shard, worker, retry)
    after = _states(root)
    out.print(f'{len(cells)} cells: {_counted(after)}, in {time.monotonic() - started:.0f} s. {compiled.text()}')
    failed = [cell.id for cell in cells if after.get(cell.id) == ERROR]
    if failed:
        out.print(f'Ended with an error: {", ".join(failed)}. `--retry` runs them again; run.json says why.')
    if jax.process_index() == 0:
        reporting.report([str(root)])
    return 1 if failed else 0


def _states(root: storage.Path) -> dict[str, str]:
    return processes.decide(lambda: records.states(root))


def _counted(states: dict[str, str]) -> str:
    counts = {state: sum(held == state for held in states.values()) for state in records.STATES}
    return ', '.join(f'{count} {state}' for state, count in counts.items() if count)


def _open_cells(bundle: Bundle, states: dict[str, str], retry: bool) -> list[Cell]:
    """The bundle's cells that are to be run."""
    ended = {cell for cell, state in states.items() if not (retry and state == ERROR)}
    return [cell for cell in bundle.cells if cell.id not in ended]


def _work(root: storage.Path, bundles: Sequence[Bundle], training: Training, shard, worker: str, retry: bool) -> None:
    """Works on bundles, those of this shard first, until all have ended, here or elsewhere."""
    leases = Leases(root / 'leases', worker, LEASE_SECONDS) if jax.process_index() == 0 else None
    index, count = shard
    left = sorted(bundles, key=lambda bundle: _place(bundle, bundles, index, count))
    tried: set[str] = set()  # with --retry an error is run again once
    while left:
        worked = False
        for bundle in list(left):
            cells = [cell for cell in _open_cells(bundle, _states(root), retry) if cell.id not in tried]
            if not cells:
                left.remove(bundle)
                continue
            held: list[Lease] = []
            if not processes.decide(lambda name=bundle.name, held=held: _acquired(leases, name, held)):
                continue
            with holding(*held) if held else contextlib.nullcontext():
                # Another may have finished some of them between the look and the lease.
                cells = [cell for cell in _open_cells(bundle, _states(root), retry) if cell.id not in tried]
                _train(root, dataclasses.replace(bundle, cells=tuple(cells)), training)
            tried |= {cell.id for cell in cells}
            left.remove(bundle)
            worked = True
        if left and not worked:
            console().print(f'Waiting for other workers: {len(left)} programs are theirs.')
            time.sleep(LEASE_SECONDS / 3)


def _place(bundle: Bundle, bundles: Sequence[Bundle], index: int, count: int) -> tuple[int, int]:
    """Its own share first; then the others', each worker from another place on."""
    place = bundles.index(bundle)
    return (place - (index - 1)) % count, place


def _acquired(leases: Leases, name: str, held: list[Lease]) -> bool:
    lease = leases.acquire(name)
    if lease is not None:
        held.append(lease)
    return lease is not None


def _train(root: storage.Path, bundle: Bundle, training: Training) -> None:
    if not bundle.cells:
        return
    versions, started, states = provenance.versions(), time.monotonic(), []
    for cell, outcome in _ended(bundle, training):
        states.append(outcome.state)
        if jax.process_index() == 0:
            records.write(root, cell, outcome, versions)
    methods = ', '.join(dict.fromkeys(cell.method for cell in bundle.cells))
    counts = ', '.join(f'{states.count(state)} {state}' for state in records.STATES if state in states)
    console().print(f'{escape(methods)}: {counts} in {time.monotonic() - started:.0f} s')


def _ended(bundle: Bundle, training: Training) -> Outcomes:
    """What came of each cell. Where a program fails, its cells are run one by one, to find whose fault it is."""
    done: set[str] = set()
    started = time.monotonic()
    try:
        for cell, outcome in training.train(bundle):
            done.add(cell.id)
            yield cell, outcome
        if done == {cell.id for cell in bundle.cells}:
            return
        raise RuntimeError('what trains the cells said nothing of some of them')
    except Interrupted:
        raise
    except Exception as error:
        problem = error
        if jax.process_count() > 1:
            raise  # the others wait in the middle of a step: all end, and the next start finds the cells open
    rest = dataclasses.replace(bundle, cells=tuple(cell for cell in bundle.cells if cell.id not in done))
    if bundle.at_once > 1 or len(bundle.cells) > 1:
        console().print(f'A program failed ({_said(problem)}): its {len(rest.cells)} cells are run one by one.')
        for one in single(rest):
            yield from _ended(one, training)
        return
    compute = Compute(time.monotonic() - started, 0, 0, jax.device_count(), 1)
    yield rest.cells[0], Outcome(ERROR, [], {}, compute, _said(problem))


def _said(error: Exception) -> str:
    return f'{type(error).__name__}: {error}'[:500]


@contextlib.contextmanager
def _interruption() -> Iterator[None]:
    """SIGTERM ends the work at once, with the leases given back. Of several processes, each has its own way already."""
    if jax.process_count() > 1:
        yield
        return

    def stop(number, frame):
        raise Interrupted('Stopped. Cells that ended are kept; the same command runs the others.')

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
