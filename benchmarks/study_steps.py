"""Seconds of a step of many cells in one program, and of one cell alone: the loop of `jaxpo study`, compiled before.

    python benchmarks/study_steps.py MODULE --seeds 0 1 --lanes 1 2 4 16 --steps 20 --rounds 3
    XLA_FLAGS=--xla_force_host_platform_device_count=2 python benchmarks/study_steps.py MODULE ...

MODULE has a get_study(). Every mode takes all its steps in turn, round by round; the first round compiles and is not
timed. A step is from one read of metrics to the next: laying out and placing its rows is in it. `study.py` says what
pairs the modules here read, and writes them.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Iterator

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax

from jaxpo import report
from jaxpo.experiment import import_module
from jaxpo.study.bundles import Bundle, bundles, single
from jaxpo.study.design import expand
from jaxpo.study.language_model import run_bundle
from jaxpo.study.workshop import Workshop


def modes(options: argparse.Namespace) -> Iterator[tuple[str, Workshop, Bundle]]:
    """All cells in one program, with each number of lanes, and the first cell alone."""
    found = import_module(options.module).get_study()
    settings = dataclasses.replace(found.base.train, steps=options.steps)
    base = dataclasses.replace(found.base, train=settings, tables=f'{options.output}/tables')
    for lanes in options.lanes:
        changes = {'base': base, 'seeds': tuple(options.seeds), 'lanes': lanes, 'cells_per_program': 1000}
        study = dataclasses.replace(found, **changes)
        (bundle,) = bundles(study, expand(study), jax.device_count())
        workshop = Workshop(study, pathlib.Path(options.module), None, report.print_tables)
        if lanes == options.lanes[0]:
            yield '1 alone', workshop, single(bundle)[0]
        yield f'{len(bundle.cells)} in one program, {lanes} at once on each device', workshop, bundle


def steps_of(workshop: Workshop, bundle: Bundle) -> list[tuple[float, float]]:
    """Wall and processor seconds of all steps but the first and the last, which evaluations follow."""
    clocks = []
    for _ in run_bundle(workshop, bundle, lambda step: clocks.append((time.perf_counter(), time.process_time()))):
        pass
    return [(end[0] - start[0], end[1] - start[1]) for start, end in zip(clocks, clocks[1:-1])]


def benchmark(options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """By mode the steps of all rounds but the first."""
    found, prepared = collections.defaultdict(list), list(modes(options))
    for number in range(options.rounds + 1):
        for name, workshop, bundle in prepared:
            steps = steps_of(workshop, bundle)
            found[name] += steps if number else []
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('module')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1])
    parser.add_argument('--lanes', type=int, nargs='+', default=[1])
    parser.add_argument('--steps', type=int, default=20)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--output', default='runs/benchmark/study/steps')
    options = parser.parse_args()
    found = benchmark(options)
    alone = statistics.median(seconds for seconds, _ in found['1 alone'])
    print(f'{jax.device_count()} devices\n| | s/step | to 1 alone | processor seconds |\n|---|---|---|---|')
    for name, steps in found.items():
        wall, processor = (statistics.median(values) for values in zip(*steps))
        print(f'| {name} | {wall:.3f} | {wall / alone:.2f} | {processor:.3f} |')


if __name__ == '__main__':
    main()
