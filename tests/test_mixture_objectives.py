"""Mixtures through the objective: golden values of recipes, metrics of references, refusals and overrides."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from references.many import NAMES, golden_sides, sides, sums, token_counts, without

from jaxpo import cli, objective
from jaxpo.errors import InputError
from jaxpo.references import mixing, weighting

TWO = NAMES[:2]


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def evaluated(spec, chosen, rejected, references=TWO, **more):
    made = objective.make(spec, references)
    counts = objective.counts_of(chosen.weights, rejected.weights)
    weight = jnp.ones(chosen.weights.shape[0])
    state = {'state': objective.init_state(made), **more}
    return objective.evaluate(made, made.hyperparameters, chosen, rejected, weight, counts, **state)


def single(side, k):
    return side.replace(reference_logps=side.reference_logps[k][None])


@pytest.mark.parametrize(
    'spec, value',
    [
        (objective.mrpo(), 0.6727470104),
        (objective.mrpo(eps=0.0), 0.5130152524),
        (objective.mrpo(eps=0.0, primary='external'), 1.3873353251),
        (objective.mrpo(order='official_code'), 0.5958178930),
        (objective.mrpo(mix='geometric'), 0.6666397390),
        ({'mixture': {'weights': 'arwc'}, 'multi_dpo': {}}, 1.1617043386),
        ({'mixture': {'weights': 'arwc', 'clip': 'adaptive'}, 'multi_dpo': {}}, 0.6718186283),
    ],
)
def test_golden_values(double, spec, value):
    np.testing.assert_allclose(evaluated(spec, *golden_sides())[0], value, atol=1e-9)


def test_mrpo_is_an_objective_like_any_other():
    mixture = {'mix': 'harmonic', 'weights': 'arwc', 'clip': 'adaptive', 'eps': 0.2, 'primary': 'external'}
    assert objective.mrpo(beta=0.3, eps=0.2, primary='external') == {'mixture': mixture, 'dpo': {'beta': 0.3}}


@pytest.mark.parametrize('primary', NAMES)
def test_mrpo_without_a_region_is_dpo_on_the_primary(double, primary):
    pair, place = sides(), NAMES.index(primary)
    value, metrics = evaluated(objective.mrpo(eps=0.0, primary=primary), *pair, NAMES)
    expected, theirs = evaluated({'dpo': {}}, *(single(side, place) for side in pair), TWO[:1])
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for name, number in theirs.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize('clip', ['none', 'adaptive'])
@pytest.mark.parametrize('seed', range(5))
def test_multi_dpo_is_at_least_the_geometric_mix(double, seed, clip):
    """By convexity, whatever the weights; their rewards are the same."""
    pair, mixture = sides(seed=seed), {'weights': 'arwc', 'clip': clip}
    geometric, theirs = evaluated({'mixture': {'mix': 'geometric', **mixture}, 'dpo': {}}, *pair, NAMES)
    many, ours = evaluated({'mixture': mixture, 'multi_dpo': {}}, *pair, NAMES)
    assert many > geometric + 1e-7
    np.testing.assert_allclose(ours['rewards/margins'], theirs['rewards/margins'], rtol=1e-9)


def arwc_by_numpy(chosen, rejected):
    apart = np.abs(sums(chosen) - sums(rejected))
    return apart / apart.sum(axis=0)


def test_metrics_say_how_much_each_reference_counts_and_how_often_it_is_right(double):
    chosen, rejected = sides()
    # The second reference says the same of both completions of the first pair, by token.
    logps = chosen.reference_logps
    level = sums(rejected)[1, 0] / token_counts(rejected)[0]
    chosen = chosen.replace(reference_logps=logps.at[1, 0].set(chosen.weights[0] * level))
    metrics = evaluated({'mixture': {'weights': 'arwc'}, 'dpo': {}}, chosen, rejected, NAMES)[1]
    shares = arwc_by_numpy(chosen, rejected).mean(axis=1)
    margins = sums(chosen) / token_counts(chosen) - sums(rejected) / token_counts(rejected)
    right = np.where(np.abs(margins) < 1e-12, 0.5, margins > 0).mean(axis=1)
    assert right[1] % 0.25 == 0.125
    found = {kind: [float(metrics[f'references/{name}/{kind}']) for name in NAMES] for kind in ('weight', 'accuracies')}
    np.testing.assert_allclose(found['weight'], shares, rtol=1e-12)
    np.testing.assert_allclose(sum(found['weight']), 1, rtol=1e-12)
    np.testing.assert_allclose(found['accuracies'], right, rtol=1e-12)
    own = np.asarray(chosen.policy_logps).sum(-1) / token_counts(chosen)
    own = own > np.asarray(rejected.policy_logps).sum(-1) / token_counts(rejected)
    np.testing.assert_allclose(metrics['logps/accuracies'], own.mean(), rtol=1e-12)


def test_a_reference_is_judged_by_tokens_of_its_own(double):
    chosen, rejected = sides()
    lengths = jnp.stack([chosen.weights.sum(-1), 40 * chosen.weights.sum(-1), chosen.weights.sum(-1)])
    metrics = evaluated({'mixture': {}, 'dpo': {}}, chosen.replace(reference_lengths=lengths), rejected, NAMES)[1]
    assert metrics['references/external/accuracies'] == 1
    own = sums(chosen)[0] / token_counts(chosen) > sums(rejected)[0] / token_counts(rejected)
    np.testing.assert_allclose(metrics['references/initial/accuracies'], own.mean(), rtol=1e-12)


def test_metrics_are_of_pairs_that_have_both_sides_and_of_slots_that_are_pairs(double):
    pair = sides(empty=(2,))
    pair[1] = without(pair[1], [0])
    made = objective.make({'mixture': {'weights': 'arwc'}, 'apo_zero': {}}, NAMES)
    counts = objective.counts_of(*(side.weights for side in pair))
    weight = jnp.array([1.0, 1.0, 0.0, 1.0])
    state = objective.init_state(made)
    metrics = objective.evaluate(made, made.hyperparameters, *pair, weight, counts, state=state)[1]
    there = [1, 3]
    margins = sums(pair[0]) / token_counts(pair[0]) - sums(pair[1]) / token_counts(pair[1])
    shares = arwc_by_numpy(*(side.replace(reference_logps=side.reference_logps[:, there]) for side in pair))
    for k, name in enumerate(NAMES):
        np.testing.assert_allclose(metrics[f'references/{name}/accuracies'], (margins[k, there] > 0).mean())
        # The pair without a partner weighs all references alike.
        np.testing.assert_allclose(metrics[f'references/{name}/weight'], (shares[k].sum() + 1 / 3) / 3, rtol=1e-12)
    np.testing.assert_allclose(sum(metrics[f'references/{name}/weight'] for name in NAMES), 1, rtol=1e-12)


@pytest.mark.parametrize('mix', mixing.MIXES)
@pytest.mark.parametrize('weights', weighting.WEIGHTINGS)
def test_one_reference_behind_a_mixture_is_that_reference(double, weights, mix):
    pair, state = sides(references=1), {}

    def value(spec, policies):
        both = (side.replace(policy_logps=policy) for side, policy in zip(pair, policies))
        return evaluated(spec, *both, TWO[:1], key=jax.random.key(0))

    policies = [side.policy_logps for side in pair]
    specs = [{'mixture': {'mix': mix, 'weights': weights, 'clip': 'adaptive'}, 'dpo': {}, 'ipo': {}}]
    specs += [{'dpo': {}, 'ipo': {}}]
    ours, theirs = (jax.value_and_grad(lambda p, spec=spec: value(spec, p)[0])(policies) for spec in specs)
    assert state == {} and ours[0] == theirs[0]
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])


@pytest.mark.parametrize('references', [TWO[:1], TWO, NAMES])
@pytest.mark.parametrize('clip', mixing.CLIPS)
@pytest.mark.parametrize('loss', ['dpo', 'multi_dpo'])
@pytest.mark.parametrize('weights', weighting.WEIGHTINGS)
def test_what_is_spelled_out_stays_as_it_is_and_means_the_same(weights, loss, clip, references):
    spec = {'mixture': {'weights': weights, 'clip': clip}, loss: {}}
    full = objective.spelled_out(spec, references)
    assert objective.spelled_out(full, references) == full
    assert objective.make(full, references) == objective.make(spec, references)
    assert objective.make(full, references).hyperparameters == objective.make(spec, references).hyperparameters


@pytest.mark.parametrize(
    'spec, references, message',
    [
        ({'mixture': {'mix': 'harmonics'}, 'dpo': {}}, TWO, "Did you mean 'harmonic'"),
        ({'mixture': {'weights': 'arwk'}, 'dpo': {}}, TWO, "Did you mean 'arwc'"),
        ({'mixture': {'initail': 0.5}, 'dpo': {}}, TWO, "Did you mean 'initial'"),
        ({'mixtur': {'mix': 'harmonic'}, 'dpo': {}}, TWO, "Did you mean 'mixture'"),
        ({'mixture': {}}, TWO, 'names no loss'),
        ({'dpo': {}}, TWO, r"objective=\{'mixture': \{'mix': 'geometric'\}, ...\}, or drop all but one"),
        ({'multi_dpo': {}}, TWO, "'mixture'"),
        ({'mixture': {}, 'simpo': {}}, TWO, 'simpo reads none'),
        ({'mixture': {'mix': 'harmonic'}, 'multi_dpo': {}}, TWO, 'mix has no effect: multi_dpo'),
        ({'mixture': {'order': 'paper'}, 'multi_dpo': {}}, TWO, 'order has no effect: multi_dpo'),
    ],
)
def test_what_makes_no_sense_is_refused(spec, references, message):
    with pytest.raises(InputError, match=message):
        objective.make(spec, references)


def test_a_mix_beside_multi_dpo_is_for_the_other_losses():
    objective.make({'mixture': {'mix': 'harmonic'}, 'multi_dpo': {}, 'dpo': {}}, TWO)


MODULE = """
import dataclasses, pathlib, tiny_runs
from jaxpo.config import Reference
def get_config():
    config = tiny_runs.experiment(pathlib.Path(__file__).parent).config
    references = {{'initial': Reference(), 'base': Reference(str(pathlib.Path(__file__).parent / 'model'))}}
    return dataclasses.replace(config, references=references, objective={objective})
"""


def overridden(folder: pathlib.Path, spec, *words):
    """The objective of an experiment with two references, `initial` and `base`, by the command line."""
    tiny_runs.experiment(folder)
    path = folder / 'mixed.py'
    path.write_text(MODULE.format(objective=spec))
    config = cli.load(str(path), words, 'train').config
    return objective.make(config.objective, tuple(config.references))


def test_another_weighting_by_the_command_line(tmp_path):
    made = overridden(tmp_path, {'mixture': {}, 'dpo': {}}, '--objective.mixture.weights', 'arwc')
    assert made.mixture.weights == 'arwc'
    made = overridden(tmp_path, objective.mrpo(), '--objective.mixture.weights', 'swcw')
    assert made.mixture.words == (('window', 1),) and made.hyperparameters['mixture'] == {'eps': 0.1}
    made = overridden(tmp_path, {'mixture': {'clip': 'fixed'}, 'dpo': {}}, '--objective.mixture.clip', 'none')
    assert made.mixture.clip == 'none'
    with pytest.raises(InputError, match="Unknown key of objective.mixture 'confidence'"):
        said = {'mixture': {'weights': 'arwc', 'confidence': 'mean'}, 'dpo': {}}
        overridden(tmp_path, said, '--objective.mixture.weights', 'swcw')
    explicit = {'mixture': {'base': 0.7}, 'dpo': {}}
    with pytest.raises(InputError, match="base is a fixed weight, but weights is 'arwc': drop one"):
        overridden(tmp_path, explicit, '--objective.mixture.weights', 'arwc')


def test_another_weight_by_the_command_line_is_the_same_function(tmp_path):
    spec = {'mixture': {'base': 0.7}, 'dpo': {}}
    made = overridden(tmp_path, spec)
    other = overridden(tmp_path, spec, '--objective.mixture.base', '0.5', '--objective.dpo.beta', '0.2')
    assert other == made and hash(other) == hash(made)
    assert other.hyperparameters['mixture'] == {'weight_of/initial': 1.0, 'weight_of/base': 0.5}
    chosen, rejected = (side.replace(reference_logps=side.reference_logps[:2]) for side in sides(dtype=jnp.float32))
    counts = objective.counts_of(chosen.weights, rejected.weights)

    @jax.jit
    def value(numbers):
        return objective.evaluate(made, numbers, chosen, rejected, jnp.ones(4), counts)[0]

    assert value(made.hyperparameters) != value(other.hyperparameters)
    assert value._cache_size() == 1
