"""Losses on one margin: golden values that need columns or a part of a loss, what equals what, and numerical edges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import losses
from jaxpo.errors import InputError
from jaxpo.losses import contract, pairwise, scores
from jaxpo.types import Completion


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def completion(policy, reference, tokens, **columns):
    """One completion whose log-probabilities are spread evenly over its tokens."""
    share = jnp.full((1, tokens), 1.0 / tokens)
    columns = {name: jnp.array([value]) for name, value in columns.items()}
    return Completion(policy * share, (reference * share)[None], jnp.ones((1, tokens)), columns=columns)


def golden():
    return completion(-12.0, -13.0, 6, score=2.0), completion(-15.0, -14.5, 9, score=0.5)


def at_margin(margin):
    """A pair whose margin of log-ratios this is."""
    return completion(margin - 3.0, -3.0, 2), completion(-3.0, -3.0, 2)


def value(name, pair, **hyperparameters):
    return losses.find(name)(*pair, **hyperparameters)[0][0]


def by_margin(name, margin, **hyperparameters):
    """The loss's derivative by the margin of log-ratios."""
    return jax.grad(lambda margin: value(name, at_margin(margin), **hyperparameters))(margin)


def test_golden_odpo(double):
    np.testing.assert_allclose(value('odpo', golden(), beta=0.1, alpha=1.0), 0.829015450088, rtol=1e-11)


def test_golden_orpo(double):
    chosen, rejected = golden()
    log_odds_ratio = scores.log_odds(chosen) - scores.log_odds(rejected)
    np.testing.assert_allclose(log_odds_ratio, [-0.397253724717], rtol=1e-11)
    likelihood = value('orpo', golden(), odds_ratio_weight=0.0)
    np.testing.assert_allclose(likelihood, 2.0, rtol=1e-14)
    term = value('orpo', golden(), odds_ratio_weight=0.1) - likelihood
    np.testing.assert_allclose(term, 0.091137199747, rtol=1e-10)


def test_golden_cpo_is_its_preference_term_and_the_whole_log_probability(double):
    np.testing.assert_allclose(value('cpo', golden(), beta=0.1, nll_weight=1.0), 12.554355244469, rtol=1e-12)


def test_r_dpo_has_the_sign_of_the_paper(double):
    """Values of public code with the sign exchanged must not appear; a longer chosen completion has margin already."""
    np.testing.assert_allclose(value('r_dpo', golden(), beta=0.1, alpha=0.02), 0.649159339026, rtol=1e-11)
    np.testing.assert_allclose(value('r_dpo', golden(), beta=0.1, alpha=-0.02), 0.593649581022, rtol=1e-11)
    longer = completion(-15.0, -14.5, 9), completion(-12.0, -13.0, 6)
    falling = [value('r_dpo', longer, alpha=alpha) for alpha in (0.0, 0.02, 0.2, 2.0)]
    assert np.all(np.diff(falling) < 0)


SAME = [
    ('cdpo', {'label_smoothing': 0.0}, 'dpo', {}),
    ('robust_dpo', {'label_smoothing': 0.0}, 'dpo', {}),
    ('f_dpo', {}, 'dpo', {}),
    ('f_dpo', {'divergence': 'alpha', 'alpha': 0.0}, 'dpo', {}),
    ('f_dpo', {'divergence': 'alpha', 'alpha': 1.0}, 'f_dpo', {'divergence': 'forward_kl'}),
    ('odpo', {'alpha': 0.0, 'beta': 0.1}, 'dpo', {}),
    ('r_dpo', {'alpha': 0.0}, 'dpo', {}),
    ('h_dpo', {'alpha': 1.0}, 'dpo', {}),
    ('alpha_po', {'alpha': 0.0, 'gamma': 0.5, 'beta': 2.0}, 'simpo', {}),
]
NEAR = [
    ('f_dpo', {'divergence': 'alpha', 'alpha': 1e-7}, 'dpo', {}),
    ('f_dpo', {'divergence': 'alpha', 'alpha': -1e-7}, 'dpo', {}),
    ('alpha_po', {'alpha': 1e-7, 'gamma': 0.5, 'beta': 2.0}, 'simpo', {}),
]


def with_gradients(name, options, chosen, rejected):
    def scalar(chosen, rejected):
        values, rewards = losses.find(name)(chosen, rejected, **options)
        return values.sum(), (values, rewards)

    gradients, (values, rewards) = jax.grad(scalar, argnums=(0, 1), has_aux=True)(chosen, rejected)
    return values, rewards, [gradient.policy_logps for gradient in gradients]


def assert_alike(first, second, sides, **tolerance):
    for one, other in zip(*(jax.tree.leaves(with_gradients(*each, *sides)) for each in (first, second))):
        np.testing.assert_allclose(one, other, **tolerance)


@pytest.mark.parametrize('name, options, other, others', SAME)
def test_a_special_case_is_the_other_loss_bit_for_bit(double, name, options, other, others):
    sample = contract.example(losses.find('odpo'), {})
    assert_alike((name, options), (other, others), (sample.chosen, sample.rejected), rtol=0, atol=0)


@pytest.mark.parametrize('name, options, other, others', NEAR)
def test_a_limit_is_the_other_loss(double, name, options, other, others):
    sample = contract.example(losses.find(name), options)
    assert_alike((name, options), (other, others), (sample.chosen, sample.rejected), rtol=2e-6, atol=1e-7)


def without_reference(sample):
    """The same pairs under a reference that gives every token log-probability 0."""
    sides = (sample.chosen, sample.rejected)
    return [side.replace(reference_logps=jnp.zeros_like(side.reference_logps)) for side in sides]


@pytest.mark.parametrize(
    'free, options, measured, others',
    [
        ('cpo', {'nll_weight': 0.0}, 'dpo', {}),
        ('simpo', {'gamma': 0.0}, 'ln_dpo', {'beta': 2.0}),
        ('slic', {'nll_weight': 0.0, 'delta': 1.0}, 'hinge', {'beta': 1.0}),
    ],
)
def test_a_flat_reference_is_no_reference(double, free, options, measured, others):
    sides = without_reference(contract.example(losses.find(measured), {}))
    assert_alike((free, options), (measured, others), sides, rtol=1e-13)


def test_completions_of_one_length_are_normalised_by_beta(double):
    pair = completion(-12.0, -13.0, 6), completion(-15.0, -14.5, 6)
    np.testing.assert_allclose(value('ln_dpo', pair, beta=0.6), value('dpo', pair, beta=0.1), rtol=1e-14)


@pytest.mark.parametrize('name, slope', [('cdpo', 1 - 2 * 0.1), ('robust_dpo', 1 / (1 - 2 * 0.1))])
def test_exchanging_the_pair_of_a_noisy_label(double, name, slope):
    chosen, rejected = golden()
    difference = value(name, (chosen, rejected)) - value(name, (rejected, chosen))
    np.testing.assert_allclose(difference, -slope * 0.1 * 1.5, rtol=1e-12)


def test_robust_dpo_is_dpo_on_average_over_wrong_labels(double):
    chosen, rejected = golden()
    noisy = 0.7 * value('robust_dpo', (chosen, rejected), label_smoothing=0.3)
    noisy += 0.3 * value('robust_dpo', (rejected, chosen), label_smoothing=0.3)
    np.testing.assert_allclose(noisy, value('dpo', (chosen, rejected)), rtol=1e-13)


@pytest.mark.parametrize('name, least', [('cdpo', None), ('exo', 0.0)])
def test_a_smoothed_label_has_a_finite_optimum(double, name, least):
    """At sigmoid(z) = 1 - label_smoothing, on either side of which the loss rises; EXO's KL is 0 there."""
    optimum = np.log(0.8 / 0.2)
    slopes = [by_margin(name, optimum + shift, beta=1.0, label_smoothing=0.2) for shift in (-0.1, 0.0, 0.1)]
    assert slopes[0] < 0 < slopes[2]
    np.testing.assert_allclose(slopes[1], 0.0, atol=1e-15)
    if least is not None:
        at_optimum = value(name, at_margin(optimum), beta=1.0, label_smoothing=0.2)
        np.testing.assert_allclose(at_optimum, least, atol=1e-15)


def test_robust_dpo_has_no_least_value(double):
    far = value('robust_dpo', at_margin(1e4), label_smoothing=0.1)
    np.testing.assert_allclose(far, -0.1 * 1e3 / 0.8, rtol=1e-12)


@pytest.mark.parametrize('label_smoothing', [0.0, 1e-3])
@pytest.mark.parametrize('margin', [-1e6, 0.0, 1e6])
def test_exo_is_finite_even_without_smoothing(label_smoothing, margin):
    assert np.isfinite(value('exo', at_margin(margin), label_smoothing=label_smoothing))
    assert np.isfinite(by_margin('exo', margin, label_smoothing=label_smoothing))


def test_discopop_has_a_local_minimum_below_the_reference(double):
    np.testing.assert_allclose(value('discopop', at_margin(0.0)), 0.5 * np.log(2.0) + 0.5, rtol=1e-14)
    slopes = [by_margin('discopop', z, beta=1.0, tau=0.05) for z in (-0.125, -0.115, 0.0, 1.0)]
    assert slopes[0] < 0 < slopes[1] and slopes[2] > 0 > slopes[3]


@pytest.mark.parametrize('margin', [-1e6, -1e3, 1e3, 1e6])
def test_discopop_does_not_overflow(margin):
    """Far below, the logistic loss is left; far above, nothing is."""
    expected = max(0.0, -0.05 * margin)
    np.testing.assert_allclose(value('discopop', at_margin(margin)), expected, rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(by_margin('discopop', margin), -0.05 if margin < 0 else 0.0, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize('rejected_score', [2.0, 3.0, 2.0 - 1e-7])
def test_odpo_asks_next_to_nothing_of_a_tie_or_a_wrong_order(double, rejected_score):
    chosen, rejected = golden()
    pair = chosen, rejected.replace(columns={'score': jnp.array([rejected_score])})
    loss, _, gradients = with_gradients('odpo', {}, *pair)
    np.testing.assert_allclose(loss, np.log1p(1e-6 * np.exp(-0.75)), rtol=1e-9)
    assert all(np.all(np.abs(gradient) < 1e-6) for gradient in gradients)


def test_odpo_asks_more_of_a_wider_gap(double):
    chosen, rejected = golden()
    pairs = [(chosen.replace(columns={'score': jnp.array([score])}), rejected) for score in (0.6, 1.0, 2.0, 9.0)]
    assert np.all(np.diff([value('odpo', pair) for pair in pairs]) > 0)


def test_alpha_belongs_to_the_alpha_divergence_alone():
    entry = losses.find('f_dpo')
    entry.check({'divergence': 'alpha', 'alpha': 0.3})
    with pytest.raises(InputError, match="Unknown hyperparameter of f_dpo 'alpha'"):
        entry.check({'divergence': 'forward_kl', 'alpha': 0.3})
    with pytest.raises(InputError, match="Did you mean 'forward_kl'"):
        entry.check({'divergence': 'forward'})


def test_alpha_of_the_alpha_divergence_changes_the_loss(double):
    alphas = jnp.array([0.0, 0.3, 0.5, 1.0])
    found = jax.vmap(lambda alpha: value('f_dpo', golden(), divergence='alpha', alpha=alpha))(alphas)
    np.testing.assert_allclose(found[1], 0.625437693864, rtol=1e-11)
    assert len(set(found.tolist())) == 4
    singly = [value('f_dpo', golden(), divergence='alpha', alpha=alpha) for alpha in alphas.tolist()]
    np.testing.assert_allclose(found, singly, rtol=1e-14)


@pytest.mark.parametrize('divergence', sorted(pairwise.DIVERGENCES))
def test_f_dpo_rewards_are_0_at_the_reference_and_grow_as_the_log_ratio_there(double, divergence):
    """Every f' here has f'(1) = 0; f''(1) is 1, but 1 / 2 for Jensen-Shannon."""
    score = pairwise.DIVERGENCES[divergence]
    assert score(jnp.array(0.0)) == 0
    np.testing.assert_allclose(jax.grad(score)(0.0), 0.5 if divergence == 'jensen_shannon' else 1.0, rtol=1e-14)


@pytest.mark.parametrize('divergence', sorted(pairwise.DIVERGENCES))
@pytest.mark.parametrize('log_ratio', [-1e5, -61.0, -59.0, -31.0, -29.0, 1e5])
def test_no_divergence_overflows_or_loses_its_sign(divergence, log_ratio):
    score = pairwise.DIVERGENCES[divergence]
    slope = jax.grad(score)(log_ratio)
    assert np.isfinite(score(jnp.float32(log_ratio))) and np.isfinite(slope)
    assert slope > 0 if log_ratio < 0 or divergence == 'reverse_kl' else slope >= 0
    for pair in (at_margin(log_ratio), at_margin(log_ratio)[::-1]):
        values, _, gradients = with_gradients('f_dpo', {'divergence': divergence}, *pair)
        assert np.isfinite(values) and all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_the_deformed_logarithm_goes_on_along_its_tangent(double):
    """Exact up to the exponent 30, and from there a straight line of the slope it had."""
    np.testing.assert_allclose(scores.deformed_log(jnp.array(-59.9), 0.5), (1 - np.exp(29.95)) / 0.5, rtol=1e-13)
    slopes = [jax.grad(scores.deformed_log)(x, 0.5) for x in (-60.0, -70.0, -1e4)]
    np.testing.assert_allclose(slopes, np.exp(30.0), rtol=1e-13)
    ends = [scores.deformed_log(jnp.array(x), 0.5) for x in (-60.0, -70.0)]
    np.testing.assert_allclose(ends[0] - ends[1], 10 * np.exp(30.0), rtol=1e-12)


@pytest.mark.parametrize('alpha', [0.0, 0.25, -0.25, 1.0])
@pytest.mark.parametrize('scale', [0.0, 1e4])
def test_alpha_po_is_finite_for_every_alpha(alpha, scale):
    sample = contract.example(losses.find('alpha_po'), {}, dtype=jnp.float32)
    sides = [side.replace(policy_logps=side.policy_logps * scale) for side in (sample.chosen, sample.rejected)]
    for array in jax.tree.leaves(with_gradients('alpha_po', {'alpha': jnp.float32(alpha)}, *sides)):
        assert array.dtype == jnp.float32 and np.all(np.isfinite(array))


@pytest.mark.parametrize('mean', [-80.0, -20.0, -1.0, -0.694, -0.693, -0.1, -1e-3, -1.5e-7])
def test_log_odds_are_exact_in_float32(mean):
    side = completion(3 * mean, 0.0, 3)
    with jax.enable_x64(True):
        actual = float(scores.mean_logp(side)[0])  # what float32 made of the mean
    np.testing.assert_allclose(scores.log_odds(side), [actual - np.log(-np.expm1(actual))], rtol=1e-6, atol=1e-7)
    slope = jax.grad(lambda total: scores.log_odds(completion(total, 0.0, 3))[0])(3 * mean)
    np.testing.assert_allclose(slope, 1 / (3 * -np.expm1(actual)), rtol=1e-5)


def test_orpo_of_a_certain_completion_is_finite():
    """Log-probability 0 has infinite odds: they are held at the precision of the dtype, and give no gradient."""
    for pair in (
        (completion(0.0, 0.0, 3), completion(-4.0, 0.0, 3)),
        (completion(-4.0, 0.0, 3), completion(0.0, 0.0, 3)),
    ):
        values, _, gradients = with_gradients('orpo', {}, *pair)
        assert np.isfinite(values) and all(np.all(np.isfinite(gradient)) for gradient in gradients)
    np.testing.assert_allclose(scores.log_odds(completion(0.0, 0.0, 3)), -np.log(np.finfo(np.float32).eps), rtol=1e-6)
