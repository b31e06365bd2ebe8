"""Runs of several real processes: started side by side, given trouble at a chosen step, waited for."""

import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import tiny_checkpoints
import tiny_runs

from jaxpo.config import Data, Evaluate, Mesh, Reference, Sample, Train

STEPS = 12
HEARTBEAT = 10
ENVIRONMENT = {
    'JAX_PLATFORMS': 'cpu',
    'JAX_NUM_CPU_DEVICES': '4',
    'JAX_DISABLE_MOST_OPTIMIZATIONS': 'true',
    'JAX_ENABLE_COMPILATION_CACHE': 'false',  # that only the first of two would write
    'JAX_NUMPY_RANK_PROMOTION': 'raise',
    'PYTHONPATH': str(pathlib.Path(__file__).parent),
}
MODULE = """\
import pathlib
import tiny_processes
reward = tiny_processes.reward
def get_config():
    return tiny_processes.experiment(pathlib.Path(__file__).parent).config
tiny_processes.make_trouble()
"""


class Ended(NamedTuple):
    """What came of one process."""

    code: int
    out: str
    error: str
    seconds: float  # from the start of all


def reward(prompt, completion):
    return float(len(completion.split()))


def experiment(folder, **changes):
    """References live and from a table, weighed by validation pairs; evaluated, sampled; on 8 devices."""
    folder.mkdir(exist_ok=True)
    path = folder / 'experiment.py'
    if not path.exists():
        path.write_text(MODULE)
        tensors = tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG, seed=5)
        tiny_checkpoints.write_directory(folder / 'other', tiny_runs.CONFIG, tensors)
        tiny_runs.write_pairs(folder / 'validation.jsonl', 8, seed=2)
    settings = {
        'references': {'initial': Reference(), 'other': Reference(str(folder / 'other'), table=True)},
        'objective': {'mixture': {'weights': 'vdw'}, 'dpo': {}},
        'tables': str(folder / 'tables'),
        'data': Data(**{name: str(folder / f'{name}.jsonl') for name in ('train', 'validation', 'evaluation')}),
        'mesh': Mesh(data=2, fsdp=4),
        'train': Train(batch_pairs=6, steps=STEPS),
        'evaluate': Evaluate(sample_prompts=2, show=1),
        'sample': Sample(max_new_tokens=5, batch=8),
    }
    return tiny_runs.experiment(folder, reward, **{**settings, **changes})


def make_trouble():
    """Where the environment says `TROUBLE=NAME:STEP`, that happens to this process while it takes the step."""
    if 'TROUBLE' not in os.environ:
        return
    from jaxpo import train

    name, step = os.environ['TROUBLE'].split(':')
    rates = train.learning_rates

    def schedule(*arguments):
        rate = rates(*arguments)

        def watched(number):
            if number == int(step) - 1:
                TROUBLES[name]()
            elif number >= int(step):
                time.sleep(0.3)  # the word goes around in the background, and tiny steps would outrun it
            return rate(number)

        return watched

    train.learning_rates = schedule


TROUBLES = {
    'sigterm': lambda: os.kill(os.getpid(), signal.SIGTERM),
    'full disk': lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY)),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(('localhost', 0))
        return probe.getsockname()[1]


def members(count=2, heartbeat=HEARTBEAT):
    """The command-line words that make each of `count` processes one of them."""
    coordinator = f'localhost:{free_port()}'
    return [
        f'--processes.coordinator {coordinator} --processes.count {count} --processes.index {index} '
        f'--processes.heartbeat-seconds {heartbeat} --processes.start-seconds 200'.split()
        for index in range(count)
    ]


def run_together(commands, environments=None, timeout=300):
    """Runs the commands (words after `python`) side by side until all have ended; fails where one hangs."""
    started = time.monotonic()
    environments = environments or [{}] * len(commands)
    running = [
        subprocess.Popen(
            [sys.executable, *map(str, words)],
            env={**os.environ, **ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for words, environment in zip(commands, environments)
    ]
    ended = []
    try:
        for process in running:
            out, error = process.communicate(timeout=timeout - (time.monotonic() - started))
            ended.append(Ended(process.returncode, out, error, time.monotonic() - started))
    finally:
        for process in running:
            process.kill()
    return ended


def train_together(folder, *words, troubles=({}, {})):
    """`jaxpo train` of the experiment in `folder` by two processes of 4 devices each."""
    path = folder / 'experiment.py'
    commands = [['-m', 'jaxpo', 'train', path, *words, *member] for member in members()]
    return run_together(commands, troubles)
