"""What is particular to the losses that look at the whole step, and to those that weigh each pair."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import losses
from jaxpo.losses import contract
from jaxpo.types import Completion

COUPLED = sorted(name for name, entry in losses.LOSSES.items() if entry.couples_batch)
KEY = jax.random.key(0)
LN2 = 0.6931471805599453
DRAWS = 10_000
STATE = {'mean': jnp.array(0.0), 'std': jnp.array(1.0)}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def completion(policy, reference, **more):
    """Completions of one token from their log-probabilities."""
    policy, reference = (jnp.asarray(x, jnp.float64)[:, None] for x in (policy, reference))
    return Completion(policy, reference[None], jnp.ones_like(policy), **more)


def of_ratios(ratios):
    return completion(jnp.asarray(ratios) - 20.0, jnp.full(len(ratios), -20.0))


def pairs_of_margins(margins):
    margins = jnp.asarray(margins, jnp.float64)
    return of_ratios(margins), of_ratios(jnp.zeros_like(margins))


def nothing(side, keep):
    """The side with every completion empty but those to `keep`; companions stay."""
    keep = jnp.asarray(keep, bool)

    def kept(x):
        return jnp.where(keep.reshape((1,) * (x.ndim - 2) + (-1, 1)), x, 0)

    return jax.tree.map(kept, side.replace(companions={})).replace(companions=side.companions)


def with_companion(side, ratios):
    return side.replace(companions={'mismatched': of_ratios(ratios)})


# Empty slots


def spread_out(x, places, size):
    """Pairs put at `places` of `size` slots, the others empty."""
    axis = list(x.shape).index(contract.PAIRS)
    shape = [*x.shape]
    shape[axis] = size
    where = (slice(None),) * axis + (jnp.asarray(places),)
    return jnp.zeros(shape, x.dtype).at[where].set(x)


@pytest.mark.parametrize('name', COUPLED)
@pytest.mark.parametrize('places', [(3, 4, 5, 6), (0, 2, 4, 5)])
def test_empty_slots_never_matter_wherever_they_lie(name, places):
    entry = losses.find(name)
    sample = contract.example(entry, {}, seed=1)

    def value(chosen, rejected, at=slice(None)):
        replaced = dataclasses.replace(sample, chosen=chosen, rejected=rejected)
        return contract.losses_of(entry, replaced, {})[0][at].sum()

    sides = [sample.chosen, sample.rejected]
    longer = [jax.tree.map(lambda x: spread_out(x, places, 7), side) for side in sides]
    dense, slopes = jax.value_and_grad(value, argnums=(0, 1))(*sides)
    sparse, sparse_slopes = jax.value_and_grad(value, argnums=(0, 1))(*longer, at=jnp.asarray(places))
    np.testing.assert_allclose(sparse, dense, rtol=1e-13)
    for got, want in zip(sparse_slopes, slopes):
        np.testing.assert_allclose(got.policy_logps, spread_out(want.policy_logps, places, 7), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize('name', COUPLED)
def test_a_step_of_empty_slots_leaves_the_state(name):
    entry = losses.find(name)
    sample = contract.example(entry, {})
    none = [jax.tree.map(jnp.zeros_like, side) for side in (sample.chosen, sample.rejected)]
    if entry.init_state:
        after = entry.updated(sample.extra['state'], *none, **entry.defaults)
        jax.tree.map(np.testing.assert_array_equal, after, sample.extra['state'])
    values = contract.losses_of(entry, dataclasses.replace(sample, chosen=none[0], rejected=none[1]), {})[0]
    assert jnp.isfinite(values).all()


# Unpaired rows


@pytest.mark.parametrize('name', ['kto', 'bco'])
def test_an_unpaired_row_has_the_loss_of_its_half_alone(name):
    entry = losses.find(name)
    sample = contract.example(entry, {})
    extra = {'state': sample.extra.get('state')}
    none = [0] * contract.PAIRS
    chosen, rejected = sample.chosen, sample.rejected
    both, _ = entry(chosen, rejected, **extra)
    desirable, _ = entry(chosen, nothing(rejected, none), **extra)
    undesirable, _ = entry(nothing(chosen, none), rejected, **extra)
    np.testing.assert_allclose(both, desirable + undesirable, rtol=1e-14)
    assert (desirable > 0).all() and (undesirable > 0).all()
    mixed, _ = entry(nothing(chosen, [1, 0, 1, 0]), nothing(rejected, [0, 1, 0, 1]), **extra)
    np.testing.assert_array_equal(mixed, jnp.where(jnp.array([1, 0, 1, 0]) > 0, desirable, undesirable))
    assert entry.takes_unpaired


def test_kto_weighs_its_halves():
    chosen, rejected = with_companion(of_ratios([1.0]), [0.2]), of_ratios([-0.5])
    plain, _ = losses.find('kto')(chosen, rejected)
    for given, part in (('desirable_weight', 0.480010659844), ('undesirable_weight', 0.482507142334)):
        heavier, _ = losses.find('kto')(chosen, rejected, **{given: 3.0})
        np.testing.assert_allclose(heavier - plain, [2 * part], rtol=1e-11)


def test_kto_takes_its_baseline_over_the_mismatched_completions_that_there_are():
    chosen, rejected = of_ratios([1.0, 0.3, 2.0]), of_ratios([-0.5, 0.1, 0.7])
    mismatched = of_ratios([0.9, 50.0, 0.3])
    two = nothing(mismatched, [1, 0, 1])
    values, _ = losses.find('kto')(chosen.replace(companions={'mismatched': two}), rejected)
    expected, _ = losses.find('kto')(with_companion(chosen, [0.6] * 3), rejected)
    np.testing.assert_allclose(values, expected, rtol=1e-14)


def test_kto_stops_its_baseline_at_zero_and_takes_zero_where_there_is_none():
    chosen, rejected = of_ratios([1.0]), of_ratios([-0.5])
    at_zero, _ = losses.find('kto')(with_companion(chosen, [0.0]), rejected)
    below, _ = losses.find('kto')(with_companion(chosen, [-7.0]), rejected)
    missing = nothing(of_ratios([3.0]), [0])
    without, _ = losses.find('kto')(chosen.replace(companions={'mismatched': missing}), rejected)
    np.testing.assert_array_equal(below, at_zero)
    np.testing.assert_array_equal(without, at_zero)


def test_ktos_baseline_has_no_gradient():
    def scalar(chosen):
        return losses.find('kto')(chosen, of_ratios([-0.5]))[0].sum()

    slopes = jax.grad(scalar)(with_companion(of_ratios([1.0]), [0.2]))
    assert not np.any(slopes.companions['mismatched'].policy_logps) and np.all(slopes.policy_logps < 0)


# Golden values


def golden_pair():
    return completion([-12.0], [-13.0]), completion([-15.0], [-14.5])


def test_golden_kto():
    chosen, rejected = golden_pair()
    chosen = with_companion(chosen, [0.2])
    desirable, _ = losses.find('kto')(chosen, nothing(rejected, [0]), beta=0.1)
    undesirable, _ = losses.find('kto')(nothing(chosen, [0]), rejected, beta=0.1)
    np.testing.assert_allclose(desirable, [0.480010659844], rtol=1e-11)
    np.testing.assert_allclose(undesirable, [0.482507142334], rtol=1e-11)


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


def golden_tokens(policy, reference, ids):
    """A completion of the notes' token-level inputs: logits over three words."""
    policy, reference = (jax.nn.log_softmax(jnp.asarray(x, jnp.float64), axis=-1) for x in (policy, reference))
    places = jnp.arange(len(ids))
    return Completion(
        policy[places, jnp.asarray(ids)][None],
        reference[places, jnp.asarray(ids)][None, None],
        jnp.ones((1, len(ids))),
        log_sum_squares=jnp.log(jnp.square(jnp.exp(policy)).sum(axis=-1))[None],
    )


def golden_token_pair():
    chosen = golden_tokens([[1, 0, -1], [0.5, 0.2, 0]], [[0.8, 0.1, -0.5], [0, 0, 0]], [0, 1])
    rejected = golden_tokens(
        [[0, 1, 0], [0.3, -0.3, 0], [1, 1, -1]], [[0.2, 0.5, 0], [0, 0, 0.1], [0.5, 1, 0]], [1, 2, 0]
    )
    return chosen, rejected


def ratio_to_dpo(chosen, rejected):
    """What wpo multiplies each pair's DPO loss by."""
    values, _ = losses.find('wpo')(chosen, rejected, beta=0.5)
    return values / losses.find('dpo')(chosen, rejected, beta=0.5)[0]


def test_golden_wpo_weights():
    """The mean aligned log-probability of each completion, beside one of weight 1e-9, and their clamped product."""
    chosen, rejected = golden_token_pair()
    tiny = completion([-10.0], [-10.0], log_sum_squares=jnp.full((1, 1), -10.0 + np.log(1e9)))
    for side, mean in ((chosen, 0.083680294625), (rejected, 0.093820557229)):
        np.testing.assert_allclose(ratio_to_dpo(side, tiny) * 1e9, [np.exp(mean)], rtol=1e-11)
    # Both together, each 1e-3 as likely, then unclamped: 1.194229075210e-3, and 1 where the product is above 1.
    less = completion([-10.0], [-10.0], log_sum_squares=jnp.full((1, 1), -10.0 + np.log(1e3)))
    product = ratio_to_dpo(chosen, less) * ratio_to_dpo(rejected, less) * 1e6
    np.testing.assert_allclose(product, [1.194229075210], rtol=1e-11)
    np.testing.assert_array_equal(ratio_to_dpo(chosen, rejected), [1.0])


def test_wpos_weight_has_no_gradient():
    chosen, rejected = golden_token_pair()
    chosen = chosen.replace(log_sum_squares=chosen.log_sum_squares + 2.0)
    slopes = jax.grad(lambda side: losses.find('wpo')(side, rejected)[0].sum())(chosen)
    plain = jax.grad(lambda side: losses.find('dpo')(side, rejected, beta=0.01)[0].sum())(chosen)
    assert not np.any(slopes.log_sum_squares)
    np.testing.assert_allclose(slopes.policy_logps / plain.policy_logps, ratio_to_dpo(chosen, rejected)[0])


def golden_rainbow():
    """Log-probabilities -40 and -52 over 20 and 26 tokens, -42 and -50 of the reference, entropy 0.05 log |V|."""

    def spread(policy, reference, tokens):
        share = jnp.full((1, tokens), 1.0 / tokens)
        entropy = jnp.full((1, tokens), 0.05 * np.log(1000))
        return Completion(
            policy * share,
            (reference * share)[None],
            jnp.ones((1, tokens)),
            reference_entropy=entropy,
            vocabulary=1000,
        )

    return spread(-40.0, -42.0, 20), spread(-52.0, -50.0, 26)


def test_golden_rainbow_po():
    values, rewards = losses.find('rainbow_po')(*golden_rainbow())
    np.testing.assert_allclose(values, [0.8357083905], rtol=1e-9)
    # Of the margin -0.0307692308, home advantage has 0.075.
    np.testing.assert_allclose(rewards.chosen - rewards.rejected - 0.75, [-0.307692308], rtol=1e-8)


def test_rainbow_po_is_simpo_without_a_reference_and_length_normalised_dpo_with_all_of_it():
    chosen, rejected = golden_rainbow()
    phi = -0.29 * np.log(0.05)
    given = {'beta': 10.0 / phi, 'home_advantage': 0.3}
    values, _ = losses.find('rainbow_po')(chosen, rejected, mixing_alpha=0.0, **given)
    expected, _ = losses.find('simpo')(chosen, rejected, beta=10.0, gamma=3.0)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    values, _ = losses.find('rainbow_po')(chosen, rejected, mixing_alpha=1.0, **given)
    margin = (-40 + 42) / 20 - (-52 + 50) / 26
    np.testing.assert_allclose(values, [np.log1p(np.exp(-10 * margin))], rtol=1e-12)


def test_rainbow_po_is_finite_where_the_reference_is_certain():
    sides = [side.replace(reference_entropy=jnp.zeros_like(side.reference_entropy)) for side in golden_rainbow()]
    values, slopes = jax.value_and_grad(lambda side: losses.find('rainbow_po')(side, sides[1])[0].sum())(sides[0])
    assert jnp.isfinite(values) and jnp.isfinite(slopes.policy_logps).all() and np.any(slopes.policy_logps)


# Order statistics

FIRST, SECOND = (0.4, -1.3, 2.2, 0.9), (0.1, 1.5, -0.6, 0.0)


def test_aot_unpaired_equals_the_sort_by_hand():
    values, _ = losses.find('aot_unpaired')(of_ratios(FIRST), of_ratios(SECOND), beta=0.5)
    # -1.3 meets -0.6, 0.4 meets 0.0, 0.9 meets 0.1, 2.2 meets 1.5.
    deltas = np.array([0.4 - 0.0, -1.3 + 0.6, 2.2 - 1.5, 0.9 - 0.1])
    np.testing.assert_allclose(values, np.log1p(np.exp(-0.5 * deltas)), rtol=1e-12)


def test_aot_equals_the_sort_by_hand():
    chosen = completion(np.array(FIRST) - 10.0, np.array(SECOND) - 12.0)
    rejected = completion([-10.0] * 4, [-12.0] * 4)
    values, _ = losses.find('aot')(chosen, rejected, beta=0.5)
    deltas = np.array([0.4 - 0.0, -1.3 + 0.6, 2.2 - 1.5, 0.9 - 0.1])
    np.testing.assert_allclose(values, np.log1p(np.exp(-0.5 * deltas)), rtol=1e-12)


@pytest.mark.parametrize('name', ['aot', 'aot_unpaired'])
def test_the_order_of_pairs_does_not_matter(name):
    sample = contract.example(losses.find(name), {}, seed=2)
    order = jnp.array([2, 0, 3, 1])

    def reordered(side):
        return jax.tree.map(lambda x: jnp.take(x, order, axis=list(x.shape).index(contract.PAIRS)), side)

    values, _ = losses.find(name)(sample.chosen, sample.rejected)
    permuted, _ = losses.find(name)(reordered(sample.chosen), reordered(sample.rejected))
    np.testing.assert_array_equal(permuted, values[order])


def test_aot_unpaired_forgets_who_was_paired_with_whom():
    total = losses.find('aot_unpaired')(of_ratios(FIRST), of_ratios(SECOND), beta=0.5)[0].sum()
    other = losses.find('aot_unpaired')(of_ratios(FIRST), of_ratios(SECOND[::-1]), beta=0.5)[0].sum()
    np.testing.assert_allclose(other, total, rtol=1e-14)


# Running moments


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


# The draw of beta_dpo


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
