"""Cells side by side in one program are what they are one after the other, and what `jaxpo train` makes of them."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import tiny_studies
import tiny_tables

from jaxpo import losses, train
from jaxpo.config import Lora, Optimizer, Reference
from jaxpo.errors import InputError
from jaxpo.experiment import Experiment
from jaxpo.metrics import read_metrics
from jaxpo.study import compilations, language_model
from jaxpo.study.bundles import bundles
from jaxpo.study.design import Method, Study, expand, replaced
from jaxpo.study.records import DIVERGED, FINISHED
from jaxpo.study.workshop import Workshop
from jaxpo.types import Rewards

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def side_by_side(study, **changes):
    return dataclasses.replace(study, **{'cells_per_program': 16, **changes})


def assert_close(ours, theirs, where):
    """To 1e-5 of the numbers' scale."""
    ours, theirs = np.asarray(ours, float), np.asarray(theirs, float)
    assert ours.shape == theirs.shape, where
    scale = max(1.0, np.max(np.abs(theirs), initial=0))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * scale, err_msg=str(where))


def moved(line):
    """Whether rewards are more than rounding: while the policy is its reference, which of a pair is ahead is chance
    where the two are computed differently, one for all cells and one for each."""
    return abs(line['rewards/margins']) > 1e-6


def assert_alike(ours, theirs):
    """All that was found of every cell."""
    assert list(ours) == list(theirs)
    for key, (_, outcome) in ours.items():
        other = theirs[key][1]
        assert outcome.state == other.state == FINISHED, (key, outcome.error, other.error)
        assert outcome.compute.tokens == other.compute.tokens
        assert [line.keys() for line in outcome.lines] == [line.keys() for line in other.lines], key
        for line, expected in zip(outcome.lines, other.lines):
            for name, value in line.items():
                if name == 'split':
                    assert value == expected[name]
                elif name != 'rewards/accuracies' or moved(expected):
                    assert_close(value, expected[name], (key, line['step'], name))
        assert outcome.pairs.keys() == other.pairs.keys()
        for split, numbers in outcome.pairs.items():
            for name, values in vars(numbers).items():
                assert_close(values, getattr(other.pairs[split], name), (key, split, name))


def assert_as_trained(found, folder, keys):
    """The training lines are those of `jaxpo train` with the cell's config."""
    for key in keys:
        cell, outcome = found[key]
        config = dataclasses.replace(cell.config, output=str(folder / cell.id))
        train.train(Experiment(pathlib.Path('experiment.py'), config, None))
        lines = [line for line in read_metrics(folder / cell.id) if 'loss' in line]
        ours = [line for line in outcome.lines if 'split' not in line]
        assert [line['step'] for line in ours] == [line['step'] for line in lines] == [1, 2, 3]
        for line, expected in zip(ours, lines):
            assert line.keys() == expected.keys() - {'seconds', 'tokens_per_second'}
            for name, value in line.items():
                assert_close(value, expected[name], (key, line['step'], name))


@pytest.fixture(scope='module')
def whole(tmp_path_factory, compiled_quickly):
    """All weights are trained, against a copy of the first ones: losses, their numbers, rates and data orders."""
    base = tiny_studies.base(tmp_path_factory.mktemp('whole'))
    methods = {
        'dpo': Method({'dpo': {}}, {'objective.dpo.beta': (0.1, 0.3)}),
        'rpo': Method({'dpo': {}, 'sft': {'weight': 0.2}}, {'optimizer.learning_rate': (1e-2, 3e-3)}),
        'simpo': Method({'simpo': {}}, {'objective.simpo.gamma': (0.3, 0.6)}),
    }
    return Study(base, methods, seeds=(0,))


@pytest.fixture(scope='module')
def looped(whole):
    with compilations.counting() as compiled:
        found = tiny_studies.run(whole)
    return found, compiled


def test_a_grid_compiles_its_program_once(looped):
    found, compiled = looped
    assert len(found) == 8
    assert compiled.counts['train_cell'] == compiled.counts['measure_cell'] == 1


def test_cells_differ(looped):
    losses = {outcome.lines[-1]['loss'] for _, outcome in looped[0].values()}
    assert len(losses) == len(looped[0])


def test_side_by_side_is_one_after_the_other(whole, looped):
    """On 8 devices, two of them filled up."""
    known = {key: found for key, found in looped[0].items() if key[0] != 'simpo'}
    ids = {cell.id for cell, _ in known.values()}
    with compilations.counting() as compiled:
        found = tiny_studies.run(side_by_side(whole), 8, lambda cell: cell.id in ids)
    assert len(found) == 6
    assert_alike(found, known)
    assert compiled.counts['train_cells'] == compiled.counts['measure_cells'] == 1


def test_an_adapter_over_a_shared_base_against_all_kinds_of_references(tmp_path):
    """The base beneath the adapter, an average that follows it, and a table of another model, mixed."""
    folder = tiny_tables.make_folder(tmp_path)
    references = {
        'initial': Reference(),
        'moving': Reference(update_every=2, update_rate=0.5),
        'other': Reference(str(folder / 'other'), table=True),
    }
    base = tiny_studies.base(folder, lora=Lora(rank=2), references=references)
    mixture = {'mixture': {'mix': 'geometric'}}
    methods = {
        'dpo': Method({**mixture, 'dpo': {'beta': 0.3}}),
        'ipo': Method({**mixture, 'ipo': {}, 'sft': {'weight': 0.1}}),
    }
    study = Study(base, methods, seeds=(0,))
    one_by_one = tiny_studies.run(study)
    assert_alike(tiny_studies.run(side_by_side(study), 2), one_by_one)
    assert_as_trained(one_by_one, tmp_path, [list(one_by_one)[-1]])


def test_losses_that_couple_pairs_and_run_along(tmp_path):
    methods = {
        'kto': Method({'kto': {}}, {'objective.kto.beta': (0.1, 0.3)}),
        'both': Method({'bco': {}, 'kto': {'weight': 0.5}}, {'optimizer.learning_rate': (1e-2, 3e-3)}),
    }
    study = Study(tiny_studies.base(tmp_path), methods, seeds=(0,), baseline='kto')
    one_by_one = tiny_studies.run(study)
    assert len({outcome.lines[-1]['loss'] for _, outcome in one_by_one.values()}) == 6
    assert_alike(tiny_studies.run(side_by_side(study, lanes=3), 1), one_by_one)


@pytest.fixture
def leaning(registry_as_it_was):
    """DPO whose margin is shifted by a trained number, which starts at random."""

    def init_params(key, *, layers, width):
        return {'shift': jax.random.normal(key, (2,))}

    @losses.loss('Nobody 2026, arXiv:0000.00000, Eq. 1', init_params=init_params)
    def leaning(chosen, rejected, *, params, beta=0.1):
        """-log sigmoid of DPO's margin and a trained number."""
        ratios = [beta * (side.policy_logps - side.reference_logps[0]).sum(axis=-1) for side in (chosen, rejected)]
        return -jax.nn.log_sigmoid(ratios[0] - ratios[1] + params['shift'].sum()), Rewards(*ratios)


def test_losses_that_train_parts_of_their_own(leaning, tmp_path):
    """Each starts with the parts that it has alone, whoever stands beside it."""
    methods = {'leaning': Method({'leaning': {}}), 'both': Method({'dpo': {}, 'leaning': {'weight': 0.5}})}
    study = Study(tiny_studies.base(tmp_path), methods, seeds=(0,), baseline='leaning')
    one_by_one = tiny_studies.run(study)
    assert_alike(tiny_studies.run(side_by_side(study, lanes=2), 2), one_by_one)
    assert_as_trained(one_by_one, tmp_path, [next(key for key in one_by_one if key[0] == 'both')])


def watched(workshop, bundle):
    """The states that the bundle's program leaves."""
    shop, states = workshop.shop(bundle), []

    def train_and_keep(state, batch, settings):
        state, metrics = shop.programs.train(state, batch, settings)
        states.append(jax.device_get(state.params))
        return state, metrics

    workshop._shops[bundle.kind] = dataclasses.replace(shop, programs=shop.programs._replace(train=train_and_keep))
    return states


def test_a_cell_that_diverges_leaves_its_neighbours_as_they_are(whole):
    workshop = Workshop(side_by_side(whole), pathlib.Path('experiment.py'), None, lambda filled: None)
    (bundle,) = bundles(workshop.study, [cell for cell in expand(whole) if cell.method != 'simpo'], 8)
    place, broken = 3, list(bundle.cells)
    broken[place] = dataclasses.replace(
        broken[place], config=replaced(broken[place].config, 'optimizer.learning_rate', 1e30)
    )
    states = watched(workshop, bundle)
    sound, found = (
        [outcome for _, outcome in language_model.run_bundle(workshop, each, lambda step: None)]
        for each in (bundle, dataclasses.replace(bundle, cells=tuple(broken)))
    )
    assert [outcome.state for outcome in found] == [DIVERGED if n == place else FINISHED for n in range(len(found))]
    assert found[place].error.startswith('step 2: ') and found[place].pairs == {}
    assert max(line['step'] for line in found[place].lines) == 2
    for number, (ours, theirs) in enumerate(zip(found, sound)):
        if number != place:
            assert ours.lines == theirs.lines
            for split, numbers in ours.pairs.items():
                jax.tree.map(np.testing.assert_array_equal, vars(numbers), vars(theirs.pairs[split]))
    assert len(states) == 6
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(states))
    for early, late in zip(jax.tree.leaves(states[3]), jax.tree.leaves(states[5])):
        np.testing.assert_array_equal(early[place], late[place])


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'optimizer': Optimizer(learning_rate=-1.0)}, 'optimizer.learning_rate must be positive'),
        ({'optimizer': Optimizer(schedule='lnear')}, "Unknown optimizer.schedule 'lnear'. Did you mean 'linear'"),
        ({'mesh': dataclasses.replace(tiny_studies.Mesh(), fsdp=2)}, 'mesh.fsdp is 2: set it to 1'),
        ({'mesh': dataclasses.replace(tiny_studies.Mesh(), data=8)}, 'mesh.data is 8: set it to -1'),
        ({'references': {'initial': Reference(memory='pinned_host')}}, 'references.initial.memory must be device'),
    ],
)
def test_cells_that_cannot_be_are_refused_before_any_is_trained(whole, changes, message):
    study = side_by_side(whole, base=dataclasses.replace(whole.base, **changes), grid={})
    with pytest.raises(InputError) as refused:
        bundles(study, expand(study), 8)
    assert message in str(refused.value)


def test_a_value_of_a_grid_that_cannot_be_is_refused(whole):
    study = dataclasses.replace(whole, grid={'optimizer.warmup_steps': (1, -1)})
    with pytest.raises(InputError, match='optimizer.warmup_steps must be 0 or more'):
        bundles(study, expand(study), 8)


def test_programs_are_for_as_many_cells_as_are_asked_for(whole):
    def sizes(study, devices=1):
        return [(len(bundle.cells), bundle.at_once) for bundle in bundles(study, expand(study), devices)]

    assert sizes(whole) == [(1, 1)] * 8
    assert sizes(side_by_side(whole, cells_per_program=3)) == [(3, 3), (3, 3), (2, 3)]
    assert sizes(side_by_side(whole, cells_per_program=3), 8) == [(8, 8)]
    assert sizes(side_by_side(whole, cells_per_program=3), 2) == [(4, 4), (4, 4)]
    # What is not traced makes kinds of its own.
    untraced = side_by_side(whole, grid={'optimizer.weight_decay': (0.0, 0.1), 'train.batch_pairs': (2, 4)})
    assert sizes(untraced) == [(8, 8)] * 4
    seeds = dataclasses.replace(whole.base, model=dataclasses.replace(whole.base.model, source='random:some.json'))
    assert sizes(side_by_side(whole, base=seeds)) == [(6, 6), (2, 2)]
