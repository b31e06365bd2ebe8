"""The run's own train step, compiled for devices that are described: what it holds, and what it sends."""

import dataclasses
import re
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxpo import sharding
from jaxpo.data import rows
from jaxpo.loading import abstract_state, jitted_train_step
from jaxpo.plan.chips import GIB
from jaxpo.run import Run, wanted_of
from jaxpo.state import learning_rates
from jaxpo.tabulate import statistics_of
from jaxpo.types import Batch, Pair, Sequence

_OUT_OF_MEMORY = re.compile(r'([\d.]+)([GM])\)? exceeds|Used ([\d.]+)([GM]) of')  # as compilers put it


class Memory(NamedTuple):
    """Bytes on one device, as the compiler laid them out."""

    arguments: int  # state and batch
    results: int  # those that take no argument's place
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The conservative sum: as if all were held at once."""
        return sum(self)


@dataclasses.dataclass(frozen=True)
class Program:
    """A step that was compiled."""

    memory: Memory
    text: str  # the optimised program
    seconds: float  # that compiling took


@dataclasses.dataclass(frozen=True)
class TooLarge:
    """A step that the compiler found no room for."""

    needed: float | None  # bytes, as the compiler says it; None where it does not
    seconds: float


def example_pair(run: Run, index: int = 0) -> Pair:
    """A pair as long as the settings allow: its completions first, then its prompt, within the longest row."""
    data, longest = run.config.data, max(run.config.rows.lengths)
    copies = 1 if run.config.rows.layout == 'shared' else 2
    completion = max(1, min(data.max_completion_tokens, (longest - copies) // 2))
    prompt = max(1, min(data.max_prompt_tokens, (longest - 2 * completion) // copies))
    wanted, tokens = wanted_of(run.objective), np.zeros(prompt + completion, np.int32)
    columns = dict.fromkeys(wanted.numbers, 0.0) | {name: np.zeros(completion, np.float32) for name in wanted.tokens}
    companions = {name: Sequence(tokens[:prompt], tokens[:1]) for name in wanted.companions}
    names = {'chosen': completion, 'rejected': completion, **dict.fromkeys(companions, 1)}
    table = {
        name: {
            reference: {what: np.zeros(size, np.float32) for what in statistics_of(run, reference)}
            for reference in run.held('table')
        }
        for name, size in names.items()
    }
    table = {name: told for name, told in table.items() if told}
    sides = (tokens[:prompt], tokens[:completion], tokens[:completion])
    return Pair(*sides, index, columns=columns, companions=companions, table=table)


def example_batch(run: Run) -> Batch:
    """A step's batch of such pairs, as shapes on the mesh."""
    pairs = [example_pair(run, index) for index in range(run.config.train.batch_pairs)]
    host = rows.fill_rows(pairs, run.config.rows, row_multiple=run.row_multiple)
    placed = NamedSharding(run.mesh, sharding.MICROBATCHES)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), host)


def compile_step(run: Run, batch: Batch) -> Program | TooLarge:
    """Compiles the step that `jaxpo train` would run; nothing is computed and no weights are read."""
    started = time.monotonic()
    settings = run.traced | learning_rates(run.config.optimizer, 1)(0)
    lowered = jitted_train_step(run).lower(abstract_state(run)[0], batch, settings)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return TooLarge(_needed(str(error)), time.monotonic() - started)
    found = compiled.memory_analysis()
    memory = Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes - found.alias_size_in_bytes,
        found.temp_size_in_bytes,
        found.generated_code_size_in_bytes,
    )
    return Program(memory, compiled.as_text(), time.monotonic() - started)


def _needed(message: str) -> float | None:
    found = _OUT_OF_MEMORY.search(message)
    if found is None:
        return None
    number, unit = [part for part in found.groups() if part]
    return float(number) * {'G': GIB, 'M': 2**20}[unit]
