"""Studies beside loops: many cells in one program, the same cells alone or one by one, and the peer's runs.

    python benchmarks/study.py vectorised                 16 cells of a tiny model, and one of them alone
    python benchmarks/study.py lora                       8 cells with adapters in one program, and one by one
    python benchmarks/study.py trl --peer-python FILE     12 of them by `jaxpo study`, and TRL's runs, a process each

Every row is a process of its own, timed from its start to its end: imports, loading, reading pairs, tables and
compilation are in it. See README.md for what is equal on both sides.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import record

HERE = pathlib.Path(__file__).resolve().parent
OUTPUT = pathlib.Path('runs/benchmark/study')
SHARED = pathlib.Path('../shared/data/ci')
JAXPO = [str(pathlib.Path(sys.executable).with_name('jaxpo'))]
LOSSES = ('sigmoid', 'ipo', 'hinge')  # as TRL calls the methods of `smollm2_study.py`


@dataclasses.dataclass(frozen=True)
class Timed:
    """One process, or several one after the other."""

    name: str
    cells: int
    seconds: float
    cpu_seconds: float
    peak_rss_gib: float
    load_before: float  # mean number of processes that wanted a core in the minute before


def timed(name: str, cells: int, command: Sequence[str], **environment: str) -> Timed:
    """Runs a command to its end; what it prints goes to OUTPUT/logs. SystemExit where it fails."""
    log = OUTPUT / 'logs' / f'{name.replace(" ", "_").replace(",", "")}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = {'HF_HUB_OFFLINE': '1', 'JAX_PLATFORMS': 'cpu', **environment}
    load, start = os.getloadavg()[0], time.perf_counter()
    with log.open('wb') as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **settings})
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f'{name} failed; the end of {log}:\n{log.read_text(errors="replace")[-2000:]}')
    result = Timed(name, cells, seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20, load)
    print(result, flush=True)
    return result


def study(name: str, module: str, cells: int, *words: str, devices: int = 1) -> Timed:
    """A study from nothing: its tables and its cache of compiled programs are its own."""
    own = fresh(OUTPUT / name.replace(' ', '_').replace(',', ''))
    places = ['--output', str(own / 'study'), '--tables', str(own / 'tables')]
    flags = {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'} if devices > 1 else {}
    found = timed(name, cells, [*JAXPO, 'study', str(HERE / module), *places, *words], **flags)
    ended = sorted(path.suffix for path in (own / 'study' / 'done').iterdir())
    if ended != ['.finished'] * cells:
        raise SystemExit(f'{name}: {cells} cells should have finished, but the study holds {ended}.')
    return found


def fresh(directory: pathlib.Path) -> pathlib.Path:
    """The directory, emptied."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def plain(row: dict) -> dict:
    """A pair as plain text, for a model without a chat template: a newline behind the prompt."""
    turns = [row['prompt']] if isinstance(row['prompt'], str) else [turn['content'] for turn in row['prompt']]
    return {'prompt': ''.join(turn + '\n' for turn in turns), 'chosen': row['chosen'], 'rejected': row['rejected']}


def write_pairs(kind: str, change: Callable[[dict], dict], training: int, evaluation: int) -> tuple[str, str]:
    """The first TruthfulQA pairs, as the experiments read them."""
    paths = []
    for split, count in (('train', training), ('eval', evaluation)):
        rows = record.read_rows(str(SHARED / f'truthfulqa.{split}.jsonl'), count)
        path = OUTPUT / f'{kind}.{split}.jsonl'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(''.join(json.dumps(change(row)) + '\n' for row in rows), encoding='utf-8')
        paths.append(str(path))
    return paths[0], paths[1]


def vectorised(options: argparse.Namespace) -> list[Timed]:
    """One cell alone, by `jaxpo train`, between studies of 16: all their tables but the first one's are there."""
    write_pairs('plain', plain, 500, 150)
    steps = ['--train.steps', str(options.steps)]
    fresh(OUTPUT / 'alone')

    def alone(place: int, name: str, **environment: str) -> Timed:
        own = ['--output', str(OUTPUT / 'alone' / str(place)), '--tables', str(OUTPUT / 'alone' / 'tables')]
        words = [*own, '--train.seed', str(place % 4), *steps]
        return timed(name, 1, [*JAXPO, 'train', str(HERE / 'stories_study.py'), *words], **environment)

    found = [alone(0, '1 alone, writes the table')]
    for round in range(options.rounds):
        found.append(alone(3 * round + 1, '1 alone'))
        for devices in (1, 2):
            found.append(study(f'16 on {devices} devices', 'stories_study.py', 16, *steps, devices=devices))
        cache = {'JAX_COMPILATION_CACHE_DIR': str(OUTPUT / 'alone' / 'compiled')}
        if not round:
            alone(2, '1 alone, writes the cache', **cache)
        found.append(alone(3 * round + 102, '1 alone, compiled before', **cache))
    return found


def lora(options: argparse.Namespace) -> list[Timed]:
    """The same 8 cells in one program and one by one, in turn."""
    write_pairs('chat', lambda row: row, 8 * options.steps, 16)
    found = []
    for _ in range(options.rounds):
        for together in (8, 1):
            name = '8 in one program' if together > 1 else '8 one by one'
            words = ('--seeds', '0,1', '--cells-per-program', str(together))
            found.append(study(name, 'smollm2_study.py', 8, *words))
    return found


def trl(options: argparse.Namespace) -> list[Timed]:
    """A study of 12 cells, before and after some of the peer's runs."""
    paths = write_pairs('chat', lambda row: row, 8 * options.steps, 16)

    def ours() -> Timed:
        return study('12 by jaxpo study', 'smollm2_study.py', 12, '--cells-per-program', str(options.together))

    found = [ours()]
    for place in range(options.peers):
        result = OUTPUT / f'trl_{place}.json'
        words = ['--pairs', paths[0], '--evaluation', paths[1], '--output', str(result), '--seed', str(place)]
        command = [options.peer_python, str(HERE / 'peer_trl_lora.py'), '--loss', LOSSES[place % 3], *words]
        found.append(timed('1 by TRL', 1, command))
        refuse_unequal_work(json.loads(result.read_text()))
    return [*found, ours()] if options.rounds > 1 else found


def refuse_unequal_work(peer: dict) -> None:
    """SystemExit where the peer trained on other tokens, or other numbers of parameters, than the study's cells."""
    import jax

    from jaxpo.experiment import Experiment, import_module
    from jaxpo.loading import abstract_state
    from jaxpo.run import prepare, read_pairs

    path = HERE / 'smollm2_study.py'
    run = prepare(Experiment(path, import_module(str(path)).get_config(), None))
    triples = [(pair.prompt, pair.chosen, pair.rejected) for pair in read_pairs(run).train]
    facts = record.pair_facts(run.config.data.train, triples)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_state(run)[0].params))
    own = (facts, record.sequence_tokens(triples), parameters)
    theirs = (peer['pairs'], peer['tokens'], peer['trainable_parameters'])
    if own != theirs:
        raise SystemExit(f'Not comparable: the study trains on {own}, the peer on {theirs}.')


def table(found: Sequence[Timed]) -> str:
    """Markdown: of processes of one name the median, and how far they lie apart."""
    lines = [
        '| | runs | seconds | least to most | processor seconds | peak memory, GiB | cells an hour | load before |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for name in dict.fromkeys(one.name for one in found):
        same = [one for one in found if one.name == name]
        seconds = statistics.median(one.seconds for one in same)
        cells = (
            str(len(same)),
            f'{seconds:.1f}',
            f'{min(one.seconds for one in same):.1f} to {max(one.seconds for one in same):.1f}',
            f'{statistics.median(one.cpu_seconds for one in same):.1f}',
            f'{max(one.peak_rss_gib for one in same):.2f}',
            f'{3600 * same[0].cells / seconds:.0f}',
            f'{max(one.load_before for one in same):.1f}',
        )
        lines.append(f'| {name} | {" | ".join(cells)} |')
    return '\n'.join(lines)


PARTS = {'vectorised': vectorised, 'lora': lora, 'trl': trl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('part', choices=[*PARTS])
    parser.add_argument('--steps', type=int, help='of a cell; 60 of the tiny model, 6 of the other')
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--together', type=int, default=12, help='cells of a program beside TRL')
    parser.add_argument('--peers', type=int, default=3, help="how many of TRL's 12 runs are made")
    parser.add_argument('--peer-python', default='.venv/trl/bin/python')
    options = parser.parse_args()
    options.steps = options.steps or (60 if options.part == 'vectorised' else 6)
    found = PARTS[options.part](options)
    facts = {'machine': record.machine(), 'steps': options.steps, 'rows': [dataclasses.asdict(one) for one in found]}
    (OUTPUT / f'{options.part}.json').write_text(json.dumps(facts, indent=1) + '\n')
    print(table(found))


if __name__ == '__main__':
    main()
