"""The tiny experiment measured against models that are read from tables, or live."""

import json

import tiny_checkpoints
import tiny_runs

from jaxpo import run, tabulate
from jaxpo.config import Reference


def write_model(path, seed, layers=2):
    config = tiny_runs.CONFIG | {'num_hidden_layers': layers}
    tensors = tiny_checkpoints.hugging_face_tensors(config, seed=seed)
    return tiny_checkpoints.write_directory(path, config, tensors)


def make_folder(folder):
    """The tiny experiment with another model to be measured against, and prompts that are corrupted."""
    tiny_runs.experiment(folder)
    write_model(folder / 'other', seed=5, layers=3)
    write_model(folder / 'earlier', seed=6)
    for name in ('train', 'evaluation'):
        rows = [json.loads(line) for line in (folder / f'{name}.jsonl').read_text().splitlines()]
        write_rows(folder / f'{name}.jsonl', [row | {'corrupted_prompt': 'word1 word2 word3'} for row in rows])
    return folder


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def measured(folder, table=True, names=('other',), **changes):
    """The experiment in `folder` with references of these names: models in it, but for the policy's own `initial`."""
    sources = {name: 'policy' if name == 'initial' else str(folder / name) for name in names}
    references = {name: Reference(source, table=table) for name, source in sources.items()}
    return tiny_runs.experiment(folder, **{'references': references, 'tables': str(folder / 'tables'), **changes})


def attached(experiment):
    prepared = run.prepare(experiment)
    return prepared, *tabulate.attach(prepared, run.read_pairs(prepared))


def computed(experiment):
    """Completions that were computed for each reference of a run."""
    return [one.computed for one in attached(experiment)[2]]


def to_compute(experiment):
    prepared = run.prepare(experiment)
    return [one.computed for one in tabulate.missing(prepared, run.read_pairs(prepared))]


def sequences(folder):
    """Prompt and completion of every side of every pair, as texts."""
    lines = [line for name in ('train', 'evaluation') for line in (folder / f'{name}.jsonl').read_text().splitlines()]
    return [(row['prompt'], row[side]) for row in map(json.loads, lines) for side in ('chosen', 'rejected')]
