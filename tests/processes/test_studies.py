"""A study of two real processes of 4 devices each, its cells side by side on all of them, is that of one of 8."""

import pytest
import tiny_processes
import tiny_studies

from jaxpo import cli, storage
from jaxpo.study import records

pytestmark = pytest.mark.usefixtures('compiled_quickly')
MODULE = """\
import dataclasses, pathlib
import tiny_studies
from jaxpo.config import Evaluate
def get_study():
    study = tiny_studies.small(pathlib.Path(__file__).parent)
    train = dataclasses.replace(study.base.train, checkpoint_every=2)
    base = dataclasses.replace(study.base, train=train, evaluate=Evaluate(sample_prompts=2, show=0))
    return dataclasses.replace(study, base=base, cells_per_program=8)
def reward(prompt, completion):
    return float(len(completion))
"""


def test_two_processes_run_the_study_of_one(tmp_path):
    tiny_studies.small(tmp_path)
    path = tmp_path / 'experiment.py'
    path.write_text(MODULE)
    commands = [['-m', 'jaxpo', 'study', path, *member] for member in tiny_processes.members()]
    ended = tiny_processes.run_together(commands)
    assert [one.code for one in ended] == [0, 0], ended[0].error + ended[1].error
    assert '3 cells: 3 finished' in ended[0].out
    assert cli.main(['study', str(path), '--output', str(tmp_path / 'alone')]) == 0
    found = {name: {one.id: one for one in records.read(storage.path(tmp_path / name))} for name in ('study', 'alone')}
    assert len(found['study']) == 3 and found['study'].keys() == found['alone'].keys()
    for cell, one in found['study'].items():
        assert 'kl' in one.lines[-1]
        for ours, theirs in zip(one.lines, found['alone'][cell].lines, strict=True):
            assert ours.keys() == theirs.keys() and ours.get('split') == theirs.get('split')
            numbers = [{name: value for name, value in one.items() if name != 'split'} for one in (ours, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=2e-5)
