"""Mixes of log-probabilities, the clip before them, and the way back to tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references.many import sides, sums, token_counts

from jaxpo.losses import scores
from jaxpo.references import mixing
from jaxpo.types import Completion

PRIMARY, EXTERNAL = (-42.0, -50.0), (-35.0, -58.0)  # chosen, rejected
ARWC = np.array([[8 / 31], [23 / 31]])
GOLDEN_CLIPPED = (-40.2518918919, -52.9189189189)

logps_of = st.lists(st.floats(-200, -0.01), min_size=1, max_size=5)
seeds = st.integers(0, 2**32 - 1)
examples = settings(deadline=None, max_examples=40)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def column(*values):
    return jnp.asarray(values, jnp.float64)[:, None]


def weights_of(seed, count):
    return np.random.default_rng(seed).dirichlet(np.ones(count))[:, None]


def golden(side):
    return column(PRIMARY[side], EXTERNAL[side])


def golden_clipped(eps=0.1, adaptive=True):
    return mixing.clipped(golden(0), golden(1), 0, eps, adaptive)


@pytest.mark.parametrize('side, value', [(0, -40.6480725673), (1, -57.7016236873)])
def test_golden_harmonic(side, value):
    np.testing.assert_allclose(mixing.harmonic(golden(side), ARWC), [value], atol=1e-9)


@pytest.mark.parametrize('side, value', [(0, -41.0512834933), (1, -52.6390316014)])
def test_golden_harmonic_of_clipped(side, value):
    np.testing.assert_allclose(mixing.harmonic(golden_clipped()[side], ARWC), [value], atol=1e-9)


def test_golden_clip():
    for side, eps in enumerate((0.0416216216, 0.0583783784)):
        held = golden_clipped()[side]
        np.testing.assert_allclose(held, column(PRIMARY[side], GOLDEN_CLIPPED[side]), atol=1e-9)
        np.testing.assert_allclose(abs(held[1] / held[0] - 1), [eps], atol=1e-9)


def test_the_official_codes_product_form_has_the_weights_exchanged():
    (primary, external), (_, alpha) = golden(0)[:, 0], ARWC[:, 0]
    product = primary + external - jnp.log(alpha * jnp.exp(external) + (1 - alpha) * jnp.exp(primary))
    exchanged = mixing.ORDERS['official_code'](ARWC)
    np.testing.assert_allclose(mixing.harmonic(golden(0), exchanged), [product], rtol=1e-13)
    assert abs(mixing.harmonic(golden(0), ARWC)[0] - product) > 1


@pytest.mark.parametrize('mix', mixing.MIXES)
@examples
@given(logp=st.floats(-1e4, -1e-3))
def test_one_reference_is_itself(mix, logp):
    np.testing.assert_array_equal(mixing.MIXES[mix](column(logp), column(1.0)), [logp])


@pytest.mark.parametrize('mix', mixing.MIXES)
@examples
@given(logp=st.floats(-1e4, -1e-3), seed=seeds, count=st.integers(2, 6))
def test_identical_references_are_one(mix, logp, seed, count):
    mixed = mixing.MIXES[mix](column(*[logp] * count), weights_of(seed, count))
    np.testing.assert_allclose(mixed, [logp], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('mix', mixing.MIXES)
@examples
@given(logps=logps_of, seed=seeds)
def test_a_mix_is_that_of_probabilities_and_knows_no_order(mix, logps, seed):
    weights = weights_of(seed, len(logps))
    logps = column(*logps)
    probabilities = np.exp(np.asarray(logps, np.longdouble))
    means = {
        'harmonic': -np.log((weights / probabilities).sum(axis=0)),
        'geometric': (weights * np.log(probabilities)).sum(axis=0),
        'arithmetic': np.log((weights * probabilities).sum(axis=0)),
    }
    mixed = mixing.MIXES[mix](logps, weights)
    np.testing.assert_allclose(mixed, means[mix].astype(float), rtol=1e-11, atol=1e-11)
    order = np.random.default_rng(seed).permutation(len(logps))
    np.testing.assert_allclose(mixing.MIXES[mix](logps[order], weights[order]), mixed, rtol=1e-12, atol=1e-12)


@examples
@given(logps=logps_of, seed=seeds)
def test_harmonic_is_least_and_arithmetic_most(logps, seed):
    weights, logps = weights_of(seed, len(logps)), column(*logps)
    low, middle, high = (mixing.MIXES[mix](logps, weights)[0] for mix in ('harmonic', 'geometric', 'arithmetic'))
    assert low <= middle + 1e-9 and middle <= high + 1e-9


@pytest.mark.parametrize('mix', mixing.MIXES)
@pytest.mark.parametrize('silent', [-1e4, 0.0, -np.inf])
def test_a_reference_without_weight_has_no_say(mix, silent):
    mixed = mixing.MIXES[mix](column(-42.0, silent, -35.0), column(0.25, 0.0, 0.75))
    np.testing.assert_array_equal(mixed, mixing.MIXES[mix](column(-42.0, -35.0), column(0.25, 0.75)))


@pytest.mark.parametrize('mix', mixing.MIXES)
def test_gradients_are_finite_where_a_weight_is_0(mix):
    slopes = jax.grad(lambda *x: mixing.MIXES[mix](*x).sum(), argnums=(0, 1))(column(-42.0, -1e4), column(1.0, 0.0))
    assert np.isfinite(slopes).all()
    np.testing.assert_array_equal(slopes[0], column(1.0, 0.0))


def random_logps(seed, count=3, pairs=4):
    return -np.random.default_rng(seed).exponential(60.0, (2, count, pairs))


def clip_loop(chosen, rejected, primary, eps, adaptive):
    clipped = [np.array(chosen), np.array(rejected)]
    for pair in range(chosen.shape[1]):
        size = [abs(np.mean(logps[:, pair])) for logps in (chosen, rejected)]
        share = [size[0] / sum(size), 1 - size[0] / sum(size)] if adaptive else [1, 1]
        for side, own in zip(clipped, share):
            middle = side[primary, pair]
            for k in range(len(chosen)):
                side[k, pair] = min(max(side[k, pair], (1 + eps * own) * middle), (1 - eps * own) * middle)
    return clipped


@pytest.mark.parametrize('adaptive', [True, False])
@examples
@given(seed=seeds, primary=st.integers(0, 2), eps=st.floats(0, 1))
def test_a_clip_equals_a_loop(adaptive, seed, primary, eps):
    chosen, rejected = random_logps(seed)
    clipped = mixing.clipped(chosen, rejected, primary, eps, adaptive)
    np.testing.assert_allclose(clipped, clip_loop(chosen, rejected, primary, eps, adaptive), rtol=1e-12)
    for held, logps in zip(clipped, (chosen, rejected)):
        np.testing.assert_array_equal(held[primary], logps[primary])


@examples
@given(seed=seeds)
def test_a_clip_moves_with_its_primary(seed):
    chosen, rejected = random_logps(seed)
    order = np.random.default_rng(seed).permutation(3)
    clipped = mixing.clipped(chosen, rejected, 1, 0.1, True)
    moved = mixing.clipped(chosen[order], rejected[order], list(order).index(1), 0.1, True)
    np.testing.assert_allclose(moved, [side[order] for side in clipped], rtol=1e-12)


@pytest.mark.parametrize('adaptive', [True, False])
def test_without_a_region_every_reference_is_the_primary(adaptive):
    chosen, rejected = random_logps(0)
    for held, logps in zip(mixing.clipped(chosen, rejected, 2, 0.0, adaptive), (chosen, rejected)):
        np.testing.assert_array_equal(held, np.broadcast_to(logps[2], logps.shape))


def test_the_less_likely_completion_has_the_larger_region():
    chosen, rejected = (np.array([[logp], [3 * logp]]) for logp in (-10.0, -90.0))
    held = mixing.clipped(chosen, rejected, 0, 0.5, True)
    np.testing.assert_allclose([side[1, 0] / side[0, 0] for side in held], [1.05, 1.45], rtol=1e-12)


def test_an_empty_slot_is_clipped_to_itself():
    nothing = jnp.zeros((2, 1))
    np.testing.assert_array_equal(mixing.clipped(nothing, nothing, 0, 0.1, True), jnp.zeros((2, 2, 1)))
    slopes = jax.grad(lambda x: sum(side.sum() for side in mixing.clipped(x, x, 0, 0.1, True)))(nothing)
    assert np.isfinite(slopes).all()


def test_an_unpaired_completion_has_the_whole_region():
    held, _ = mixing.clipped(golden(0), jnp.zeros((2, 1)), 0, 0.1, True)
    np.testing.assert_allclose(held, column(-42.0, -37.8), rtol=1e-12)


def mixed_by(mix, side, weights):
    return mixing.mixed(side, mixing.MIXES[mix](mixing.differences(side, weights), weights), weights)


def mixed_side(mix='harmonic', seed=0, **more):
    side = sides(seed=seed)[0].replace(**more)
    weights = np.random.default_rng(seed).dirichlet(np.ones(3), 4).T
    return side, weights, mixing.MIXES[mix](sums(side), weights), mixed_by(mix, side, weights)


@examples
@given(seed=seeds)
def test_differences_are_from_the_heaviest_reference(seed):
    side, weights, _, _ = mixed_side(seed=seed)
    apart, logps = mixing.differences(side, weights), sums(side)
    for pair in range(4):
        heaviest = max(range(3), key=lambda k: weights[k, pair])
        np.testing.assert_allclose(apart[:, pair], logps[:, pair] - logps[heaviest, pair], rtol=1e-12, atol=1e-12)
        assert apart[heaviest, pair] == 0


@pytest.mark.parametrize('mix', mixing.MIXES)
@examples
@given(logps=logps_of, seed=seeds, shift=st.floats(-1e3, 1e3))
def test_a_mix_rises_with_all_references(mix, logps, seed, shift):
    weights, logps = weights_of(seed, len(logps)), column(*logps)
    moved = mixing.MIXES[mix](logps + shift, weights)
    np.testing.assert_allclose(moved, mixing.MIXES[mix](logps, weights) + shift, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize('mix', mixing.MIXES)
@examples
@given(seed=seeds)
def test_sums_are_exact_after_spreading_and_the_correction_is_even(mix, seed):
    side, weights, sequence, mixed = mixed_side(mix, seed)
    assert mixed.reference_logps.shape == (1, *side.weights.shape)
    np.testing.assert_allclose(sums(mixed)[0], sequence, rtol=1e-12)
    by_token = np.einsum('kb,kbc->bc', weights, np.asarray(side.reference_logps))
    moved = np.asarray(mixed.reference_logps[0]) - by_token
    even = (np.asarray(sequence) - by_token.sum(axis=-1)) / token_counts(side)
    np.testing.assert_allclose(moved, np.where(side.weights > 0, even[:, None], 0), atol=1e-12)


def test_padding_has_no_say_and_stays_0():
    side, weights, _, mixed = mixed_side()
    noise = jnp.asarray(np.random.default_rng(2).normal(-300, 9, side.reference_logps.shape))
    noisy = side.replace(reference_logps=jnp.where(side.weights[None] > 0, side.reference_logps, noise))
    np.testing.assert_array_equal(scores.reference_logps(noisy), scores.reference_logps(side))
    np.testing.assert_array_equal(mixed_by('harmonic', noisy, weights).reference_logps, mixed.reference_logps)
    assert (mixed.reference_logps[0] == 0)[side.weights == 0].all()


@pytest.mark.parametrize('silent', [0, 1, 2])
@pytest.mark.parametrize('mix', mixing.MIXES)
def test_a_reference_without_weight_is_not_in_any_token(mix, silent):
    side = sides()[0]
    weights = np.full((3, 4), 0.5)
    weights[silent] = 0
    loud = side.replace(reference_logps=side.reference_logps.at[silent].set(-jnp.inf))
    mixed = [mixed_by(mix, each, weights).reference_logps for each in (side, loud)]
    np.testing.assert_array_equal(*mixed)


def test_of_one_reference_the_completion_is_untouched():
    side = sides(references=1)[0]
    assert mixing.mixed(side, jnp.zeros(4), np.ones((1, 4))) is side


def long_side(dtype, references=1, tokens=4000):
    """Two completions, the second of which has one token."""
    logps = -np.random.default_rng(4).exponential(2.0, (references, 2, tokens))
    there = np.arange(tokens)[None] < np.array([tokens, 1])[:, None]
    logps, there = jnp.asarray(np.where(there[None], logps, 0), dtype), jnp.asarray(there, dtype)
    return Completion(logps[0], logps, there)


@pytest.mark.parametrize('count', [2, 3, 5])
@pytest.mark.parametrize('mix', mixing.MIXES)
@pytest.mark.parametrize('dtype', [jnp.float64, jnp.float32])
def test_identical_references_give_that_reference_back_bit_for_bit(mix, dtype, count):
    side = long_side(dtype)
    many = side.replace(reference_logps=jnp.repeat(side.reference_logps, count, axis=0))

    @jax.jit
    def log_ratio(many, weights):
        mixed = mixed_by(mix, many, weights)
        return scores.log_ratio(mixed), mixed.reference_logps

    for seed in range(4):
        weights = jnp.asarray(np.random.default_rng(seed).dirichlet(np.ones(count), 2).T, dtype)
        ratio, by_token = log_ratio(many, weights)
        assert by_token.dtype == dtype
        np.testing.assert_array_equal(by_token, side.reference_logps)
        np.testing.assert_array_equal(ratio, jnp.zeros(2))


@pytest.mark.parametrize('mix', mixing.MIXES)
def test_all_weight_on_one_reference_is_that_reference_bit_for_bit(mix):
    side = long_side(jnp.float32, references=3)
    for k in range(3):
        mixed = jax.jit(lambda side, weights: mixed_by(mix, side, weights))(side, jnp.eye(3)[:, [k, k]])
        np.testing.assert_array_equal(mixed.reference_logps[0], side.reference_logps[k])


@pytest.mark.parametrize('mix', mixing.MIXES)
def test_references_that_nearly_agree_are_mixed_to_the_precision_of_their_difference(mix):
    """0.01 nats between them in 9000: a float32 sum of either is off by half a thousandth."""
    one = long_side(jnp.float32)
    shift = jnp.array([[0.0], [1.0], [-1.0]]) * jnp.array([[0.01, 1e-4]])
    many = mixing.moved(one.replace(reference_logps=jnp.repeat(one.reference_logps, 3, axis=0)), shift)
    exact = jax.tree.map(lambda x: x.astype(jnp.float64), many)
    weights = np.array([[0.25, 0.2], [0.5, 0.1], [0.25, 0.7]])
    ratios = [scores.log_ratio(mixed_by(mix, side, jnp.asarray(weights, side.weights.dtype))) for side in (many, exact)]
    np.testing.assert_allclose(*ratios, atol=2e-5)
    assert (np.abs(ratios[1]) > 5e-5).all()


def test_statistics_are_the_mean_over_references_and_what_is_of_many_is_gone():
    random = np.random.default_rng(1)
    names = ('forward_kl', 'reverse_kl', 'reference_entropy')
    by_reference = {name: jnp.asarray(random.exponential(1, (3, 4, 7))) for name in names}
    side, weights, _, mixed = mixed_side(
        by_reference=by_reference, reference_lengths=jnp.ones((3, 4)), mixing_weights=jnp.ones((3, 4)) / 3
    )
    for name in names:
        expected = np.einsum('kb,kbc->bc', weights, np.asarray(by_reference[name]))
        np.testing.assert_allclose(getattr(mixed, name), expected, rtol=1e-12)
    assert mixed.by_reference == {} and mixed.reference_lengths is None and mixed.mixing_weights is None


def test_the_policys_gradient_goes_through_the_mean_of_divergences():
    side, weights, _, _ = mixed_side()

    def penalty(divergences):
        return mixed_by('harmonic', side.replace(by_reference={'reverse_kl': divergences}), weights).reverse_kl.sum()

    slopes = jax.grad(penalty)(jnp.ones((3, 4, 7)))
    np.testing.assert_allclose(slopes, np.broadcast_to(weights[..., None], (3, 4, 7)), rtol=1e-12)


def test_references_are_constants_to_the_gradient():
    side, weights, _, _ = mixed_side()

    def total(logps):
        many = side.replace(reference_logps=logps)
        one = mixed_by('harmonic', many, weights)
        return one.reference_logps.sum() + mixing.moved(many, scores.reference_logps(many)).reference_logps.sum()

    np.testing.assert_array_equal(jax.grad(total)(side.reference_logps), jnp.zeros((3, 4, 7)))


@pytest.mark.parametrize('dtype', [jnp.float64, jnp.float32])
def test_references_move_evenly_and_those_that_do_not_stay_bit_for_bit(dtype):
    side = sides(dtype=dtype)[1]
    shifts = jnp.zeros((3, 4), dtype).at[1].set(jnp.array([-9.0, 5.0, 1.0, 0.5])).at[2, 0].set(-3.0)
    many = jax.jit(mixing.moved)(side, shifts)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-12
    np.testing.assert_allclose(sums(many), sums(side) + shifts, rtol=tolerance)
    np.testing.assert_array_equal(many.reference_logps[0], side.reference_logps[0])
    np.testing.assert_array_equal(many.reference_logps[2, 1:], side.reference_logps[2, 1:])
    moves = (many.reference_logps - side.reference_logps)[2, 0]
    np.testing.assert_allclose(moves, [-1.0] * 3 + [0.0] * 4, rtol=1e-5, atol=1e-6)
