"""A study as data: what it expands to, what its cells are called, and what is refused before anything runs."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from jaxpo.config import Config, Mesh, Model, Optimizer, Train
from jaxpo.errors import InputError
from jaxpo.study.design import Method, Study, again, check, expand, identity_of, settings_of

METHODS = {
    'dpo': Method({'dpo': {}}, {'objective.dpo.beta': (0.05, 0.1)}),
    'ipo': Method({'ipo': {}}, {'objective.ipo.tau': (0.1, 0.2)}, {'train.batch_pairs': 4}),
}
RATES = {'optimizer.learning_rate': (1e-5, 3e-5, 1e-4)}


def study(**changes):
    base = Config(output='runs/one', model=Model(source='somewhere'))
    return Study(**{'base': base, 'methods': METHODS, 'grid': RATES, 'seeds': (0, 1), **changes})


def ids(found):
    return [cell.id for cell in expand(found)]


def test_every_method_setting_and_seed_is_a_cell_and_the_baseline_runs_again():
    cells = expand(study())
    assert len(cells) == 3 * 6 * 2 and len({cell.id for cell in cells}) == len(cells)
    assert [cell.method for cell in cells[::12]] == ['dpo', 'ipo', 'dpo (A/A)'] and again(study()) == 'dpo (A/A)'
    assert {cell.seed for cell in cells[:24]} == {0, 1}
    first = cells[0]
    assert first.setting == {'objective.dpo.beta': 0.05, 'optimizer.learning_rate': 1e-5}
    assert first.config.objective == {'dpo': {'weight': 1.0, 'beta': 0.05}}
    assert first.config.optimizer.learning_rate == 1e-5 and first.config.train.seed == 0
    assert first.config.output == f'runs/one/cells/{first.id}'
    assert {cell.config.train.batch_pairs for cell in cells} == {4, 8}
    assert settings_of(study(), 'ipo')[-1] == {'objective.ipo.tau': 0.2, 'optimizer.learning_rate': 1e-4}


def test_the_second_arm_has_the_settings_of_the_first_and_other_seeds():
    cells = expand(study(seeds=(3, 4)))
    ours = [cell for cell in cells if cell.method == 'dpo']
    theirs = [cell for cell in cells if cell.method == 'dpo (A/A)']
    assert [cell.setting for cell in ours] == [cell.setting for cell in theirs]
    assert [cell.repeat for cell in ours] == [cell.repeat for cell in theirs]
    assert not {cell.seed for cell in ours} & {cell.seed for cell in theirs}
    moved = dataclasses.replace(theirs[0].config, train=dataclasses.replace(theirs[0].config.train, seed=3))
    assert dataclasses.replace(moved, output='') == dataclasses.replace(ours[0].config, output='')


def test_ids_are_the_same_in_another_process():
    """Under another seed of Python's hashes, and wherever the study lies."""
    code = 'import test_design; print(" ".join(test_design.ids(test_design.study())))'
    environment = os.environ | {'PYTHONHASHSEED': '123', 'PYTHONPATH': str(pathlib.Path(__file__).parent)}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True, cwd='/')
    assert done.stdout.split() == ids(study()), done.stderr


def of_base(**changes):
    return expand(study(base=dataclasses.replace(study().base, **changes)))[0].id


def test_where_a_cell_runs_is_not_in_its_name():
    for changes in ({'output': 'elsewhere/'}, {'tables': 'elsewhere'}, {'mesh': Mesh(fsdp=2)}):
        assert of_base(**changes) == of_base()
    assert ids(study(cells_per_program=8, lanes=2, question='Is it?', confidence=0.9)) == ids(study())


def changed_leaves(node, path=()):
    """Configs of the base with one field of another value, each, with the field's name."""
    for field in dataclasses.fields(node):
        value, name = getattr(node, field.name), (*path, field.name)
        if dataclasses.is_dataclass(value):
            for where, changed in changed_leaves(value, name):
                yield where, dataclasses.replace(node, **{field.name: changed})
        else:
            others = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, str: lambda v: v + 'x'}
            change = others.get(type(value), lambda v: 3 if v is None else {'x': 1} if isinstance(v, dict) else ())
            yield '.'.join(name), dataclasses.replace(node, **{field.name: change(value)})


def test_every_field_that_decides_results_is_in_the_name():
    base = study().base
    aside = ('output', 'tables', 'mesh', 'processes', 'export')
    found = {where: identity_of(changed) == identity_of(base) for where, changed in changed_leaves(base)}
    assert len(found) > 60
    for where, same in found.items():
        assert same == (where.split('.')[0] in aside), where


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'methods': {}}, 'names no methods'),
        ({'baseline': 'dpp'}, "Unknown baseline 'dpp'. Did you mean 'dpo'"),
        ({'seeds': ()}, 'seeds must be'),
        ({'seeds': (0, 0)}, 'each once'),
        ({'seeds': (0, -1)}, '0 or more'),
        ({'seeds': (0.5,)}, 'whole numbers'),
        ({'selection_share': 1.0}, 'between 0 and 1'),
        ({'confidence': 0.0}, 'confidence'),
        ({'cells_per_program': 0}, 'whole number above 0'),
        ({'lanes': 1.5}, 'whole number above 0'),
        ({'grid': {'train.seed': (1, 2)}}, 'set by `seeds`'),
        ({'grid': {'optimizer.learning_rate': 1e-5}}, 'must be a tuple'),
        ({'grid': {'optimizer.learning_rate': ()}}, 'must be a tuple'),
        ({'grid': {'optimizer.schedule': 'linear'}}, 'must be a tuple'),
        ({'grid': {'optimizer.learning_rate': (1e-5, 1e-5)}}, 'twice'),
        ({'grid': {'optimizer.learning_rate': (float('nan'),)}}, 'has nan'),
        ({'grid': {'optimizer.learning_rate': ('fast',)}}, "is a number, not 'fast'"),
        ({'grid': {'optimizer.lerning_rate': (1e-5,)}}, "'lerning_rate'. Did you mean 'learning_rate'"),
        ({'grid': {'optimiser.learning_rate': (1e-5,)}}, "'optimiser'. Did you mean 'optimizer'"),
        ({'grid': {'optimizer.learning_rate.peak': (1e-5,)}}, 'deeper'),
        ({'grid': {'objective.hinge.beta': (0.3,)}}, "Unknown entry of objective.hinge.beta 'hinge'"),
        ({'methods': {**METHODS, 'hinge': Method({'hinge': {}}, {'objective.hinge.betta': (1.0, 2.0)})}}, "'beta'"),
        ({'methods': {'dpo': METHODS['dpo'], 'ipo': Method({'ipo': {}})}}, 'dpo 6, ipo 3'),
        ({'methods': {'dpo': METHODS['dpo'], 'again': METHODS['dpo']}}, 'are the same run'),
        ({'methods': {'dpo': METHODS['dpo'], 'ipo (A/A)': METHODS['ipo']}}, 'second arm'),
        ({'methods': {'dpo': Method({'dppo': {}})}, 'grid': {}}, "Unknown loss 'dppo'. Did you mean 'dpo'"),
        ({'methods': {'dpo': Method({'dpo': {}}, settings={'train.sed': 1})}}, "'sed'. Did you mean 'seed'"),
        ({'methods': {'dpo': Method({'dpo': {}}, settings={'train.seed': 1})}}, 'train.seed is set by `seeds`'),
        ({'methods': {'dpo': Method({'dpo': {}}, settings={'objective': {'ipo': {}}})}}, 'objective'),
        ({'methods': {'dpo': Method({'dpo': {}}, settings={'output': 'runs/two'})}}, 'output'),
        ({'methods': {'dpo': Method({'dpo': {}}, {'optimizer.learning_rate': (1e-3,)})}}, 'in the grid of dpo and in'),
    ],
)
def test_a_study_that_cannot_be_compared_is_refused(changes, message):
    with pytest.raises(InputError) as refused:
        expand(study(**changes))
    assert message in str(refused.value)


def test_words_and_switches_may_stand_in_a_grid():
    found = study(grid={'optimizer.schedule': ('linear', 'cosine'), 'model.remat': ('none',)})
    check(found)
    assert {cell.config.optimizer.schedule for cell in expand(found)} == {'linear', 'cosine'}


@dataclasses.dataclass(frozen=True)
class OwnBase:
    """An experiment that trains in a way of its own."""

    output: str
    objective: dict = dataclasses.field(default_factory=lambda: {'dpo': {}})
    optimizer: Optimizer = Optimizer()
    train: Train = Train()


def test_a_base_of_its_own_is_expanded_alike():
    cells = expand(study(base=OwnBase('runs/own')))
    assert len(cells) == 36 and cells[0].config.objective['dpo']['beta'] == 0.05
    assert isinstance(cells[0].config, OwnBase)
