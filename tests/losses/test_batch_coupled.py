"""What is particular to the losses that look at the whole step: empty slots, unpaired rows, order statistics."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.sides import completion, golden_pair, nothing, of_ratios

from jaxpo import losses
from jaxpo.losses import contract

COUPLED = sorted(name for name, entry in losses.LOSSES.items() if entry.couples_batch)
FIRST, SECOND = (0.4, -1.3, 2.2, 0.9), (0.1, 1.5, -0.6, 0.0)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def with_companion(side, ratios):
    return side.replace(companions={'mismatched': of_ratios(ratios)})


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


def test_golden_kto():
    chosen, rejected = golden_pair()
    chosen = with_companion(chosen, [0.2])
    desirable, _ = losses.find('kto')(chosen, nothing(rejected, [0]), beta=0.1)
    undesirable, _ = losses.find('kto')(nothing(chosen, [0]), rejected, beta=0.1)
    np.testing.assert_allclose(desirable, [0.480010659844], rtol=1e-11)
    np.testing.assert_allclose(undesirable, [0.482507142334], rtol=1e-11)


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
