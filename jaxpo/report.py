"""What a run says of itself: what it is about to do, and what came of it."""

import json
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from rich.markup import escape

from jaxpo import sharding, storage
from jaxpo.console import bytes_text, console, number, table
from jaxpo.data.audit import overlaps
from jaxpo.data.audit import table as audit_table
from jaxpo.data.rows import Shape, lengths_of, row_tokens, run_shapes
from jaxpo.experiment import to_json
from jaxpo.loading import abstract_state
from jaxpo.metrics import read_metrics
from jaxpo.run import Pairs, Run, Schedule, make_batch
from jaxpo.tabulate import Filled

# What the table of results shows, where a run has it: the metric, its name for people, and the better direction.
RESULTS = (
    ('eval/reward', 'reward of samples', 'higher'),
    ('eval/kl', 'KL to reference (nats)', 'lower'),
    ('eval/rewards/accuracies', 'held-out accuracy', 'higher'),
    ('eval/rewards/margins', 'held-out margin (nats)', 'higher'),
    ('eval/logps/accuracies', 'accuracy without reference', 'higher'),
    ('eval/loss', 'held-out loss', 'lower'),
    ('eval/logps/chosen', 'logp of chosen (nats)', ''),
    ('eval/logps/rejected', 'logp of rejected (nats)', ''),
    ('eval/completion_tokens', 'tokens of a sample', ''),
)

BY_REFERENCE = (
    ('eval/kl/', '', 'KL to {} (nats)'),
    ('eval/references/', '/weight', 'weight of {}'),
    ('eval/references/', '/accuracies', 'accuracy of {} itself'),
)


def print_header(run: Run, pairs: Pairs, schedule: Schedule) -> None:
    """The run in a few lines, before it starts."""
    out, settings = console(), run.config
    tokens = _tokens(run, pairs, schedule)
    out.print(f'[bold]{escape(run.pretrained.name)}[/bold], {_parameter_count(run) / 1e6:.1f} M parameters')
    out.print(f'objective  {escape(json.dumps(settings.objective))}')
    out.print(f'mesh       {_mesh(run)}, {settings.model.dtype}, remat {settings.model.remat}')
    out.print(f'attention  {_attention(run)}')
    validation = f'{len(pairs.validation)} to weigh references by, ' if pairs.validation else ''
    out.print(
        f'data       {len(pairs.train)} pairs to train on, {validation}{len(pairs.evaluation)} held out, '
        f'{sum(r["dropped"] for r in pairs.reports.values())} rows dropped'
    )
    for split, audited in pairs.reports.items():
        if shared := overlaps(audited):
            out.print(f'overlap    {split}: {shared}')
    out.print(f'steps      {schedule.steps} of {settings.train.batch_pairs} pairs, {tokens:,} tokens')
    out.print(f'output     {escape(str(run.directory))}')


def print_tables(filled: Sequence[Filled], computed: str = 'computed') -> None:
    """What tables of references hold for this run, and how many completions were computed for it."""
    if not filled:
        return
    header = ('reference', 'completions', computed, 'seconds')
    rows = [(one.reference, str(one.completions), str(one.computed), f'{one.seconds:.1f}') for one in filled]
    out = console()
    out.print(table('Tables of references', header, rows))
    for one in filled:
        # Not in the table, which would cut them short: they are there to be copied.
        for directory in one.directories:
            out.print(f'{escape(one.reference)}: {escape(str(directory))}')


def print_dry_run(run: Run, pairs: Pairs, schedule: Schedule) -> None:
    """Config, audit, mesh, bytes, tokens and steps of a run that is not started. Nothing is written."""
    out = console()
    out.print_json(to_json(run.config))
    for split, audited in pairs.reports.items():
        out.print(f'{split}: {escape(audit_table(audited))}')
    print_header(run, pairs, schedule)
    out.print(table('Bytes on each device', ('what', 'bytes'), _bytes(run, pairs, schedule)))
    shapes = _shapes(run, pairs, schedule)
    header = ('microbatches x rows x tokens', 'scored tokens a row', 'steps')
    rows = [
        (f'{shape.microbatches} x {shape.rows} x {shape.tokens}', str(shape.scored), str(count))
        for shape, count in shapes.most_common()
    ]
    out.print(table('Shapes of a batch (each compiles once)', header, rows))


def _parameter_count(run: Run) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_state(run)[0].params))


def _mesh(run: Run) -> str:
    axes = ' x '.join(f'{name} {size}' for name, size in run.mesh.shape.items())
    return f'{axes} on {run.mesh.size} {run.mesh.devices.flat[0].device_kind} device(s)'


def _attention(run: Run) -> str:
    """The policy's kernel and why, and those of references that have another."""
    models = {'': run.pretrained, **{f'{name} ': opened for name, opened in run.references.items()}}
    choices = {name: run.attention_of(opened) for name, opened in models.items()}
    return '; '.join(
        f'{name}{choice.kernel} ({choice.reason})'
        for name, choice in choices.items()
        if not name or choice != choices['']
    )


def _tokens(run: Run, pairs: Pairs, schedule: Schedule) -> int:
    tokens = row_tokens(lengths_of(pairs.train), run.config.rows.layout)
    return int(sum(tokens[schedule.pairs_of(step)].sum() for step in range(schedule.steps)))


def _shapes(run: Run, pairs: Pairs, schedule: Schedule):
    batches = (schedule.pairs_of(step) for step in range(schedule.steps))
    return run_shapes(lengths_of(pairs.train), batches, run.config.rows, row_multiple=run.row_multiple)


def _bytes(run: Run, pairs: Pairs, schedule: Schedule) -> list[tuple[str, str]]:
    shapes, shardings = abstract_state(run)
    largest: Shape = max(
        _shapes(run, pairs, schedule), key=lambda shape: shape.microbatches * shape.rows * shape.tokens
    )
    steps = range(schedule.steps)
    batch = next(b for b in (_layout(run, pairs, schedule, s) for s in steps) if b.tokens.shape == largest[:3])
    sizes = {
        'policy (float32)': sharding.bytes_per_device(shapes.params, shardings.params),
        'gradients (float32)': sharding.bytes_per_device(shapes.params, shardings.params),
        'optimizer': sharding.bytes_per_device(shapes.opt_state, shardings.opt_state),
        **_reference_bytes(run, shapes, shardings),
        "method's own state and parts": sharding.bytes_per_device(
            (shapes.method_state, shapes.method_params), (shardings.method_state, shardings.method_params)
        ),
        'largest batch': sum(
            np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(batch)
        ),
    }
    return [
        (name, bytes_text(size))
        for name, size in {**sizes, 'total, activations aside': sum(sizes.values())}.items()
        if size
    ]


def _reference_bytes(run: Run, shapes, shardings) -> dict[str, int]:
    """By what is shown of it: the policy beneath its adapter, and every reference with weights of its own."""
    trees = {f'policy beneath its adapter ({run.dtype})': (shapes.base_params, shardings.base_params)}
    for name, tree in shapes.reference_params.items():
        where = ', fetched from the host for each step' if run.in_host(name) else ''
        trees[f'reference {name} ({run.dtype_of(name)}){where}'] = (tree, shardings.reference_params[name])
    for name, tree in shapes.average_params.items():
        trees[f'reference {name} (float32, follows the policy)'] = (tree, shardings.average_params[name])
    return {label: sharding.bytes_per_device(*pair) for label, pair in trees.items()}


def _layout(run: Run, pairs: Pairs, schedule: Schedule, step: int):
    return make_batch(run, [pairs.train[i] for i in schedule.pairs_of(step)])


def evaluations(directory: storage.Path, step: int) -> dict[str, float]:
    """The evaluation logged at `step`, or nothing."""
    found = [line for line in read_metrics(directory) if line['step'] == step and 'eval/seconds' in line]
    return {name: value for name, value in found[-1].items() if name.startswith('eval/')} if found else {}


def print_results(run: Run, steps: int) -> None:
    """Before and after, side by side, then a few of the sampled completions."""
    out = console()
    before, after = evaluations(run.directory, 0), evaluations(run.directory, steps)
    if after:
        rows = [
            (label, _with_error(before, name), _with_error(after, name), better)
            for name, label, better in _rows_of(after)
        ]
        out.print(table(f'{run.pretrained.name}: {steps} steps', ('', 'before', 'after', 'better'), rows))
    _print_samples(run, steps)
    out.print(f'Metrics, samples and checkpoints are in {escape(str(run.directory))}.')


def print_evaluation(run: Run, step: int, metrics: dict[str, float]) -> None:
    """One evaluation as a table."""
    rows = [(label, _with_error(metrics, name), better) for name, label, better in _rows_of(metrics)]
    console().print(table(f'{run.pretrained.name} after {step} steps', ('', 'value', 'better'), rows))


def _rows_of(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """What is shown of an evaluation: the metric, its name for people, the better direction."""
    shown = [row for row in RESULTS if row[0] in metrics]
    for prefix, suffix, label in BY_REFERENCE:
        for metric in metrics:
            name = metric.removeprefix(prefix).removesuffix(suffix)
            if metric == f'{prefix}{name}{suffix}' and not name.endswith('_standard_error') and '/' not in name:
                shown.append((metric, label.format(name), ''))
    return shown


def _with_error(metrics: dict[str, float], name: str) -> str:
    if name not in metrics:
        return ''
    error = metrics.get(f'{name}_standard_error')
    return number(metrics[name]) + ('' if error is None else f' ± {number(error)}')


def _print_samples(run: Run, steps: int) -> None:
    """The greedy completions of the first held-out prompts, before and after: not picked for what they show."""
    out = console()
    before, after = (_read_samples(run.directory / f'greedy_{step:06d}.jsonl') for step in (0, steps))
    for first, last in zip(before, after):
        out.print(f'\n[bold]{escape(first["prompt"])}[/bold]')
        for label, sample in (('before', first), ('after', last)):
            reward = '' if sample['reward'] is None else f' (reward {sample["reward"]:+.2f})'
            out.print(f'  [cyan]{label}[/cyan]{reward}: {escape(sample["completion"])}')


def _read_samples(path: storage.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()] if path.exists() else []
