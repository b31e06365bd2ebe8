"""Golden values and invariants of the anchored, multi-objective and conditional losses that need more than a pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import oracles

from jaxpo import losses, objective
from jaxpo.errors import InputError
from jaxpo.losses import anchored, conditional, contract, links, multi_objective, pairwise, scores
from jaxpo.types import Completion

# Log-probabilities (chosen, rejected) of a run's models: policy, primary reference, and what came before.
POLICY, PRIMARY = (-40.0, -52.0), (-42.0, -50.0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def completion(policy, reference, tokens=20, **fields):
    """One completion whose log-probabilities are spread evenly over its tokens."""
    share = jnp.full((1, tokens), 1.0 / tokens)
    models = {name: value * share for name, value in fields.pop('models', {}).items()}
    columns = {name: jnp.array([value]) for name, value in fields.pop('columns', {}).items()}
    weights = jnp.ones((1, tokens))
    return Completion(policy * share, (reference * share)[None], weights, columns=columns, model_logps=models, **fields)


def by_ratio(chosen, rejected):
    """A pair with these log-ratios."""
    return completion(chosen - 30.0, -30.0), completion(rejected - 35.0, -35.0)


def primary(**sides):
    """The pair of POLICY against PRIMARY; `sides`: further fields as (chosen's, rejected's)."""
    return [
        completion(policy, reference, **{name: values[side] for name, values in sides.items()})
        for side, (policy, reference) in enumerate(zip(POLICY, PRIMARY))
    ]


def value(loss, pair, **hyperparameters):
    (only,) = loss(*pair, **hyperparameters)[0]
    return float(only)


def slopes(loss, pair, **hyperparameters):
    """The derivative by each completion's log-probability."""
    gradients = jax.grad(lambda pair: loss(*pair, **hyperparameters)[0].sum())(list(pair))
    return [float(gradient.policy_logps.mean()) for gradient in gradients]


def oracle_values(name, pair, **hyperparameters):
    sides = [[oracles.side_of(side, index) for index in range(side.weights.shape[0])] for side in pair]
    return [oracles.ORACLES[name](*each, **hyperparameters) for each in zip(*sides)]


# -- dpo, on the same pair ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('reference, golden', [(PRIMARY, 0.5130152524), ((-35.0, -58.0), 1.3873353251)])
def test_dpo_golden_against_each_reference(reference, golden):
    pair = [completion(POLICY[side], reference[side]) for side in (0, 1)]
    assert value(pairwise.dpo, pair, beta=0.1) == pytest.approx(golden, rel=1e-9)


def test_selm_golden_is_dpo_and_the_log_ratio_of_a_fresh_completion():
    """SELM adds alpha * beta * log_ratio of one more completion, which it makes less likely."""
    fresh = float(scores.log_ratio(completion(-30.0, -31.0))[0])
    assert value(pairwise.dpo, primary(), beta=0.01) + 0.001 * 0.01 * fresh == pytest.approx(0.6733571672, rel=1e-9)


# -- anchored ---------------------------------------------------------------------------------------------------------


def test_dpop_golden():
    pair = completion(-12.0, -11.0, tokens=6), completion(-15.0, -14.5, tokens=9)
    assert value(anchored.dpop, pair, beta=0.3, penalty=5.0) == pytest.approx(1.825674437415, rel=1e-12)


def test_dpop_without_a_penalty_is_dpo_and_with_one_where_nothing_has_fallen():
    fallen, risen = by_ratio(-1.0, 0.5), by_ratio(1.0, 0.5)
    assert value(anchored.dpop, fallen, beta=0.1, penalty=0.0) == value(pairwise.dpo, fallen, beta=0.1)
    assert value(anchored.dpop, risen, beta=0.1) == value(pairwise.dpo, risen, beta=0.1)
    assert value(anchored.dpop, fallen, beta=0.1) > value(pairwise.dpo, fallen, beta=0.1)


def test_dpop_pushes_a_fallen_completion_up_by_one_plus_the_penalty():
    chosen, rejected = slopes(anchored.dpop, by_ratio(-1.0, 0.5), penalty=50.0)
    assert chosen / -rejected == pytest.approx(51.0)


@pytest.mark.parametrize('loss', [anchored.dpop, anchored.minor_dpo])
def test_the_first_step_is_that_of_dpo(loss):
    start = by_ratio(0.0, 0.0)
    np.testing.assert_allclose(slopes(loss, start, beta=0.1), slopes(pairwise.dpo, start, beta=0.1), rtol=1e-14)


@pytest.mark.parametrize('rejected, golden', [(1.5, 0.6684596480), (-2.0, 0.5981388694)])
def test_minor_dpo_golden(rejected, golden):
    assert value(anchored.minor_dpo, by_ratio(2.0, rejected), beta=0.1) == pytest.approx(golden, rel=1e-9)


def test_minor_dpo_leaves_a_fallen_rejected_completion_alone():
    assert slopes(anchored.minor_dpo, by_ratio(2.0, -1e-3))[1] == 0.0
    assert slopes(anchored.minor_dpo, by_ratio(2.0, 1e-3))[1] > 0.0


def test_cal_dpo_is_unscaled_dpo_and_the_anchors_of_hard_sppo():
    pair = by_ratio(3.0, -1.0)
    parts = value(pairwise.dpo, pair, beta=1.0) + value(anchored.sppo, pair, beta=0.1)
    assert value(anchored.cal_dpo, pair, beta=0.1) == pytest.approx(parts, rel=1e-14)


def test_hard_sppo_is_half_of_the_field_and_minimal_at_its_targets():
    assert 2 * value(anchored.sppo, by_ratio(1.0, -0.5), beta=0.1) == pytest.approx(36.25, rel=1e-12)
    assert value(anchored.sppo, by_ratio(5.0, -5.0), beta=0.1) == pytest.approx(0.0, abs=1e-20)


def test_sppo_with_win_probabilities_regresses_each_on_its_own():
    chosen, rejected = primary(columns=({'win_probability': 0.7}, {'win_probability': 0.4}))
    asked = ((2.0 - 0.2 / 0.1) ** 2 + (-2.0 + 0.1 / 0.1) ** 2) / 2
    assert value(anchored.sppo, (chosen, rejected), beta=0.1, labels='win_probability') == pytest.approx(asked)


@pytest.mark.parametrize('name', ['info_nca', 'nca'])
@pytest.mark.parametrize('alpha', [0.2, 0.7, 3.0])
def test_temperature_of_scores_equals_the_oracle(name, alpha):
    """The contract tests change hyperparameters of the default choices only."""
    options = {'labels': 'scores', 'alpha': alpha}
    sample = contract.example(losses.find(name), options)
    values, _ = contract.losses_of(losses.find(name), sample, options)
    pair = (sample.chosen, sample.rejected)
    np.testing.assert_allclose(values, oracle_values(name, pair, **options), rtol=1e-12)
    assert not np.allclose(values, oracle_values(name, pair, labels='scores', alpha=1.0), rtol=1e-9)


@pytest.mark.parametrize('loss', [anchored.info_nca, anchored.nca])
def test_cold_scores_are_hard_labels(loss):
    pair = primary(columns=({'score': 9.0}, {'score': 7.5}))
    cold = value(loss, pair, beta=0.1, labels='scores', alpha=1e-3)
    assert cold == pytest.approx(value(loss, pair, beta=0.1), rel=1e-14)


def test_soft_labels_are_reached_where_the_rewards_are_the_scores():
    """InfoNCA is minimal where the margin is the gap of scores over alpha, NCA where each reward is log(2 p)."""
    gap, alpha, beta = 1.5, 2.0, 0.1
    p = 1 / (1 + np.exp(-gap / alpha))

    def at(*rewards):
        pair = by_ratio(*(reward / beta for reward in rewards))
        return [side.replace(columns={'score': jnp.array([score])}) for side, score in zip(pair, (3.0 + gap, 3.0))]

    options = {'beta': beta, 'labels': 'scores', 'alpha': alpha}
    np.testing.assert_allclose(slopes(anchored.info_nca, at(0.4 + gap / alpha, 0.4), **options), 0, atol=1e-15)
    np.testing.assert_allclose(slopes(anchored.nca, at(np.log(2 * p), np.log(2 - 2 * p)), **options), 0, atol=1e-15)
    assert slopes(anchored.nca, at(np.log(2 * p) - 0.1, 0.0), **options)[0] < 0


@pytest.mark.parametrize('name', ['info_nca', 'nca'])
def test_the_temperature_is_there_only_where_scores_are(name):
    entry = losses.find(name)
    entry.check({'labels': 'scores', 'alpha': 2.0})
    assert entry.hyperparameters({'labels': 'scores'})['alpha'] == 1.0 and 'alpha' not in entry.defaults
    with pytest.raises(InputError, match='alpha'):
        entry.check({'alpha': 2.0})
    with pytest.raises(InputError, match="'score'. Did you mean 'scores'"):
        entry.check({'labels': 'score'})
    assert entry.needs_of({}).completion_columns == ()
    assert entry.needs_of({'labels': 'scores'}).completion_columns == ('score',)


def test_columns_are_needed_only_by_the_choice_that_reads_them():
    sppo, modpo = losses.find('sppo'), losses.find('modpo')
    assert not sppo.needs_of({}).completion_columns
    assert sppo.needs_of({'labels': 'win_probability'}).completion_columns == ('win_probability',)
    assert modpo.needs_of({}) == losses.Needs(completion_columns=('margin_reward',))
    assert modpo.needs_of({'margin': 'model'}) == losses.Needs(models=('margin',))


def test_apo_zero_of_unpaired_rows_is_the_half_that_is_there():
    chosen, rejected = by_ratio(3.0, 2.0)
    nothing = jax.tree.map(jnp.zeros_like, chosen)
    only_chosen, only_rejected = ((chosen, nothing), (nothing, rejected))
    for pair in (only_chosen, only_rejected, (nothing, nothing)):
        assert value(anchored.apo_zero, pair) == pytest.approx(oracle_values('apo_zero', pair)[0], rel=1e-14)
    halves = value(anchored.apo_zero, only_chosen) + value(anchored.apo_zero, only_rejected)
    assert value(anchored.apo_zero, (chosen, rejected)) == pytest.approx(halves, rel=1e-14)
    assert slopes(anchored.apo_zero, only_chosen)[0] < 0 and slopes(anchored.apo_zero, only_chosen)[1] == 0
    assert slopes(anchored.apo_zero, only_rejected)[1] > 0 and slopes(anchored.apo_zero, only_rejected)[0] == 0


def test_apo_zero_is_the_mean_over_rows_paired_or_not():
    pairs = [by_ratio(3.0, 2.0), by_ratio(1.0, -1.0)]
    pairs[1] = (pairs[1][0], jax.tree.map(jnp.zeros_like, pairs[1][1]))
    axes = {'policy_logps': 0, 'reference_logps': 1, 'weights': 0}

    def stacked(sides):
        return Completion(
            **{name: jnp.concatenate([getattr(side, name) for side in sides], axis) for name, axis in axes.items()}
        )

    sides = [stacked(column) for column in zip(*pairs)]
    made = objective.make({'apo_zero': {}}, ['reference'])
    counts = objective.counts_of(sides[0].weights, sides[1].weights)
    total, _ = objective.evaluate(made, made.hyperparameters, *sides, jnp.ones(2), counts)
    assert total == pytest.approx(np.mean([value(anchored.apo_zero, pair) for pair in pairs]), rel=1e-12)


def test_apo_down_starts_by_lowering_the_rejected_completion_only():
    chosen, rejected = slopes(anchored.apo_down, by_ratio(0.0, 0.0), beta=0.1)
    assert chosen == pytest.approx(0.0, abs=1e-17) and rejected == pytest.approx(0.025)
    assert slopes(anchored.apo_down, by_ratio(2.0, -20.0), beta=0.1)[0] > 0  # a wide margin: the chosen one is lowered


# -- several objectives -----------------------------------------------------------------------------------------------


def test_modpo_golden():
    pair = primary(columns=({'margin_reward': 1.2}, {'margin_reward': -0.4}))
    losses_, rewards = multi_objective.modpo(*pair, beta=0.1, preference_weight=0.3)
    assert float(rewards.chosen[0] - rewards.rejected[0]) == pytest.approx(-2.4, rel=1e-12)
    assert float(losses_[0]) == pytest.approx(2.4868361522, rel=1e-10)


def test_modpo_of_one_objective_is_dpo():
    pair = primary(columns=({'margin_reward': 1.2}, {'margin_reward': -0.4}))
    alone = value(multi_objective.modpo, pair, beta=0.1, preference_weight=1.0)
    assert alone == pytest.approx(value(pairwise.dpo, pair, beta=0.1), rel=1e-14)


def test_modpo_margin_of_a_model_is_its_implicit_reward_with_beta_once():
    """The model's log-ratios are 3 and -5 against PRIMARY."""
    from_model = primary(models=({'margin': -39.0}, {'margin': -55.0}))
    from_column = primary(columns=({'margin_reward': 0.2 * 3.0}, {'margin_reward': 0.2 * -5.0}))
    options = {'beta': 0.2, 'preference_weight': 0.6}
    expected = value(multi_objective.modpo, from_column, **options)
    assert value(multi_objective.modpo, from_model, margin='model', **options) == pytest.approx(expected, rel=1e-13)


def rounds(*earlier, reference=(-41.0, -51.0)):
    """POLICY after the round of `reference`, which came after those of `earlier`, by name."""
    return [
        completion(POLICY[side], reference[side], models={name: logps[side] for name, logps in earlier})
        for side in (0, 1)
    ]


@pytest.mark.parametrize('multiplier, golden', [(0.0, 0.5981388694), (0.5, 0.6443966601)])
def test_spo_golden(multiplier, golden):
    pair = rounds(('earlier', PRIMARY))
    assert value(multi_objective.spo, pair, beta=0.1, multiplier=multiplier) == pytest.approx(golden, rel=1e-9)


def test_spo_without_a_multiplier_is_dpo():
    pair = rounds(('earlier', PRIMARY))
    assert value(multi_objective.spo, pair, multiplier=0.0) == value(pairwise.dpo, pair, beta=0.1)


def test_spo_needs_only_the_first_of_many_rounds():
    """The oracle adds up the gain of every round, each between two models."""
    every = rounds(('earlier_0', PRIMARY), ('earlier_1', (-35.0, -58.0)), ('earlier_2', (-45.0, -49.0)))
    first = rounds(('earlier', PRIMARY))
    assert value(multi_objective.spo, first) == pytest.approx(oracle_values('spo', every)[0], rel=1e-12)


def test_spo_of_two_rounds_is_modpo_with_the_last_round_as_margin():
    pair = rounds(('earlier', PRIMARY))
    gains = [2 * 0.1 * (-41.0 + 42.0), 2 * 0.1 * (-51.0 + 50.0)]
    margins = [side.replace(columns={'margin_reward': jnp.array([gain])}) for side, gain in zip(pair, gains)]
    # (0.1 d - m / 2) / (1 / 2) with m = 2 * 0.1 * gain is 0.2 (d - gain): beta 0.2, multiplier 1.
    asked = value(multi_objective.modpo, margins, beta=0.1, preference_weight=0.5)
    assert value(multi_objective.spo, pair, beta=0.2, multiplier=1.0) == pytest.approx(asked, rel=1e-13)


def test_spo_protects_an_earlier_round_that_preferred_the_rejected_completion():
    agreed, conflicting = rounds(('earlier', (-43.0, -49.0))), rounds(('earlier', (-39.0, -53.0)))
    assert slopes(multi_objective.spo, agreed)[0] < slopes(multi_objective.spo, conflicting)[0] < 0


def test_sipo_golden():
    assert value(multi_objective.sipo, primary()) == pytest.approx(0.7130152524, rel=1e-10)


# -- hpo --------------------------------------------------------------------------------------------------------------


def hpo_sample(dtype=jnp.float64):
    return contract.example(losses.find('hpo'), {}, dtype=dtype)


def advantages(sample):
    """Of chosen and rejected, `[2, B]`."""
    kernel, bias = (np.asarray(sample.extra['params'][name]) for name in ('kernel', 'bias'))
    sides = (sample.chosen, sample.rejected)
    return np.array([side.columns['auxiliary_reward'] - (side.prompt_hidden @ kernel + bias) for side in sides])


def test_hpo_example_has_advantages_of_both_signs_below_and_above_the_cap():
    found = advantages(hpo_sample())
    assert (found < 0).any() and (found > 0.1 * np.log(20)).any() and ((found > 0) & (found < 0.1 * np.log(20))).any()


def test_hpo_value_head_learns_from_its_regression_only():
    sample = hpo_sample()
    total = jax.grad(lambda params: multi_objective.hpo(sample.chosen, sample.rejected, params=params)[0].sum())
    gradient, found = total(sample.extra['params']), advantages(sample)
    slope = -np.abs(0.7 - (found < 0)) * found  # half of the derivative by V, as the mean over two completions has it
    hidden = np.array([sample.chosen.prompt_hidden, sample.rejected.prompt_hidden])
    np.testing.assert_allclose(gradient['bias'], slope.sum(), rtol=1e-12)
    np.testing.assert_allclose(gradient['kernel'], np.einsum('sb,sbd->d', slope, hidden), rtol=1e-12)


def test_hpo_value_head_does_not_reach_the_policy():
    sample = hpo_sample()

    def of_hidden(hidden):
        chosen = sample.chosen.replace(prompt_hidden=hidden)
        return multi_objective.hpo(chosen, sample.rejected, params=sample.extra['params'])[0].sum()

    assert not np.any(jax.grad(of_hidden)(sample.chosen.prompt_hidden))
    assert of_hidden(sample.chosen.prompt_hidden) != of_hidden(sample.chosen.prompt_hidden + 1)


def test_hpo_policy_gradient_is_that_of_dpo_and_of_weighted_likelihood():
    sample = hpo_sample()

    def gradient(loss, **options):
        return jax.grad(lambda side: loss(side, sample.rejected, **options)[0].sum())(sample.chosen).policy_logps

    params = {'params': sample.extra['params']}
    found = gradient(multi_objective.hpo, **params) - gradient(pairwise.dpo, beta=0.1)
    strength = np.minimum(np.exp(advantages(sample)[0] / 0.1), 20.0)
    weights = np.asarray(sample.chosen.weights)
    by_token = -0.1 * (strength / weights.sum(axis=1))[:, None] * weights / 2
    np.testing.assert_allclose(found, by_token, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(
        gradient(multi_objective.hpo, **params, expectile=0.2), gradient(multi_objective.hpo, **params), rtol=1e-14
    )


def test_hpo_values_tend_to_the_expectile_of_rewards():
    """At the expectile e, level * sum(r - e)+ = (1 - level) * sum(e - r)+: the bias of a head has no gradient there."""
    rewards, level, low, high = np.random.default_rng(0).uniform(0, 1, (2, 50)), 0.7, 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        above = level * np.maximum(rewards - middle, 0).sum() > (1 - level) * np.maximum(middle - rewards, 0).sum()
        low, high = (middle, high) if above else (low, middle)
    hidden, logps = jnp.zeros((50, 3)), jnp.zeros((50, 4))
    sides = [
        Completion(
            logps, logps[None], jnp.ones((50, 4)), columns={'auxiliary_reward': jnp.array(r)}, prompt_hidden=hidden
        )
        for r in rewards
    ]

    def total(bias):
        return multi_objective.hpo(*sides, params={'kernel': jnp.zeros(3), 'bias': bias}, expectile=level)[0].sum()

    assert jax.grad(total)(low) == pytest.approx(0.0, abs=1e-12)
    assert low > rewards.mean() and jax.grad(total)(low - 0.01) < 0 < jax.grad(total)(low + 0.01)


def test_hpo_stays_finite_with_a_huge_advantage():
    sample = hpo_sample(jnp.float32)
    chosen = sample.chosen.replace(columns={'auxiliary_reward': jnp.full(contract.PAIRS, 1e4, jnp.float32)})

    def total(side):
        return multi_objective.hpo(side, sample.rejected, params=sample.extra['params'])[0].sum()

    total_value, gradient = jax.value_and_grad(total)(chosen)
    assert jnp.isfinite(total_value) and jnp.isfinite(gradient.policy_logps).all()


def test_hpo_value_head_starts_at_zero_and_is_not_stuck_there():
    params = losses.find('hpo').init_params(jax.random.key(0), layers=3, width=contract.WIDTH)
    assert {name: value.shape for name, value in params.items()} == {'kernel': (contract.WIDTH,), 'bias': ()}
    assert not any(np.any(leaf) for leaf in params.values())
    sample = hpo_sample()
    gradient = jax.grad(lambda params: multi_objective.hpo(sample.chosen, sample.rejected, params=params)[0].sum())
    assert all(np.all(leaf != 0) for leaf in gradient(params).values())


def test_half_an_expectile_is_half_of_squares():
    residual = jnp.array([-2.0, 0.0, 3.0])
    np.testing.assert_array_equal(links.expectile(residual, 0.5), residual**2 / 2)


# -- conditional ------------------------------------------------------------------------------------------------------


def corrupted(policy, reference, **fields):
    chosen, rejected = primary()
    return chosen.replace(companions={'corrupted': completion(policy, reference, **fields)}), rejected


def test_mdpo_golden():
    pair = corrupted(-47.0, -44.0)
    assert value(conditional.mdpo, pair, beta=0.1) == pytest.approx(1.5852311060, rel=1e-10)


def test_mdpo_terms_are_dpo_dpo_behind_the_corrupted_prompt_and_an_anchor():
    chosen, rejected = corrupted(-47.0, -44.0)
    between = value(pairwise.dpo, (chosen, rejected), beta=0.1)
    behind = value(pairwise.dpo, (chosen, chosen.companions['corrupted']), beta=0.1)
    for delta in (0.0, 0.7):
        anchor = np.logaddexp(0, -(0.1 * 2.0 - delta))
        total = value(conditional.mdpo, (chosen, rejected), beta=0.1, delta=delta)
        assert total == pytest.approx(between + behind + anchor, rel=1e-13)


def test_mdpo_starts_at_three_log_two():
    chosen, rejected = by_ratio(0.0, 0.0)
    chosen = chosen.replace(companions={'corrupted': completion(-31.0, -31.0)})
    assert value(conditional.mdpo, (chosen, rejected)) == pytest.approx(3 * np.log(2), rel=1e-14)


def test_mdpo_gradient_of_the_corrupted_side_equals_finite_differences():
    sample = contract.example(losses.find('mdpo'), {})

    def total(companion):
        chosen = sample.chosen.replace(companions={'corrupted': companion})
        return conditional.mdpo(chosen, sample.rejected)[0].sum()

    companion = sample.chosen.companions['corrupted']
    gradient = np.asarray(jax.grad(total)(companion).policy_logps)
    assert (gradient[companion.weights > 0] > 0).all() and not gradient[companion.weights == 0].any()
    for index in np.ndindex(gradient.shape):
        ends = []
        for shift in (1e-6, -1e-6):
            moved = companion.replace(policy_logps=companion.policy_logps.at[index].add(shift))
            pair = (sample.chosen.replace(companions={'corrupted': moved}), sample.rejected)
            ends.append(sum(oracle_values('mdpo', pair)))
        np.testing.assert_allclose(gradient[index], (ends[0] - ends[1]) / 2e-6, atol=1e-7, rtol=1e-6)


def test_padding_of_the_corrupted_side_has_no_say():
    sample = contract.example(losses.find('mdpo'), {})
    companion = sample.chosen.companions['corrupted']
    noisy = companion.replace(policy_logps=jnp.where(companion.weights > 0, companion.policy_logps, -300.0))
    pair = (sample.chosen.replace(companions={'corrupted': noisy}), sample.rejected)
    before = conditional.mdpo(sample.chosen, sample.rejected)[0]
    np.testing.assert_array_equal(conditional.mdpo(*pair)[0], before)
