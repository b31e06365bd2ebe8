"""The studies of the experiments: every pair fits the rows that all their methods share."""

import dataclasses
import json
import pathlib

import pytest

from jaxpo import losses
from jaxpo.experiment import Experiment, import_module
from jaxpo.run import prepare, read_pairs

ROOT = pathlib.Path(__file__).parents[2]
needs_shared = pytest.mark.skipif(
    not (ROOT.parent / 'shared/models/stories260k').exists(), reason='no folder ../shared with stories260k'
)


def study_of(name, folder):
    """The study, and how many training pairs it has; those of `sentiment` are longer here than any it samples."""
    module = import_module(str(ROOT / f'experiments/{name}.py'))
    if name == 'sentiment':
        prompts = sorted(module.beginnings(), key=len)[-20:]
        rows = [{'prompt': prompt, 'chosen': 'happy ' * 60, 'rejected': 'sad ' * 60} for prompt in prompts]
        for split in ('train', 'evaluation'):
            file = folder / f'runs/sentiment_pairs/{split}.jsonl'
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return module.get_study()


@needs_shared
@pytest.mark.parametrize('name, pairs', [('methods', 495), ('sentiment', 20)])
def test_every_method_of_a_study_has_all_its_pairs(name, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = study_of(name, tmp_path)
    # Methods differ in what else their rows hold.
    kinds = {losses.find(next(iter(one.objective))).needs_of({}).companions: one for one in study.methods.values()}
    assert len(kinds) > 1
    for one in kinds.values():
        config = dataclasses.replace(study.base, objective=one.objective)
        run = prepare(Experiment(tmp_path / 'experiment.py', config, None))
        assert len(read_pairs(run).train) == pairs
