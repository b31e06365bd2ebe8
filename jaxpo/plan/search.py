"""Which remat, microbatch and mesh are fastest among those that fit: ranked by arithmetic, proven by the compiler."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from jaxpo import sharding
from jaxpo.errors import InputError
from jaxpo.plan import cost
from jaxpo.plan.chips import Topology
from jaxpo.plan.program import Program, TooLarge, compile_step, example_batch, example_pair
from jaxpo.run import Run

TENSOR = (1, 2, 4, 8)
COPIES = (1, 2, 4, 8, 16)  # of the state within a replica
ROWS = (1, 2, 4, 8)  # of a microbatch, on each share of the mesh
REMAT = ('none', 'dots', 'full')


@dataclasses.dataclass(frozen=True)
class Found:
    """The fastest run that fits, and those ranked before it that did not."""

    run: Run
    program: Program
    tried: tuple[tuple[Run, TooLarge], ...]


def search(run: Run, topology: Topology, devices: Sequence[jax.Device], tries: int, tell: Callable) -> Found | None:
    """Compiles candidates from the fastest on, by arithmetic, until one fits; None where none of `tries` does."""
    tried = []
    for candidate in ranked(run, topology, devices)[:tries]:
        tell(candidate)
        result = compile_step(candidate, example_batch(candidate))
        if isinstance(result, Program) and fits(result, candidate, topology):
            return Found(candidate, result, tuple(tried))
        tried.append((candidate, result))
    return None


def fits(program: Program, run: Run, topology: Topology) -> bool:
    """Whether the conservative sum of a device's bytes is within its share of a chip's memory."""
    return program.memory.total <= topology.chip.memory * topology.chips / run.mesh.size


def ranked(run: Run, topology: Topology, devices: Sequence[jax.Device]) -> list[Run]:
    """Runs that differ in remat, microbatch and mesh, the fastest first, without those whose state has no room."""
    limit = topology.chip.memory * topology.chips / len(devices)
    timed = []
    for candidate in _candidates(run, devices):
        if sum(cost.state_bytes(candidate).values()) + _kept(candidate) < limit:
            timed.append((_estimate(candidate, topology), len(timed), candidate))
    return [candidate for _, _, candidate in sorted(timed, key=lambda one: one[:2])]


def _candidates(run: Run, devices: Sequence[jax.Device]):
    config = run.config
    for tensor in TENSOR:
        for copies in COPIES:
            within, rest = divmod(len(devices), config.mesh.replica * tensor * copies)
            if rest or not within:
                continue
            sizes = dataclasses.replace(config.mesh, data=copies, fsdp=within, tensor=tensor)
            shares = config.mesh.replica * copies * within
            for rows in ROWS:
                if rows > 1 and shares * rows > config.train.batch_pairs:
                    continue
                for remat in REMAT:
                    settings = dataclasses.replace(
                        config,
                        mesh=sizes,
                        rows=dataclasses.replace(config.rows, microbatch=shares * rows),
                        model=dataclasses.replace(config.model, remat=remat),
                    )
                    candidate = _with(run, settings, devices)
                    if candidate is not None:
                        yield candidate


def _with(run: Run, settings, devices: Sequence[jax.Device]) -> Run | None:
    """The run with other settings; None where they do not divide the model."""
    architecture = run.pretrained.architecture
    if architecture.heads % settings.mesh.tensor or architecture.key_value_heads % settings.mesh.tensor:
        return None
    experiment = dataclasses.replace(run.experiment, config=settings)
    candidate = dataclasses.replace(run, experiment=experiment, mesh=sharding.make_mesh(settings.mesh, devices))
    try:
        cost.state_bytes(candidate)
    except InputError:
        return None
    return candidate


def _kept(run: Run) -> float:
    """Least bytes that the backward pass finds kept on a device: the inputs of all layers, and without remat all that
    their products read."""
    architecture, shares = run.pretrained.architecture, sharding.row_multiple(run.mesh)
    tokens = run.config.rows.microbatch / shares * max(run.config.rows.lengths)
    item, width = np.dtype(run.dtype).itemsize, architecture.width
    inner = 0 if run.config.model.remat == 'full' else sum(b for _, b in cost.kernels(architecture))
    return tokens * item * architecture.layers * (width + inner / run.mesh.shape['tensor'])


def _estimate(run: Run, topology: Topology) -> float:
    """Seconds of a step by its roofline, what devices send one another by arithmetic too."""
    batch = example_batch(run)
    done = cost.work(run, batch, example_pair(run))
    return sum(cost.times(topology, done, run.mesh.size, cost.received_bytes(run, batch)))
