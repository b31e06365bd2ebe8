"""Paired t, Holm, verdicts and errors by seed and prompt, against SciPy, hand-worked cases and simulation."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from jaxpo.errors import InputError
from jaxpo.study import statistics
from jaxpo.study.statistics import clustered_standard_error, holm, paired, two_way_bootstrap, verdict

METHOD = np.array([0.71, 0.66, 0.74, 0.69, 0.73])
BASELINE = np.array([0.68, 0.67, 0.70, 0.66, 0.69])


def test_paired_is_the_paired_t_test():
    found, oracle = paired(METHOD - BASELINE), stats.ttest_rel(METHOD, BASELINE)
    low, high = oracle.confidence_interval(0.95)
    assert found.n == 5
    np.testing.assert_allclose(
        [found.mean, found.low, found.high, found.p_value], [0.026, low, high, oracle.pvalue], rtol=1e-9
    )
    np.testing.assert_allclose(found.standard_error, np.std(METHOD - BASELINE, ddof=1) / math.sqrt(5), rtol=1e-12)


@pytest.mark.parametrize('confidence', [0.5, 0.8, 0.99, 0.999])
def test_the_interval_has_the_confidence_asked_for(confidence):
    found = paired(METHOD - BASELINE, confidence)
    oracle = stats.ttest_1samp(METHOD - BASELINE, 0).confidence_interval(confidence)
    np.testing.assert_allclose([found.low, found.high], oracle, rtol=1e-9)


def test_probability_better_is_the_posterior_under_the_prior_that_is_flat_in_the_mean_and_log_sd():
    """Drawn as the posterior is built: the variance by its inverse chi-squared, then the mean given the variance."""
    differences = METHOD - BASELINE
    generator = np.random.default_rng(0)
    variance = 4 * differences.var(ddof=1) / generator.chisquare(4, 400_000)
    means = generator.normal(differences.mean(), np.sqrt(variance / 5))
    assert paired(differences).probability_better == pytest.approx((means > 0).mean(), abs=1e-3)
    assert paired(-differences).probability_better == pytest.approx(1 - paired(differences).probability_better)
    assert paired(differences).probability_better == pytest.approx(
        1 - stats.ttest_1samp(differences, 0, alternative='greater').pvalue
    )


@pytest.mark.parametrize('n, confidence', [(2, 0.95), (3, 0.95), (5, 0.95), (5, 0.99), (10, 0.8)])
def test_the_minimum_detectable_effect_is_found_in_four_of_five_studies(n, confidence):
    generator = np.random.default_rng(n)
    effect = statistics.detectable_in_standard_errors(n, confidence) / math.sqrt(n)  # in standard deviations
    draws = generator.normal(effect, 1.0, (100_000, n))
    ratio = np.abs(draws.mean(axis=1)) / (draws.std(axis=1, ddof=1) / math.sqrt(n))
    assert (ratio > statistics.t_quantile(confidence, n - 1)).mean() == pytest.approx(0.8, abs=0.005)


def test_the_minimum_detectable_effect_is_in_units_of_the_metric_and_as_tables_have_it():
    """A paired t test at 5 % needs 34 pairs for d = 0.5 and 15 for d = 0.8 (Cohen's tables), and one fewer is short."""
    for n, effect in ((34, 0.5), (15, 0.8)):
        assert statistics.detectable_in_standard_errors(n) / math.sqrt(n) <= effect
        assert statistics.detectable_in_standard_errors(n - 1) / math.sqrt(n - 1) > effect
    one, thousand = paired(METHOD - BASELINE), paired(1000 * (METHOD - BASELINE))
    assert thousand.minimum_detectable_effect == pytest.approx(1000 * one.minimum_detectable_effect)
    assert one.minimum_detectable_effect == pytest.approx(3.761059553825 * one.standard_error)


@pytest.mark.parametrize('seeds', [3, 5])
def test_the_t_interval_covers_what_it_promises_where_the_normal_one_does_not(seeds):
    draws = np.random.default_rng(seeds).normal(0.3, 2.0, (4000, seeds))
    results = [paired(row) for row in draws]
    covered = np.mean([result.low <= 0.3 <= result.high for result in results])
    assert 0.93 <= covered <= 0.97
    normal = np.mean([abs(result.mean - 0.3) <= 1.96 * result.standard_error for result in results])
    assert normal < 0.90


@pytest.mark.parametrize('differences', [[], [0.4]])
def test_fewer_than_two_pairs_have_no_interval(differences):
    found = paired(differences)
    assert found.n == len(differences)
    assert found.mean == 0.4 if differences else math.isnan(found.mean)
    rest = [value for name, value in dataclasses.asdict(found).items() if name not in ('mean', 'n')]
    assert len(rest) == 6 and all(map(math.isnan, rest))
    assert found.claim == verdict(found, 0.0) == verdict(found, found.p_value) == 'no claim'


@pytest.mark.parametrize('n', [2, 3, 8])
@pytest.mark.parametrize('value, claim', [(0.1, 'better'), (-0.1, 'worse'), (0.0, 'no claim')])
def test_equal_differences_are_a_point_and_as_likely_as_equal_signs(n, value, claim):
    differences = [value] * n  # the mean of three times 0.1 is not 0.1, nor are its deviations 0
    found = paired(differences)
    assert (found.mean, found.low, found.high, found.standard_error) == (value, value, value, 0.0)
    assert found.claim == claim and math.isnan(found.minimum_detectable_effect)
    oracle = stats.permutation_test((differences,), np.mean, permutation_type='samples', n_resamples=np.inf)
    assert found.p_value == pytest.approx(oracle.pvalue)
    assert found.probability_better == pytest.approx(0.5 + np.sign(value) * (0.5 - found.p_value / 2))
    assert verdict(found, found.p_value) == (claim if n > 5 else 'no claim')


def test_differences_that_rounding_makes_unequal_are_equal():
    right, wrong = np.array([41, 44, 47]) / 64, np.array([40, 43, 46]) / 64
    thirds = paired(right * (64 / 63) - wrong * (64 / 63))
    assert thirds.p_value == 0.25 and thirds.standard_error == 0
    singles = paired((right * (64 / 63)).astype(np.float32).astype(float) - (wrong * (64 / 63)).astype(np.float32))
    assert singles.p_value == 0.25 and singles.mean == pytest.approx(1 / 63, rel=1e-5)
    assert paired([0.1, 0.1003, 0.1]).standard_error == pytest.approx(1e-4)


def test_zeros_of_both_signs_and_numbers_too_small_to_square_are_no_difference():
    assert str(paired([-0.0, 0.0]).low) == '0.0'
    assert paired([0.0, 1e-200, 0.0]).claim == 'no claim'


@pytest.mark.parametrize(
    'differences, message', [([0.1, math.nan, math.inf, 1], '2 of 4 are not finite'), ([[0.1, 0.2]], r'shape \(1, 2\)')]
)
def test_differences_that_are_none_are_refused(differences, message):
    with pytest.raises(InputError, match=message):
        paired(differences)


@pytest.mark.parametrize('confidence', [0.0, 0.05, 0.9999, 1.0, 95, math.nan])
def test_confidence_is_a_share_that_can_be_computed(confidence):
    with pytest.raises(InputError, match='confidence'):
        paired([0.1, 0.2], confidence)


def test_holm_by_hand():
    """Sorted: .005 x 5, .011 x 4, .02 x 3, .04 x 2 and .045 x 1, which may not be less than .08 before it."""
    np.testing.assert_allclose(holm([0.02, 0.045, 0.005, 0.04, 0.011]), [0.06, 0.08, 0.025, 0.08, 0.044], rtol=1e-12)


def test_holm_by_its_definition():
    """Step down: reject the smallest while it is at most alpha / (number left), at each adjusted p-value and about."""
    p_values = np.random.default_rng(0).uniform(size=12) ** 3
    adjusted = holm(p_values)
    for alpha in (*(adjusted[adjusted < 1] + 1e-9), *(adjusted - 1e-9), 0.05):
        rejected = np.zeros(12, bool)
        for left, place in zip(range(12, 0, -1), np.argsort(p_values)):
            if p_values[place] > alpha / left:
                break
            rejected[place] = True
        np.testing.assert_array_equal(adjusted <= alpha, rejected)


def test_holm_keeps_nan_out_of_the_count_caps_at_one_and_takes_none():
    np.testing.assert_array_equal(holm([0.01, math.nan, 0.9, 0.02]), [0.03, math.nan, 0.9, 0.04])
    np.testing.assert_array_equal(holm([0.6, 0.7]), [1.0, 1.0])
    assert holm([]).shape == (0,) and np.isnan(holm([math.nan])).all()
    with pytest.raises(InputError, match='between 0 and 1'):
        holm([0.1, 1.2])


def test_a_claim_needs_the_interval_and_the_adjusted_p():
    found = paired(METHOD - BASELINE)
    assert 0.04 < found.p_value < 0.05 and found.claim == 'better'
    assert verdict(found, found.p_value) == 'better' and verdict(found, 2 * found.p_value) == 'no claim'
    assert verdict(found, found.p_value, alpha=0.01) == 'no claim'
    assert verdict(paired(BASELINE - METHOD), found.p_value) == 'worse'
    assert verdict(paired(METHOD - BASELINE, 0.99), found.p_value) == 'no claim'
    assert verdict(found, math.nan) == 'no claim'


def test_clustered_error_by_hand():
    """Mean 3; deviations by cluster -1 - 2, 0 and 1 + 2: sqrt(3/2 x (9 + 0 + 9)) / 5."""
    error = clustered_standard_error([2, 3, 4, 1, 5], ['a', 'b', 'c', 'a', 'c'])
    assert error == pytest.approx(math.sqrt(27) / 5, rel=1e-12)


def test_clustered_error_of_single_items_is_the_standard_error_and_of_copies_that_of_the_originals():
    values = np.random.default_rng(0).normal(size=(2, 30))
    singles = clustered_standard_error(values, np.arange(30)[::-1])
    np.testing.assert_allclose(singles, stats.sem(values, axis=1), rtol=1e-12)
    copied = clustered_standard_error(np.tile(values, 4), np.tile(np.arange(30), 4))
    np.testing.assert_allclose(copied, singles, rtol=1e-12)
    assert math.isnan(clustered_standard_error([1.0, 2.0], [0, 0]))


def test_bootstrap_error_is_that_of_seeds_and_of_clusters_where_only_they_vary():
    generator = np.random.default_rng(0)
    by_seed, by_prompt = generator.normal(size=(5, 1)), generator.normal(size=40)
    clusters = np.repeat(np.arange(40), 3)
    seeds = two_way_bootstrap(np.broadcast_to(by_seed, (5, 120)), clusters)
    assert seeds.standard_error == pytest.approx(stats.sem(by_seed[:, 0]), rel=0.03)
    oracle = paired(by_seed[:, 0])
    np.testing.assert_allclose([seeds.mean, seeds.low, seeds.high], [oracle.mean, oracle.low, oracle.high], rtol=0.05)
    prompts = two_way_bootstrap(np.broadcast_to(by_prompt[clusters], (5, 120)), clusters)
    assert prompts.standard_error == pytest.approx(stats.sem(by_prompt), rel=0.03)
    both = two_way_bootstrap(by_seed + by_prompt[clusters], clusters)
    assert both.standard_error == pytest.approx(math.hypot(seeds.standard_error, prompts.standard_error), rel=0.03)
    assert (both.seeds, both.clusters) == (5, 40)


def test_bootstrap_weighs_a_prompt_by_its_pairs():
    """The mean of resampled items, so a ratio: prompts of equal means and unequal sizes leave nothing to vary."""
    clusters = np.repeat([0, 1, 2], [1, 5, 30])
    found = two_way_bootstrap(np.tile(clusters, (3, 1)), clusters, draws=4000)
    assert found.mean == pytest.approx((5 + 60) / 36)
    # Two of three prompts, drawn with replacement: nine equally likely draws.
    draws = [(sizes * names).sum() / sizes.sum() for names, sizes in _pairs_of(((0, 1), (1, 5), (2, 30)))]
    assert found.standard_error == pytest.approx(np.std(draws), rel=0.03)


def _pairs_of(clusters):
    for left in clusters:
        for right in clusters:
            names, sizes = np.array([left, right]).T
            yield names, sizes


@pytest.mark.parametrize('seeds, of_seed, of_prompt, of_pair', [(3, 1, 1, 0), (3, 0.1, 1, 1), (5, 1, 1, 0)])
def test_bootstrap_interval_covers_new_seeds_and_prompts(seeds, of_seed, of_prompt, of_pair):
    generator, clusters, covered = np.random.default_rng(seeds), np.arange(120) // 2, []
    for _ in range(300):
        prompts = of_prompt * generator.normal(size=60)[clusters]
        values = of_seed * generator.normal(size=(seeds, 1)) + prompts + of_pair * generator.normal(size=(seeds, 120))
        found = two_way_bootstrap(values, clusters, draws=300)
        covered.append(found.low <= 0 <= found.high)
    assert np.mean(covered) > 0.92


def test_bootstrap_repeats_itself_and_says_where_there_is_nothing_to_resample():
    values = np.random.default_rng(0).normal(size=(4, 50))
    first = two_way_bootstrap(values, np.arange(50), seed=1)
    assert first == two_way_bootstrap(values, np.arange(50), seed=1)
    assert first != two_way_bootstrap(values, np.arange(50), seed=2)
    same = two_way_bootstrap(np.full((4, 50), 0.1), np.arange(50))
    assert (same.mean, same.low, same.high, same.standard_error) == (0.1, 0.1, 0.1, 0.0)
    for alone in (two_way_bootstrap(values[:1], np.arange(50)), two_way_bootstrap(values, np.zeros(50))):
        assert math.isfinite(alone.mean) and math.isnan(alone.low) and math.isnan(alone.standard_error)
    crossed = two_way_bootstrap([[0.0, 1.0], [1.0, 0.0]], [0, 1])
    assert crossed.low < 0.0 and crossed.high > 1.0


def test_draws_in_parts_are_as_many(monkeypatch):
    monkeypatch.setattr(statistics, 'NUMBERS_AT_ONCE', 150)
    sums = np.random.default_rng(0).normal(size=(3, 50))
    assert statistics._resampled_means(sums, np.ones(50), 10, 0).shape == (10,)


@pytest.mark.parametrize(
    'values, clusters, message',
    [
        ([[1.0, math.nan]], [0, 1], '1 of 2 are not finite'),
        ([1.0, 2.0], [0, 1], r'\[seeds, items\]'),
        ([[1.0, 2.0]], [0, 1, 2], 'one an item'),
        (np.zeros((2, 0)), [], 'one an item'),
    ],
)
def test_values_that_cannot_be_resampled_are_refused(values, clusters, message):
    with pytest.raises(InputError, match=message):
        two_way_bootstrap(values, clusters)
