"""`jaxpo plan EXPERIMENT --topology NAME`: compiles the experiment's step for hardware that is not here, and says what
it would take."""

import argparse
import dataclasses

from jaxpo.console import bytes_text, console, number, table
from jaxpo.errors import InputError
from jaxpo.experiment import Experiment
from jaxpo.plan import cost
from jaxpo.plan.advice import advise
from jaxpo.plan.chips import CHIPS, Topology, parse_topology
from jaxpo.plan.collectives import by_kind, collectives
from jaxpo.plan.hardware import describe
from jaxpo.plan.program import Program, TooLarge, compile_step, example_batch, example_pair
from jaxpo.plan.search import fits, search
from jaxpo.run import Run, prepare

EXAMPLES = 'v5e:16x16, v6e:4x4, v5p:4x4x4, h200:1x1x8'


@dataclasses.dataclass(frozen=True)
class Options:
    """What `jaxpo plan` is asked for, beside the experiment."""

    topology: str
    slices: int = 1
    mfu: float = 0.4  # share of the chips' peak that the model's own FLOPs reach
    price: float | None = None  # of a chip for an hour, in any currency
    search: int = 0  # compilations that a search may take; 0: none


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command line."""
    parser.add_argument('--topology', default='', metavar='KIND:SIDES', help=f'{", ".join(CHIPS)}: {EXAMPLES}')
    parser.add_argument('--slices', type=int, default=1, help='slices of a TPU pod')
    parser.add_argument('--mfu', type=float, default=0.4, help='share of the peak to expect, 0 to 1 (0.4)')
    parser.add_argument('--price', type=float, help='of one chip for one hour')
    parser.add_argument(
        '--search', type=int, default=0, metavar='N', help='find the fastest remat, microbatch and mesh in N tries'
    )


def plan(experiment: Experiment, arguments: argparse.Namespace) -> None:
    """Prints the plan. InputError where the options are wrong, or where the step does not fit: with the numbers."""
    options = _options(arguments)
    topology = parse_topology(options.topology, options.slices)
    devices = describe(topology)
    if options.search:
        experiment = _split_over_all(experiment, len(devices))
    run = prepare(experiment, devices, planned=True)
    if options.search:
        run, program = _searched(run, topology, devices, options.search)
    else:
        console().print(f'Compiling the step of {run.pretrained.name} for {_chips(topology)} ...')
        program = compile_step(run, example_batch(run))
    _print_settings(run, topology)
    _print_memory(run, topology, program)
    if isinstance(program, TooLarge) or not fits(program, run, topology):
        raise InputError(_refusal(run, topology, program))
    _print_collectives(program)
    _print_speed(run, topology, program, options)


def _options(arguments: argparse.Namespace) -> Options:
    if not arguments.topology:
        raise InputError(f'jaxpo plan needs --topology, such as {EXAMPLES}.')
    options = Options(arguments.topology, arguments.slices, arguments.mfu, arguments.price, arguments.search)
    if not 0 < options.mfu <= 1:
        raise InputError(f'--mfu is a share of the peak, above 0 and at most 1, not {options.mfu}.')
    if options.price is not None and not options.price > 0:
        raise InputError(f'--price must be positive, not {options.price}.')
    if options.search < 0:
        raise InputError(f'--search counts compilations: 0 or more, not {options.search}.')
    return options


def _split_over_all(experiment: Experiment, devices: int) -> Experiment:
    """The experiment with a mesh and rows that fit the devices: a search chooses them."""
    config = experiment.config
    mesh = dataclasses.replace(config.mesh, data=-1, fsdp=1, tensor=1)
    rows = dataclasses.replace(config.rows, microbatch=devices)
    return dataclasses.replace(experiment, config=dataclasses.replace(config, mesh=mesh, rows=rows))


def _searched(run: Run, topology: Topology, devices, tries: int) -> tuple[Run, Program]:
    def tell(candidate: Run) -> None:
        console().print(f'Compiling {_settings(candidate)} ...')

    found = search(run, topology, devices, tries, tell)
    if found is None:
        raise InputError(
            f'--search {tries}: none of the {tries} fastest settings fits {_chips(topology)}. Search further, or take '
            'more chips, a reference table, adapters (--lora.rank) or --optimizer.kind adafactor.'
        )
    console().print(f'Fastest that fits, after {len(found.tried)} that did not: {_settings(found.run)}')
    return found.run, found.program


def _settings(run: Run) -> str:
    """As options of the command line."""
    mesh = ' '.join(f'--mesh.{axis} {size}' for axis, size in run.mesh.shape.items() if size > 1)
    return f'{mesh} --rows.microbatch {run.config.rows.microbatch} --model.remat {run.config.model.remat}'


def _chips(topology: Topology) -> str:
    slices = f' in {topology.slices} slices' if topology.slices > 1 else ''
    return f'{topology.chips} chips of {topology.kind}{slices}'


def _print_settings(run: Run, topology: Topology) -> None:
    out, pair, batch = console(), example_pair(run), example_batch(run)
    microbatches, rows, tokens = batch.tokens.shape
    devices = run.mesh.size // topology.chips
    mesh = ' x '.join(f'{axis} {size}' for axis, size in run.mesh.shape.items())
    out.print(f'[bold]{run.pretrained.name}[/bold] on {_chips(topology)} ({topology.name})')
    out.print(f'mesh       {mesh}' + (f' ({devices} devices to a chip)' if devices > 1 else ''))
    out.print(
        f'step       {run.config.train.batch_pairs} pairs of {pair.prompt.size} + {pair.chosen.size} + '
        f'{pair.rejected.size} tokens, the longest that the settings allow, in {microbatches} x {rows} rows of '
        f'{tokens} ({run.config.rows.layout})'
    )
    live = ', '.join(name for name, model in run.models.frozen.items() if model.weights != 'table') or 'none'
    tables = ', '.join(run.held('table')) or 'none'
    out.print(f'models     {cost.parameters(run) / 1e9:.3g} billion trained; beside it: {live}; from tables: {tables}')
    kernel, settings = run.attention_of(run.pretrained).kernel, run.config
    words = (f'remat {settings.model.remat}', f'attention {kernel}', settings.model.dtype, settings.optimizer.kind)
    out.print(f'compiled   {", ".join(words)}')


def _print_memory(run: Run, topology: Topology, program: Program | TooLarge) -> None:
    rows = [(f'of the arguments, {name}', bytes_text(size)) for name, size in cost.state_bytes(run).items()]
    if isinstance(program, Program):
        memory = program.memory
        rows = [
            ('arguments (state, batch)', bytes_text(memory.arguments)),
            *((f'  {name.removeprefix("of the arguments, ")}', size) for name, size in rows),
            ('temporaries', bytes_text(memory.temporaries)),
            ("results that take no argument's place", bytes_text(memory.results)),
            ('program', bytes_text(memory.code)),
            ('all of it at once', bytes_text(memory.total)),
        ]
    limit = topology.chip.memory * topology.chips / run.mesh.size
    rows.append((f'there is, of {topology.kind}', bytes_text(limit)))
    console().print(table('Memory of one device', ('', 'bytes'), rows))


def _refusal(run: Run, topology: Topology, program: Program | TooLarge) -> str:
    limit = bytes_text(topology.chip.memory * topology.chips / run.mesh.size)
    needed = program.memory.total if isinstance(program, Program) else program.needed
    held = bytes_text(sum(cost.state_bytes(run).values()))
    says = f'it takes at least {bytes_text(needed)} of {limit}' if needed else f'the compiler finds no room in {limit}'
    ways = ''.join(f'\n  {way}' for way in advise(run, topology))
    where = f'--topology {topology.name}: the step does not fit'
    return f'{where}: {says} on a device, {held} of it state. What would help:{ways}'


def _print_collectives(program: Program) -> None:
    totals = by_kind(collectives(program.text))
    rows = [(kind, str(count), str(times), bytes_text(size)) for kind, (count, times, size) in totals.items()]
    header = ('collective', 'in the program', 'run in a step', 'into a device')
    console().print(table('What devices send one another', header, rows or [('none', '0', '0', '0 B')]))


def _print_speed(run: Run, topology: Topology, program: Program, options: Options) -> None:
    received = sum(size for *_, size in by_kind(collectives(program.text)).values())
    done = cost.work(run, example_batch(run), example_pair(run))
    bounds = cost.times(topology, done, run.mesh.size, received)
    peak = topology.chip.flops * topology.chips
    seconds = done.model_flops / (peak * options.mfu)
    ceiling = done.model_flops / (peak * bounds.roofline)
    rows = [
        ('model FLOPs of a step', f'{done.model_flops:.3g}'),
        ('executed, padding and recomputation included', f'{done.executed_flops:.3g}'),
        ('bytes a device reads and writes', bytes_text(done.memory_bytes)),
        ('least seconds by arithmetic', number(bounds.compute)),
        ('least seconds by memory', number(bounds.memory)),
        ('least seconds by links, nothing overlapped', number(bounds.links)),
        ('roofline: seconds, and the MFU it allows', f'{number(bounds.roofline)}, {ceiling:.0%}'),
        (f'at {options.mfu:.0%} MFU: seconds a step', number(seconds)),
        ('tokens a second', number(done.tokens / seconds)),
        ('tokens a second and chip', number(done.tokens / seconds / topology.chips)),
        ('pairs an hour', number(done.pairs / seconds * 3600)),
    ]
    if options.price is not None:
        hours = 1e6 / done.pairs * seconds / 3600
        rows.append(
            (
                f'cost of a million pairs at {options.price:g} a chip-hour',
                number(hours * topology.chips * options.price),
            )
        )
    console().print(table('By arithmetic (nothing was run)', ('', 'value'), rows))
    if options.mfu > ceiling:
        console().print(f'[bold]{options.mfu:.0%} MFU is above the roofline[/bold] of these settings: {ceiling:.0%}.')
    console().print(f'Peaks: {topology.chip.source}. Compiled in {program.seconds:.0f} s.')
