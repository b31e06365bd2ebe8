"""What references cost: the training step of SmolLM2-135M-Instruct with K = 0, 1, 2, 4 of them, live and from tables.

K = 0 is simpo; K = 1 dpo; K = 2 and 4 MRPO (harmonic, weighted pair by pair, clipped) before dpo. All modes take the
same batches, one step of each in turn, in one process: the machine's drift is the same for all, and ratios are of the
same round. See README.md for the command.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import statistics
from collections.abc import Iterator

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import dpo_step
import jax
import record

from jaxpo import config, objective, tabulate
from jaxpo.experiment import Experiment
from jaxpo.loading import abstract_state, load_state, load_unsaved
from jaxpo.run import Run, make_batch, prepare, read_pairs
from jaxpo.state import learning_rates
from jaxpo.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Mode:
    """K references, live or from tables."""

    references: int
    table: bool

    @property
    def name(self) -> str:
        return f'K = {self.references}' + ('' if not self.references else ', table' if self.table else ', live')

    def config(self, options: argparse.Namespace) -> config.Config:
        names = tuple(f'reference_{place}' for place in range(self.references))
        spec = {0: {'simpo': {}}, 1: {'dpo': {}}}.get(self.references, objective.mrpo())
        return dataclasses.replace(
            dpo_step.make_config(options),
            objective=objective.spelled_out(spec, names),
            references={name: config.Reference(table=self.table) for name in names},
            tables=str(pathlib.Path(options.output).parent / 'tables'),
        )


MODES = (Mode(0, False), *(Mode(count, table) for table in (True, False) for count in (1, 2, 4)))


def runs(options: argparse.Namespace) -> Iterator[tuple[Mode, Run, list]]:
    """Of each mode its run, and its pairs in file order with what tables say of them."""
    count = options.batch_pairs * options.rounds
    for mode in MODES:
        run = prepare(Experiment(pathlib.Path(__file__), mode.config(options), None))
        pairs = read_pairs(run)
        told, _ = tabulate.attach(run, dataclasses.replace(pairs, train=pairs.train[:count]))
        yield mode, run, told.train


def compiled_step(run: Run, batch, settings):
    """The compiled step, and the bytes it needs: of its arguments (references included) and while it runs."""
    shapes, _ = abstract_state(run)
    step = make_train_step(run.models, run.objective, run.optimizer)
    compiled = jax.jit(step, donate_argnums=0).lower(shapes, batch, settings).compile()
    memory = compiled.memory_analysis()
    return compiled, memory.argument_size_in_bytes + memory.temp_size_in_bytes


def benchmark(options: argparse.Namespace) -> dict:
    """Seconds of every round by mode; a shape's first step compiles, and is not timed."""
    prepared = {mode: (run, pairs) for mode, run, pairs in runs(options)}
    first = prepared[MODES[0]][0]
    state, most = load_state(first), max(MODES, key=lambda mode: (not mode.table, mode.references))
    references = load_unsaved(prepared[most][0])['reference_params']
    steps, sizes = {}, collections.defaultdict(int)
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    for number in range(options.rounds):
        chosen = slice(number * options.batch_pairs, (number + 1) * options.batch_pairs)
        for mode in MODES if number % 2 else MODES[::-1]:
            run, pairs = prepared[mode]
            batch = make_batch(run, pairs[chosen])
            settings = run.traced | learning_rates(run.config.optimizer, 1)(0)
            key = mode, dpo_step.shapes_of(batch)
            if key not in steps:
                steps[key], size = compiled_step(run, batch, settings)
                sizes[mode.name] = max(sizes[mode.name], size)
            held = {} if mode.table else {name: references[name] for name in list(references)[: mode.references]}
            start = record.clocks()
            state, metrics = steps[key](state.replace(reference_params=held), make_batch(run, pairs[chosen]), settings)
            jax.block_until_ready((state, metrics))
            seconds[mode.name].append(record.elapsed(start, record.clocks())['seconds'])
            references |= state.reference_params
    return {'seconds': seconds, 'bytes': sizes}


def table(found: dict, warmup: int) -> str:
    """Markdown: by mode the median step, the median over rounds of its ratio to K = 0, and memory."""
    zero = found['seconds'][MODES[0].name][warmup:]
    lines = ['| references | s/step | to K = 0, same round | memory of a step, GiB |', '|---|---|---|---|']
    for mode in MODES:
        timed = found['seconds'][mode.name][warmup:]
        ratios = sorted(own / other for own, other in zip(timed, zero))
        quartiles = statistics.quantiles(ratios, n=4)
        cells = (
            f'{statistics.median(timed):.2f}',
            f'{quartiles[1]:.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})',
            f'{found["bytes"][mode.name] / 2**30:.2f}',
        )
        lines.append(f'| {mode.name} | {" | ".join(cells)} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pairs', default='../shared/data/ci/hh_helpful.train.jsonl')
    parser.add_argument('--layout', choices=['padded', 'packed', 'shared'], default='shared')
    parser.add_argument('--lengths', type=int, nargs='+', default=[512])
    parser.add_argument('--microbatch', type=int, default=8)
    parser.add_argument('--remat', choices=['none', 'dots', 'full'], default='dots')
    parser.add_argument('--batch-pairs', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=22)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--output', default='runs/benchmark/references.json')
    options = parser.parse_args()
    found = benchmark(options)
    pathlib.Path(options.output).write_text(json.dumps(found | {'machine': record.machine()}, indent=1) + '\n')
    print(table(found, options.warmup))


if __name__ == '__main__':
    main()
