"""A tiny experiment on disk: model, pairs and config, small enough to train in a test."""

import dataclasses
import json
import pathlib

import numpy as np
import tiny_checkpoints
import tiny_decoders

from jaxpo.config import Config, Data, Evaluate, Mesh, Model, Optimizer, Rows, Sample, Train
from jaxpo.experiment import Experiment
from jaxpo.objective import spelled_out

CONFIG = tiny_decoders.CONFIGS['llama'] | {'num_hidden_layers': 2, 'vocab_size': 20, 'eos_token_id': 2}


def sentence(random, first=0, last=17):
    return ' '.join(f'word{number}' for number in random.integers(first, last, random.integers(1, 7)))


def write_pairs(path: pathlib.Path, count: int, seed: int = 0) -> pathlib.Path:
    """Pairs whose chosen completions have other words than their rejected ones: easy to learn, and to carry over."""
    random = np.random.default_rng(seed)
    rows = [
        {'prompt': sentence(random), 'chosen': sentence(random, 0, 8), 'rejected': sentence(random, 9, 17)}
        for _ in range(count)
    ]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return path


def experiment(folder: pathlib.Path, reward=None, **changes) -> Experiment:
    """The experiment in `folder`, which is made where it is not; `changes` replace sections of its config."""
    if not (folder / 'model').exists():
        tiny_checkpoints.write_directory(folder / 'model', CONFIG)
        write_pairs(folder / 'train.jsonl', 24)
        write_pairs(folder / 'evaluation.jsonl', 6, seed=1)
    config = Config(
        output=str(folder / 'run'),
        model=Model(source=str(folder / 'model'), remat='none'),
        data=Data(train=str(folder / 'train.jsonl'), evaluation=str(folder / 'evaluation.jsonl')),
        rows=Rows(lengths=(64,), microbatch=8, pairs_per_row=2),
        optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.1),
        mesh=Mesh(data=8),
        train=Train(batch_pairs=6, steps=6, checkpoint_every=2),
        evaluate=Evaluate(),
        sample=Sample(max_new_tokens=5, batch=8),
    )
    config = dataclasses.replace(config, **changes)
    return Experiment(
        folder / 'experiment.py',
        dataclasses.replace(config, objective=spelled_out(config.objective, tuple(config.references))),
        reward,
    )


def write_module(folder: pathlib.Path) -> pathlib.Path:
    """The same experiment as a module, with a reward, for the command line."""
    experiment(folder)
    path = folder / 'experiment.py'
    path.write_text(
        'import pathlib\n'
        'import tiny_runs\n'
        'def reward(prompt, completion):\n'
        '    return float(len(completion.split()))\n'
        'def get_config():\n'
        '    return tiny_runs.experiment(pathlib.Path(__file__).parent).config\n'
    )
    return path
