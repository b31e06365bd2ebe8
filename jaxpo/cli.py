"""The command line: `jaxpo COMMAND EXPERIMENT [--any.field value]`, and `jaxpo losses` and `jaxpo check`."""

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.markup import escape

from jaxpo import catalogue, commands, doctor, failures, mixture_catalogue, processes
from jaxpo.errors import InputError, Interrupted, TrainingError, unknown
from jaxpo.experiment import Experiment, load
from jaxpo.plan import command as plan
from jaxpo.study import command as study
from jaxpo.study import reporting
from jaxpo.train import train

DESCRIPTION = """\
Direct preference optimisation in JAX: every method a choice of implicit reward.

An EXPERIMENT is a Python module whose get_config() returns a jaxpo.config.Config; those in experiments/ are meant to
be copied. Every field of its config is an option, as --section.field value.
"""

EXIT_CODES = """\
exit codes: 0 done; 1 the run had to stop (its last checkpoint stands); 2 bad input, nothing was changed;
75 interrupted with its state saved, 130 without: the same command resumes from the last checkpoint. 75 too where
other processes did not come in time.
Several processes end together, with the code of the first that fails.
"""


@dataclasses.dataclass(frozen=True)
class Command:
    """A command, and what it says of itself."""

    function: Callable[[Experiment], None]
    dry_run: Callable[[Experiment], None]
    summary: str
    saves_when_told: bool = False  # SIGTERM makes it save before it ends


@dataclasses.dataclass(frozen=True)
class Planner:
    """A command about devices that are not here: it starts no processes, and has options of its own."""

    function: Callable[[Experiment, argparse.Namespace], None]
    add_options: Callable[[argparse.ArgumentParser], None]
    summary: str


@dataclasses.dataclass(frozen=True)
class Tool:
    """A command that takes no experiment and trains nothing: about losses, mixtures, this machine."""

    function: Callable[[Sequence[str]], int]
    usage: str
    summary: str


TOOLS = {
    'losses': Tool(catalogue.show_losses, '[NAME]', 'list all losses, or show one with its curve'),
    'mixtures': Tool(
        mixture_catalogue.show_mixtures, '[NAME]', 'list how references are mixed and weighed, or show one'
    ),
    'doctor': Tool(doctor.doctor, '[--help]', 'check this machine: packages, devices, hosts, directories'),
    'check': Tool(catalogue.check, 'NAME', 'check a loss, yours (FILE.py:LOSS) or a registered one'),
}
COMMANDS = {
    'train': Command(train, commands.dry_run, 'train a policy on preference pairs, or resume', saves_when_told=True),
    'references': Command(
        commands.references, commands.dry_run_references, 'compute tables of reference log-probabilities'
    ),
    'evaluate': Command(commands.evaluate, commands.dry_run, 'evaluate the newest checkpoint of a run'),
    'sample': Command(commands.sample, commands.dry_run_sample, 'sample completions, and make pairs by a reward'),
    'export': Command(commands.export, commands.dry_run_export, 'write the policy as a Hugging Face directory'),
}


STUDIES = {
    'study': Tool(study.study, 'EXPERIMENT', 'compare methods: run every cell of a study, or what is left of it'),
    'report': Tool(reporting.report, 'STUDY', "write a study's report: one page, and its numbers as tables"),
}
PLANNERS = {
    'plan': Planner(plan.plan, plan.add_options, 'compile the step for TPUs or GPUs that are not here'),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code. Where several processes run it, one that fails ends all of them."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    error = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        if not arguments or arguments[0] in ('-h', '--help'):
            print(_help())
            return 0
        for table in (TOOLS, STUDIES):
            if arguments[0] in table:
                return table[arguments[0]].function(arguments[1:])
        if arguments[0] in PLANNERS:
            return _plan(arguments[0], arguments[1:])
        if arguments[0] not in COMMANDS:
            raise unknown('command', arguments[0], [*COMMANDS, *PLANNERS, *STUDIES, *TOOLS])
        return _run(arguments[0], arguments[1:])
    except (InputError, TrainingError) as problem:
        error.print(f'[bold red]jaxpo:[/bold red] {escape(str(problem))}')
        return _ended(problem)
    except Interrupted as problem:
        error.print(f'[bold yellow]jaxpo:[/bold yellow] {escape(str(problem))}')
        return 75  # of all processes, which stopped after the same step
    except KeyboardInterrupt as problem:
        error.print(f'[bold yellow]jaxpo:[/bold yellow] {failures.failure_of(problem)[1]}')
        return _ended(problem)
    except Exception as problem:
        if not failures.started():
            raise
        traceback.print_exc()
        return _ended(problem)


def _ended(problem: BaseException) -> int:
    """The exit code of a process that is alone; of several, none returns."""
    code, message = failures.failure_of(problem)
    failures.end(code, message)
    return code


def _parser(name: str, summary: str, options: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f'jaxpo {name}',
        usage=f'jaxpo {name} EXPERIMENT {options} [--section.field value ...]',
        description=f'{summary[0].upper()}{summary[1:]}.',
        epilog=f'`jaxpo {name} EXPERIMENT --help` lists every field.\n\n{EXIT_CODES}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument('experiment', metavar='EXPERIMENT', nargs='?', help='path of the experiment module')
    return parser


def _loaded(name: str, parser: argparse.ArgumentParser, arguments: Sequence[str]):
    """The experiment and the command's own options; none where only its help was asked for, or nothing was named."""
    known, overrides = parser.parse_known_args(arguments)
    if known.experiment is None or known.experiment.startswith('-'):
        parser.print_help()
        return None, known
    return load(known.experiment, overrides, name), known


def _plan(name: str, arguments: Sequence[str]) -> int:
    planner = PLANNERS[name]
    parser = _parser(name, planner.summary, '--topology KIND:SIDES')
    planner.add_options(parser)
    experiment, known = _loaded(name, parser, arguments)
    if experiment is None:
        return 0 if {'-h', '--help'} & set(arguments) else 2
    planner.function(experiment, known)
    return 0


def _run(name: str, arguments: Sequence[str]) -> int:
    command = COMMANDS[name]
    parser = _parser(name, command.summary, '[--dry-run]')
    parser.add_argument(
        '--dry-run', action='store_true', help='check everything, print what would be done, touch nothing'
    )
    experiment, known = _loaded(name, parser, arguments)
    if experiment is None:
        return 0 if {'-h', '--help'} & set(arguments) else 2
    # Before a dry run too: which mesh is possible depends on the devices of all processes.
    saves = command.saves_when_told and not known.dry_run
    processes.start(experiment.config.processes, saves_when_told=saves)
    (command.dry_run if known.dry_run else command.function)(experiment)
    return 0


def _help() -> str:
    commands_ = '\n'.join(f'  {name:10s} {command.summary}' for name, command in (COMMANDS | PLANNERS).items())
    studies, tools = (
        '\n'.join(f'  {f"{name} {tool.usage}":16s} {tool.summary}' for name, tool in table.items())
        for table in (STUDIES, TOOLS)
    )
    return (
        f'usage: jaxpo COMMAND EXPERIMENT [--dry-run] [--section.field value ...]\n\n{DESCRIPTION}\n'
        f'commands:\n{commands_}\n\nof studies:\n{studies}\n\nwithout an experiment:\n{tools}\n\n'
        f'`jaxpo COMMAND EXPERIMENT --help` lists every field.\n\n{EXIT_CODES}'
    )
