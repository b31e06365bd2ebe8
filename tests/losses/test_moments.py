"""What is particular to the losses that remember earlier steps, and to the draw of beta_dpo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.sides import golden_pair, nothing, of_ratios, pairs_of_margins

from jaxpo import losses
from jaxpo.losses import contract

KEY = jax.random.key(0)
LN2 = 0.6931471805599453
DRAWS = 10_000
STATE = {'mean': jnp.array(0.0), 'std': jnp.array(1.0)}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize('delta, value', [(0.0, 1.312856308087), (0.02, 1.312706522866)])
def test_golden_bco(delta, value):
    state = {'count': jnp.ones(2), 'mean': jnp.full(2, delta / 0.1)}
    values, rewards = losses.find('bco')(*golden_pair(), state=state, beta=0.1)
    np.testing.assert_allclose(values, [value], rtol=1e-11)
    np.testing.assert_allclose([*rewards.chosen, *rewards.rejected], [0.1, -0.05], rtol=1e-12)


def test_golden_alpha_dpo_without_its_adaptive_margin_is_simpo():
    sample = contract.example(losses.find('alpha_dpo'), {})
    values, _ = contract.losses_of(losses.find('alpha_dpo'), sample, {'beta': 2.0, 'gamma': 0.5, 'alpha': 0.0})
    expected, _ = losses.find('simpo')(sample.chosen, sample.rejected, beta=2.0, gamma=0.5)
    np.testing.assert_allclose(values, expected, rtol=1e-13)


def steps(count=5, pairs=6):
    random = np.random.default_rng(3)
    for _ in range(count):
        yield random.normal(0.5, 2.0, pairs), random.normal(-0.5, 1.0, pairs), random.random((2, pairs)) < 0.7


def test_bcos_moments_are_those_of_all_completions_so_far():
    entry, state = losses.find('bco'), losses.find('bco').init_state()
    seen = ([], [])
    for good, bad, keep in steps():
        chosen, rejected = nothing(of_ratios(good), keep[0]), nothing(of_ratios(bad), keep[1])
        state = entry.updated(state, chosen, rejected, beta=0.1)
        seen[0].extend(good[keep[0]])
        seen[1].extend(bad[keep[1]])
        np.testing.assert_array_equal(state['count'], [len(half) for half in seen])
        np.testing.assert_allclose(state['mean'], [np.mean(half) for half in seen], rtol=1e-12)
    delta = 0.1 * (np.mean(seen[0]) + np.mean(seen[1])) / 2
    values, _ = entry(of_ratios([0.7]), of_ratios([0.2]), state=state, beta=0.1)
    expected = np.log1p(np.exp(-(0.07 - delta))) + np.log1p(np.exp(0.02 - delta))
    np.testing.assert_allclose(values, [expected], rtol=1e-12)


def test_bcos_threshold_is_the_only_halfs_mean_until_the_other_is_seen():
    entry = losses.find('bco')
    chosen, none = of_ratios([1.0, 3.0]), nothing(of_ratios([0.0, 0.0]), [0, 0])
    state = entry.updated(entry.init_state(), chosen, none)
    values, _ = entry(chosen, none, state=state, beta=1.0)
    np.testing.assert_allclose(values, np.log1p(np.exp([1.0, -1.0])), rtol=1e-12)


@pytest.mark.parametrize('name', ['beta_dpo', 'alpha_dpo'])
def test_moments_over_several_steps_equal_a_running_computation(name):
    entry = losses.find(name)
    state, mean, std = entry.init_state(), 0.0, 0.0
    for good, bad, keep in steps():
        chosen, rejected = (nothing(of_ratios(side), keep[0]) for side in (good, bad))
        state = entry.updated(state, chosen, rejected, momentum=0.8)
        margins = (good - bad)[keep[0]]
        mean = 0.8 * mean + 0.2 * margins.mean()
        std = 0.8 * std + 0.2 * np.sqrt(((margins - margins.mean()) ** 2).sum() / (len(margins) - 1))
        np.testing.assert_allclose([state['mean'], state['std']], [mean, std], rtol=1e-12)


def test_one_pair_alone_moves_the_mean_and_not_the_deviation():
    entry = losses.find('beta_dpo')
    before = {'mean': jnp.array(1.0), 'std': jnp.array(2.0)}
    after = entry.updated(before, *pairs_of_margins([3.0]), momentum=0.9)
    np.testing.assert_allclose([after['mean'], after['std']], [0.9 + 0.3, 2.0], rtol=1e-14)


def test_alpha_dpos_margin_grows_with_the_pairs_departure_from_the_reference():
    """A pair ahead of the running mean by one deviation has alpha more to reach."""
    entry = losses.find('alpha_dpo')
    state = {'mean': jnp.array(0.5), 'std': jnp.array(0.25)}
    chosen, rejected = pairs_of_margins([0.75])
    values, _ = entry(chosen, rejected, state=state, beta=2.0, gamma=0.4, alpha=0.3)
    np.testing.assert_allclose(values, np.log1p(np.exp(-(2.0 * (0.75 - 0.3) - 0.4))), rtol=1e-12)


@pytest.mark.parametrize('name', ['beta_dpo', 'alpha_dpo'])
def test_the_first_step_at_the_reference_is_finite(name):
    entry = losses.find(name)
    chosen = rejected = of_ratios(np.zeros(6))

    def scalar(chosen):
        state = entry.updated(entry.init_state(), jax.lax.stop_gradient(chosen), rejected)
        given = {'gamma': 0.0} if name == 'alpha_dpo' else {}
        return entry(chosen, rejected, state=state, key=KEY, **given)[0].mean()

    value, slopes = jax.value_and_grad(scalar)(chosen)
    np.testing.assert_allclose(value, LN2, rtol=1e-12)
    assert np.isfinite(slopes.policy_logps).all() and (slopes.policy_logps < 0).any()


def kept_of(margins, state, key, **given):
    values, _ = losses.find('beta_dpo')(*pairs_of_margins(margins), state=state, key=key, **given)
    return values > 0


def kept_often(margins, state, rho):
    keys = jax.random.split(jax.random.key(7), DRAWS)
    return jax.jit(jax.vmap(lambda key: kept_of(margins, state, key, rho=rho)))(keys)


@pytest.mark.parametrize('rho', [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
@pytest.mark.parametrize('pairs', [1, 5, 10])
def test_beta_dpo_keeps_the_whole_part_of_its_share(rho, dtype, pairs):
    kept = jax.jit(kept_of)(np.linspace(-1, 1, pairs).astype(dtype), STATE, KEY, rho=jnp.asarray(rho, dtype))
    percent = round((1 - rho) * 100) * pairs
    assert kept.sum() == max(1, percent // 100)


def test_beta_dpo_counts_the_pairs_there_are():
    chosen, rejected = pairs_of_margins(np.linspace(-1, 1, 10))
    there = [1, 0, 1, 1, 0, 1, 0, 0, 0, 1]
    sides = nothing(chosen, there), nothing(rejected, there)
    values, _ = losses.find('beta_dpo')(*sides, state=STATE, key=KEY, rho=0.4)
    assert (values > 0).sum() == 3 and not np.any(values[np.array(there) == 0])


def test_beta_dpo_draws_the_same_pairs_wherever_empty_slots_lie():
    places = jnp.array([1, 2, 4, 5, 6, 9, 11, 12, 13, 14])
    dense = pairs_of_margins(np.linspace(-1, 1, 10))
    sparse = [
        jax.tree.map(lambda x: jnp.zeros((*x.shape[:-2], 15, 1)).at[..., places, :].set(x), side) for side in dense
    ]
    for seed in range(5):
        key = jax.random.key(seed)
        together, apart = (losses.find('beta_dpo')(*s, state=STATE, key=key, rho=0.5)[0] for s in (dense, sparse))
        np.testing.assert_array_equal(apart[places], together)


def test_beta_dpo_prefers_pairs_near_the_running_mean():
    """One of two pairs is kept: with the chance its likelihood has, over seeded draws, within 4 standard errors."""
    kept = kept_often([1.5, 4.0], {'mean': jnp.array(1.0), 'std': jnp.array(2.0)}, rho=0.5)
    assert (kept.sum(axis=1) == 1).all()
    near, far = np.exp(-((0.25) ** 2) / 2), np.exp(-((1.5) ** 2) / 2)
    expected = near / (near + far)
    np.testing.assert_allclose(kept[:, 0].mean(), expected, atol=4 * np.sqrt(expected * (1 - expected) / DRAWS))


def test_beta_dpo_draws_without_replacement():
    """Two of three pairs are kept: first one, then another of what is left, each by its likelihood."""
    kept = kept_often([0.3, 1.2, -2.0], STATE, rho=0.3)
    assert (kept.sum(axis=1) == 2).all()
    weights = np.exp(-(np.array([0.3, 1.2, -2.0]) ** 2) / 2)
    share = weights / weights.sum()
    # The third is left out if the first two come first, in either order.
    left_out = share[0] * share[1] / (1 - share[0]) + share[1] * share[0] / (1 - share[1])
    error = 4 * np.sqrt(left_out * (1 - left_out) / DRAWS)
    np.testing.assert_allclose((~kept[:, 2]).mean(), left_out, atol=error)


def test_beta_dpos_beta_follows_the_mean_of_those_kept_and_its_mean_loss_is_theirs():
    margins = np.linspace(-2.0, 3.0, 10)
    state = {'mean': jnp.array(0.4), 'std': jnp.array(1.5)}
    values, _ = losses.find('beta_dpo')(*pairs_of_margins(margins), state=state, key=KEY, beta=0.1, alpha=0.6, rho=0.3)
    kept = np.asarray(values > 0)
    beta = 0.1 * (1 + 0.6 * (margins[kept].mean() - 0.4))
    np.testing.assert_allclose(values.mean(), np.log1p(np.exp(-beta * margins[kept])).mean(), rtol=1e-12)


def test_beta_dpos_beta_is_at_least_a_thousandth_and_has_no_gradient():
    state = {'mean': jnp.array(50.0), 'std': jnp.array(10.0)}

    def scalar(chosen):
        return losses.find('beta_dpo')(chosen, of_ratios([0.0]), state=state, key=KEY)[0].sum()

    value, slopes = jax.value_and_grad(scalar)(of_ratios([2.0]))
    np.testing.assert_allclose(value, np.log1p(np.exp(-2e-3)), rtol=1e-12)
    np.testing.assert_allclose(slopes.policy_logps, [[-1e-3 / (1 + np.exp(2e-3))]], rtol=1e-12)


def test_beta_dpos_draw_changes_with_the_key_and_is_the_same_for_the_same():
    margins = np.linspace(-1, 1, 10)
    first, again, other = (kept_of(margins, STATE, jax.random.key(seed), rho=0.5) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
