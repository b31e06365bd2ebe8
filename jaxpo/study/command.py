"""`jaxpo study EXPERIMENT`: expands a study to its cells and runs those that have not ended yet."""

import argparse
import dataclasses
import os
import pathlib
import socket
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro

from jaxpo import processes, storage
from jaxpo.config import Config
from jaxpo.errors import InputError
from jaxpo.experiment import Reward, defined
from jaxpo.study import dry_run, jobs, runner
from jaxpo.study.bundles import Bundle, bundles, plain_bundles
from jaxpo.study.design import Cell, Study, check, expand
from jaxpo.study.leases import checked

DESCRIPTION = """\
Compare methods: every method, setting and seed of the experiment's get_study() is trained once, measured by one rule,
and reported by `jaxpo report`. What has ended is not run again; stop it, kill it and start it again as you like.
"""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study with its cells, and what its experiment says of how they are run."""

    path: pathlib.Path
    study: Study
    cells: list[Cell]
    reward: Reward | None
    run_cells: Callable[[Sequence[Cell]], Any] | None

    @property
    def root(self) -> storage.Path:
        """The study's directory."""
        return storage.path(self.study.base.output)

    def bundles(self) -> list[Bundle]:
        """The cells in bundles. InputError for an objective that cannot be."""
        if self.run_cells is not None:
            return plain_bundles(self.cells)
        return bundles(self.study, self.cells, jax.device_count())


def study(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    parser = _parser()
    known, overrides = parser.parse_known_args(arguments)
    if known.experiment is None or known.experiment.startswith('-'):
        parser.print_help()
        return 0 if known.help else 2
    plan = load(known.experiment, [*overrides, *(['--help'] if known.help else [])], known)
    shard = shard_of(known.shard)
    if known.jobs is not None:
        print(
            jobs.script(known.jobs, known.experiment, _further(known, overrides), known.shards, str(plan.root)), end=''
        )
        return 0
    processes.start(getattr(plan.study.base, 'processes', Config(output='').processes))
    if known.dry_run:
        dry_run.show(plan.root, plan.study, plan.path, plan.reward, plan.bundles(), own=plan.run_cells is not None)
        return 0
    worker = checked(known.worker or f'{socket.gethostname().split(".")[0][:50]}-{os.getpid()}', 'worker')
    return runner.run(plan.root, plan.study, plan.cells, plan.bundles(), _training(plan), shard, worker, known.retry)


def _training(plan: Plan) -> runner.Training:
    if plan.run_cells is not None:
        return runner.own_way(plan.run_cells)
    return runner.language_models(plan.study, plan.path, plan.reward)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='jaxpo study',
        usage='jaxpo study EXPERIMENT [--dry-run] [--shard I/N] [--section.field value ...]',
        description=DESCRIPTION,
        epilog='`jaxpo study EXPERIMENT --help` lists every field of what the cells share.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    add = parser.add_argument
    add('experiment', metavar='EXPERIMENT', nargs='?', help='path of the experiment module, which has a get_study()')
    add('-h', '--help', action='store_true', help='show this')
    add('--dry-run', action='store_true', help='print the cells with tokens, time and device-hours; write nothing')
    add('--shard', default='1/1', metavar='I/N', help="take the I-th of N shares of the cells first, then others' rest")
    add('--worker', default='', help='name of this worker in its leases; host and process otherwise')
    add('--retry', action='store_true', help='run cells again that ended with an error')
    add('--seeds', default=None, help='other seeds than the study has, separated by commas')
    add('--cells-per-program', type=int, default=None, help='most cells trained at once')
    add('--lanes', type=int, default=None, help="how many of a device's cells are computed at once")
    add('--jobs', choices=[*jobs.SYSTEMS], default=None, help='print a script that runs the shards on a cluster')
    add('--shards', type=int, default=1, help='how many, for --jobs')
    return parser


def load(path: str, overrides: Sequence[str], options: argparse.Namespace) -> Plan:
    """The study of an experiment module, with the command line's changes.

    InputError: no such module, one without get_study(), or a study that cannot be compared.
    """
    module, found = defined(path, 'get_study', Study)
    own = getattr(module, 'run_cells', None)
    if own is None and not isinstance(found.base, Config):
        raise InputError(f'{path}: the base of its study is no jaxpo.config.Config, and it defines no run_cells().')
    config = (tyro.conf.FlagConversionOff,)
    base = tyro.cli(
        type(found.base), default=found.base, args=list(overrides), prog=f'jaxpo study {path}', config=config
    )
    if base.objective != found.base.objective:
        raise InputError(f'--objective has no effect: the objectives of a study are those of its methods, in {path}.')
    if base.train.seed != found.base.train.seed:
        raise InputError('--train.seed has no effect: a study has several, named by --seeds, as in --seeds 0,1,2.')
    changes: dict[str, Any] = {'base': base}
    if options.seeds is not None:
        changes['seeds'] = _seeds(options.seeds)
    for name in ('cells_per_program', 'lanes'):
        if getattr(options, name) is not None:
            changes[name] = getattr(options, name)
    changed = dataclasses.replace(found, **changes)
    check(changed)
    return Plan(pathlib.Path(path), changed, expand(changed), getattr(module, 'reward', None), own)


def _seeds(text: str) -> tuple[int, ...]:
    if not all(word.strip().isdecimal() for word in text.split(',')):
        raise InputError(f'--seeds: whole numbers separated by commas, such as 0,1,2, not {text!r}.')
    return tuple(int(word) for word in text.split(','))


def shard_of(text: str) -> tuple[int, int]:
    """`I/N` -> (I, N), with 1 <= I <= N. InputError for anything else."""
    words = text.split('/')
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not 1 <= int(words[0]) <= int(words[1]):
        raise InputError(f'--shard: I/N with 1 <= I <= N, such as 2/8, not {text!r}.')
    return int(words[0]), int(words[1])


def _further(known: argparse.Namespace, overrides: Sequence[str]) -> list[str]:
    """The words of the command line that every job is given."""
    words = ['--retry'] if known.retry else []
    for name in ('seeds', 'cells_per_program', 'lanes'):
        if getattr(known, name) is not None:
            words += [f'--{name.replace("_", "-")}', str(getattr(known, name))]
    return [*words, *overrides]
