"""The exact world: its enumeration, known theorems about optima, and the cells of its study."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import logps, losses
from jaxpo import objective as objectives
from jaxpo.errors import InputError
from jaxpo.experiment import import_module
from jaxpo.study import design, records

exact = import_module(str(pathlib.Path(__file__).parents[2] / 'experiments/exact/exact.py'))
environment, optimum, training = exact.environment, exact.optimum, exact.training
pytestmark = pytest.mark.usefixtures('compiled_quickly')

SMALL = environment.Environment(prompts=2, longest=3, seed=1)
BOTH = environment.REFERENCES
TRIALS, EXCLUDED = exact.trials()


@pytest.fixture(scope='module', autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope='module')
def world():
    return environment.make_world(SMALL)


MEASURE = jax.jit(environment.measure)


def policy(world, logits) -> np.ndarray:
    return np.exp(environment.log_policy(world, jnp.asarray(logits)))


def reference(world, name='reference') -> np.ndarray:
    return policy(world, world.references[name])


def normalised(values) -> np.ndarray:
    return values / values.sum(axis=1, keepdims=True)


def better(world) -> np.ndarray:
    """`[X, Y, Y]`: how likely the first completion is preferred to the second."""
    return 1 / (1 + np.exp(world.reward[:, None, :] - world.reward[:, :, None]))


def test_completions_are_all_there_once_and_probabilities_sum_to_one(world):
    lengths = world.weights.sum(axis=1).astype(int)
    found = {tuple(row[:length]) for row, length in zip(world.tokens, lengths)}
    # One ends at once, two after a word; of the four prefixes of two words each may go on with all three tokens.
    assert len(found) == len(world.tokens) == 1 + 2 + 4 * 3
    assert all(0 not in completion[:-1] for completion in found)
    for name in BOTH:
        np.testing.assert_allclose(reference(world, name).sum(axis=1), 1, rtol=1e-14)
    assert abs((reference(world) * world.reward).sum(axis=1)).max() < 1e-14


def test_log_probabilities_are_those_of_walking_the_table(world):
    table = world.references['other']
    prefixes = {tuple(row[:n]) for row in world.tokens for n in range(3) if 0 not in row[:n]}
    prefixes = sorted(prefixes, key=lambda prefix: (len(prefix), prefix))
    by_hand = np.zeros(world.reward.shape)
    for x in range(len(table)):
        for y, (tokens, weights) in enumerate(zip(world.tokens, world.weights)):
            for n in range(int(weights.sum())):
                row = table[x, prefixes.index(tuple(tokens[:n]))]
                by_hand[x, y] += row[tokens[n]] - np.log(np.exp(row).sum())
    np.testing.assert_allclose(np.log(reference(world, 'other')), by_hand, rtol=1e-12)


def test_statistics_of_tokens_are_their_definitions_and_those_of_models(world):
    table, other = (jnp.asarray(world.references[name][0]) for name in BOTH)
    p, q = (np.exp(t) / np.exp(t).sum(axis=-1, keepdims=True) for t in (table, other))
    by_hand = {
        'forward_kl': (q * np.log(q / p)).sum(axis=-1),
        'reverse_kl': (p * np.log(p / q)).sum(axis=-1),
        'entropy': -(p * np.log(p)).sum(axis=-1),
        'log_sum_squares': np.log((p**2).sum(axis=-1)),
    }

    @jax.jit
    def both(table, other):
        head = jnp.eye(3, dtype=jnp.float32)
        hidden, base = (t.astype(jnp.float32)[None] for t in (table, other))
        against, tokens = logps.Reference(base, head), jnp.zeros(hidden.shape[:2], jnp.int32)
        model = logps.token_statistics(hidden, head, tokens, statistics=tuple(by_hand), reference=against)
        return environment.token_statistics(table, other, tuple(by_hand)), model

    found, model = both(table, other)
    for name, values in by_hand.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-11, err_msg=name)
        np.testing.assert_allclose(getattr(model, name)[0], values, rtol=1e-4, atol=1e-6, err_msg=name)


def test_completions_of_a_pair_hold_what_the_table_says(world):
    objective = objectives.make({'tdpo2': {}, 'wpo': {}, 'rainbow_po': {}}, BOTH[:1])
    pairs = environment.Pairs(jnp.array([1, 0]), jnp.array([0, 9]), jnp.array([9, 2]))
    logits = jnp.asarray(world.references['other'])
    chosen, _ = jax.jit(lambda logits: environment.sides(world, objective, logits, pairs))(logits)
    np.testing.assert_allclose(
        (chosen.weights * chosen.policy_logps).sum(axis=1), np.log(policy(world, logits))[[1, 0], [0, 9]]
    )
    assert chosen.reference_logps.shape == (1, 2, 3) and chosen.vocabulary == 3
    p, q = (np.exp(jax.nn.log_softmax(world.references[name][0])) for name in ('other', 'reference'))
    by_node = (q * np.log(q / p)).sum(axis=-1)
    np.testing.assert_allclose(chosen.forward_kl[1], by_node[world.node[9]] * world.weights[9])
    assert not np.asarray(chosen.forward_kl)[chosen.weights == 0].any()
    q = np.exp(jax.nn.log_softmax(world.references['reference'][1, 0]))
    np.testing.assert_allclose(chosen.reference_entropy[0, 0], -(q * np.log(q)).sum())


@pytest.mark.parametrize('proposals', ['reference', 'uniform'])
def test_pairs_are_as_likely_as_proposals_and_labels_make_them(proposals):
    world = environment.make_world(dataclasses.replace(SMALL, proposals=proposals))
    found, preferred = np.asarray(environment.pair_probabilities(world)), better(world)
    q = world.proposals[0]
    ordered = np.outer(q, q) * (1 - np.eye(len(q)))
    # Whichever of the two was written first, the first of the found is the one that was preferred.
    np.testing.assert_allclose(found[0], (ordered + ordered.T) * preferred[0] / ordered.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.sum(axis=(1, 2)), 1, rtol=1e-12)
    drawn = jax.jit(environment.draw, static_argnums=2)(world, jax.random.key(0), 20_000)
    share = np.zeros_like(found)
    np.add.at(share, tuple(np.asarray(part) for part in drawn), 1 / 20_000)
    assert abs(share - found / 2).sum() < 0.2 and (np.asarray(drawn.chosen) != np.asarray(drawn.rejected)).all()


def solved(world, spec, references=BOTH[:1]):
    objective = objectives.make(spec, references)
    numbers = jax.tree.map(np.float64, objective.hyperparameters)
    found = optimum.solve(objective, world, optimum.population(world), numbers)
    assert float(found.gradient) <= optimum.SMALL
    return policy(world, found.logits)


def test_dpo_ends_at_the_regularised_optimum_whoever_proposes(world):
    for proposals in ('reference', 'uniform'):
        here = environment.make_world(dataclasses.replace(SMALL, proposals=proposals))
        expected = normalised(reference(here) * np.exp(here.reward / 0.2))
        found = solved(here, {'dpo': {'beta': 0.2}})
        assert abs(found - expected).max() < 1e-8
        measured = MEASURE(here, jnp.log(found), 0.2)
        assert abs(measured['optimum_kl']) < 1e-8 and abs(measured['gap']) < 1e-8
        assert measured['total_variation'] < 1e-8 < measured['reward']


def test_another_prior_moves_the_optimum_as_the_theory_says(world):
    tilt = np.exp(world.reward / 0.2)
    prior = np.sqrt(reference(world) * reference(world, 'other'))
    found = solved(world, {'mixture': {'mix': 'geometric'}, 'dpo': {'beta': 0.2}}, BOTH)
    assert abs(found - normalised(prior * tilt)).max() < 1e-8


def test_ipo_ends_where_its_paper_says(world):
    """Azar et al. 2023: proportional to pi_ref * exp(P(y preferred to a proposal) / tau)."""
    against_proposals = (better(world) * world.proposals[:, None, :]).sum(axis=2)
    expected = normalised(reference(world) * np.exp(against_proposals / 0.1))
    assert abs(solved(world, {'ipo': {'tau': 0.1, 'reduction': 'sum'}}) - expected).max() < 1e-8


def test_a_length_normalised_method_leaves_reward_on_the_table(world):
    measured = MEASURE(world, jnp.log(solved(world, {'simpo': {'beta': 2.0}})), 0.1)
    assert measured['gap'] > 0.02


def test_the_frontier_is_above_every_policy_and_on_the_best_ones(world):
    random = np.random.default_rng(0)
    tables = jnp.asarray(random.normal(size=(50, *world.references['other'].shape)))
    measured = jax.jit(jax.vmap(lambda one: environment.measure(world, environment.log_policy(world, one), 0.3)))(
        tables
    )
    assert (measured['gap'] > 0).all() and (measured['kl'] > 0).all()
    best = environment.best_policy(world, 0.3)
    reward, kl = environment.reward_and_kl(world, best)
    assert math.isclose(environment.beta_of(world, kl), 0.3, rel_tol=1e-9)
    # What the optimum loses to no policy: J* - J(pi) = beta * KL(pi || pi*).
    j = measured['reward'] - 0.3 * measured['kl']
    np.testing.assert_allclose((reward - 0.3 * kl) - j, 0.3 * measured['optimum_kl'], rtol=1e-9)


def test_losses_that_look_at_other_pairs_have_no_expectation_over_pairs():
    coupled = {name for name in TRIALS if name in losses.LOSSES and losses.find(name).couples_batch}
    assert coupled == {'alpha_dpo', 'aot', 'aot_unpaired', 'bco', 'beta_dpo'}
    for name in coupled:
        with pytest.raises(InputError, match=f'^{name}: '):
            optimum.check(objectives.make({name: {}}, BOTH[:1]))


def test_every_registered_loss_is_on_trial_or_named_with_a_reason():
    assert {*losses.LOSSES} <= {*TRIALS} | {*EXCLUDED} and not {*TRIALS} & {*EXCLUDED}
    needing = {'hpo', 'kto', 'mapo', 'mdpo', 'modpo', 'odpo', 'sdpo', 'sparse_po', 'spo', 'tis_dpo'}
    needing.add('token_weighted_dpo')
    assert {*EXCLUDED} == needing and all(EXCLUDED.values())


@pytest.mark.parametrize('name', TRIALS)
def test_a_method_on_trial_gets_all_that_it_reads(name, world):
    method = TRIALS[name]
    references = method.settings.get('references', BOTH[:1])
    objective = objectives.make(method.objective, references)
    pairs = environment.Pairs(jnp.array([0, 1]), jnp.array([1, 2]), jnp.array([3, 0]))
    counts = dict.fromkeys(('pairs', 'tokens', 'completions', 'chosen', 'rejected', 'both'), 2.0)

    def loss(logits):
        sides = environment.sides(world, objective, logits, pairs)
        parts = {'state': objectives.init_state(objective), 'key': jax.random.key(0)}
        return objectives.evaluate(objective, objective.hyperparameters, *sides, jnp.ones(2), counts, **parts)[0]

    found = jax.eval_shape(loss, jnp.asarray(world.references['reference']))
    assert found.dtype == np.float64 and found.shape == ()


def test_every_method_has_as_many_settings_and_no_cell_is_there_twice():
    study = exact.get_study()
    cells = design.expand(study)
    assert len(cells) == (len(TRIALS) + 1) * 6 * len(study.seeds) == len({cell.id for cell in cells})


@pytest.fixture(scope='module')
def cells():
    study = exact.get_study()
    chosen = [cell for cell in design.expand(study) if cell.method == 'dpo' and cell.setting['learning_rate'] == 0.1]
    return [cell for cell in chosen if cell.repeat < 5]


def with_rate(cell, rate: float):
    return dataclasses.replace(cell, config=dataclasses.replace(cell.config, learning_rate=rate))


@pytest.fixture(scope='module')
def outcomes(cells):
    """Of all cells, the last of which is given a learning rate that nothing survives."""
    return [outcome for _, outcome in exact.run_cells([*cells[:-1], with_rate(cells[-1], 1e308)])]


def of_split(outcome, split: str, name: str) -> np.ndarray:
    return np.array([line[name] for line in outcome.lines if line.get('split') == split])


def test_a_cell_alone_is_as_it_is_among_others(cells, outcomes):
    for place in (0, 7):
        ((_, alone),) = exact.run_cells([cells[place]])
        assert alone.state == outcomes[place].state == 'finished'
        for line, other in zip(alone.lines, outcomes[place].lines, strict=True):
            assert line.keys() == other.keys()
            np.testing.assert_allclose(
                [v for k, v in line.items() if k != 'split'], [v for k, v in other.items() if k != 'split'], atol=1e-6
            )


def test_a_method_under_another_name_differs_by_exactly_nothing(cells, outcomes):
    config = dataclasses.replace(cells[0].config, objective={'info_nca': {'beta': 0.03}})
    ((_, same),) = exact.run_cells([dataclasses.replace(cells[0], config=config)])
    for name in ('reward', 'kl', 'gap', 'log_ratios/accuracies', 'rewards/accuracies'):
        np.testing.assert_array_equal(of_split(same, 'report', name), of_split(outcomes[0], 'report', name), name)


def test_a_cell_that_diverges_says_so_and_leaves_the_others(outcomes, tmp_path, cells):
    assert [outcome.state for outcome in outcomes] == ['finished'] * (len(cells) - 1) + ['diverged']
    assert 'not finite' in outcomes[-1].error and not outcomes[-1].pairs
    for cell, outcome in ((cells[0], outcomes[0]), (cells[-1], outcomes[-1])):
        records.write(tmp_path, cell, outcome, {})
    assert records.states(tmp_path) == {cells[0].id: 'finished', cells[-1].id: 'diverged'}


def test_a_program_that_fails_is_an_outcome_of_its_cells(cells, monkeypatch):
    def fail(*_):
        raise RuntimeError('no memory')

    monkeypatch.setattr(training.program, 'train_lanes', fail)
    found = list(exact.run_cells(cells[:2]))
    assert [cell for cell, _ in found] == cells[:2]
    assert all(outcome.state == 'error' and outcome.error == 'RuntimeError: no memory' for _, outcome in found)


def test_dpo_on_few_pairs_over_optimises_and_lowers_the_chosen_too(cells, outcomes):
    """The true reward rises and falls, while KL grows and the training loss goes on falling."""
    finished = [outcome for cell, outcome in zip(cells, outcomes) if cell.setting['objective.dpo.beta'] == 0.1]
    reward, kl = (np.mean([of_split(o, 'report', name) for o in finished], axis=0) for name in ('reward', 'kl'))
    assert reward[0] == pytest.approx(0, abs=1e-12) and kl[0] == pytest.approx(0, abs=1e-12)
    assert 0 < reward.argmax() < len(reward) - 1 and reward[-1] < reward.max() - 0.03
    assert (np.diff(kl) > 0).all()
    losses_ = np.mean([[line['loss'] for line in o.lines if 'split' not in line] for o in finished], axis=0)
    by_quarter = losses_.reshape(4, -1).mean(axis=1)
    assert (np.diff(by_quarter) < 0).all()
    held_out = np.mean([of_split(o, 'report', 'loss') for o in finished], axis=0)
    assert held_out[-1] > held_out.min()
    for name in ('log_ratios/chosen', 'log_ratios/rejected'):
        assert all(of_split(outcome, 'report', name)[-1] < 0 for outcome in finished)
    assert all(of_split(outcome, 'report', 'chosen_falling')[-1] > 0.5 for outcome in finished)


def test_the_selection_split_has_samples_and_the_report_the_truth(outcomes):
    selected, reported = (of_split(outcomes[0], split, 'reward')[-1] for split in ('selection', 'report'))
    assert selected != reported and abs(selected - reported) < 0.2
    assert {*outcomes[0].pairs} == {'selection', 'report'}
    numbers, others = (outcomes[0].pairs[split] for split in ('report', 'selection'))
    assert not np.array_equal(numbers.chosen_logps, others.chosen_logps)
    margin = numbers.chosen_reward - numbers.rejected_reward
    np.testing.assert_allclose(numbers.loss, np.logaddexp(0, -margin), atol=1e-8)


@pytest.mark.parametrize(
    'change, word',
    [
        ({'objective': {'kto': {}}}, 'mismatched'),
        ({'train': training.Train(steps=30)}, 'does not divide'),
        ({'train': training.Train(pairs=0)}, 'train.pairs'),
        ({'references': ('refrence',)}, 'reference'),
        ({'environment': environment.Environment(vocabulary=1)}, 'environment.vocabulary'),
    ],
)
def test_what_cannot_be_trained_is_refused(change, word):
    config = training.Exact('', **{'objective': {'dpo': {}}, **change})
    cell = design.Cell('0' * 12, 'dpo', {}, 0, 0, config)
    with pytest.raises(InputError, match=word):
        list(exact.run_cells([cell]))


def test_the_table_of_optima_has_a_row_for_each_strength_and_says_who_has_none():
    lines = list(exact.optima_table(['dpo', 'bco'], SMALL))
    assert [line.split('|')[1].strip() for line in lines[2:]] == ['bco', 'dpo', 'dpo', 'dpo']
    assert 'other pairs' in lines[2]
    assert len({line.count('|') for line in lines}) == 1
