"""Every weighting against a loop by hand, and what each remembers."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references.many import golden_sides, sides, spread, sums, token_counts, without

from jaxpo.errors import InputError
from jaxpo.references import weighting
from jaxpo.references.weighting_registry import named

pytestmark = pytest.mark.usefixtures('compiled_quickly')

NAMES = sorted(weighting.WEIGHTINGS)
KEY = jax.random.key(3)
examples = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def weights_of(name, chosen, rejected, **keywords):
    function = weighting.find(name).weights
    return function(chosen, rejected, **named(function, {'primary': 0, 'key': None, **keywords}))


def observed(name, chosen, rejected, **keywords):
    function = weighting.find(name).observe
    return function(chosen, rejected, **named(function, {'primary': 0, **keywords}))


def first_state(name, references=3, **words):
    return weighting.find(name).init_state(references, **words)


def with_lengths(side, seed=0):
    lengths = np.random.default_rng(seed).integers(1, 9, (side.reference_logps.shape[0], 4))
    return side.replace(reference_lengths=jnp.asarray(lengths, jnp.float64))


def means(side):
    lengths = token_counts(side) if side.reference_lengths is None else np.asarray(side.reference_lengths)
    return sums(side) / lengths


def confidence_loop(chosen, rejected, of=means):
    return np.abs(of(chosen) - of(rejected))


@pytest.mark.parametrize('name', NAMES)
def test_a_docstring_says_what_a_weighting_is(name):
    entry = weighting.find(name)
    assert entry.summary.endswith('.') and entry.formula.startswith('w') and entry.source
    assert (entry.observes == 'nothing') == (entry.init_state is None) == (entry.update is None)
    assert (entry.observes in ('validation', 'step')) == (entry.observe is not None)
    assert all(name in entry.defaults for name in entry.ranges)
    for hyperparameter in entry.defaults:
        assert hyperparameter in inspect.getdoc(entry.weights)


def test_some_weightings_read_the_primary():
    assert [name for name in NAMES if weighting.find(name).reads_primary] == ['learned', 'swcw_one_hot', 'tsw']


def first_weights(name, chosen, rejected, **more):
    references = chosen.reference_logps.shape[0]
    entry = weighting.find(name)
    state = entry.init_state(references) if entry.init_state else None
    return weights_of(name, chosen, rejected, **{'state': state, 'given': jnp.ones(references), 'primary': 1, **more})


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('key', [None, KEY], ids=['evaluation', 'training'])
def test_weights_sum_to_1_also_of_what_is_missing(name, key):
    chosen, rejected = sides(empty=(1,))
    rejected = without(rejected, [2])
    weights = first_weights(name, chosen, rejected, key=key)
    assert weights.shape == (3, 4) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(axis=0), np.ones(4), rtol=1e-12)


@pytest.mark.parametrize('name', ['vdw', 'vaw', 'swcw', 'learned', 'arwc', 'fixed'])
def test_weights_are_uniform_where_nothing_was_seen(name):
    chosen, rejected = sides(empty=range(4))
    np.testing.assert_allclose(first_weights(name, chosen, rejected), np.full((3, 4), 1 / 3), rtol=1e-12)


@pytest.mark.parametrize('name', ['swcw_one_hot', 'tsw'])
def test_all_weight_is_on_the_primary_where_nothing_was_seen(name):
    np.testing.assert_array_equal(first_weights(name, *sides()), np.repeat([[0.0], [1], [0]], 4, axis=1))


def test_fixed_weights_are_normalised():
    weights = weights_of('fixed', *sides(), given=jnp.array([3.0, 0.0, 1.0]))
    np.testing.assert_allclose(weights, np.repeat([[0.75], [0], [0.25]], 4, axis=1), rtol=1e-15)


def test_golden_arwc():
    weights = weights_of('arwc', *golden_sides(), confidence='sum')
    np.testing.assert_allclose(weights[:, 0], [0.2580645161, 0.7419354839], atol=1e-10)


@pytest.mark.parametrize('lengths', [False, True], ids=['own tokens', 'other tokenizers'])
@pytest.mark.parametrize('confidence, of', [('sum', sums), ('mean', means)])
@examples
@given(seed=seeds)
def test_arwc_equals_a_loop(lengths, confidence, of, seed):
    chosen, rejected = sides(seed=seed)
    if lengths:
        chosen, rejected = with_lengths(chosen, seed), with_lengths(rejected, seed + 1)
    weights = weights_of('arwc', chosen, rejected, confidence=confidence)
    for pair in range(4):
        confidences = [abs(of(chosen)[k, pair] - of(rejected)[k, pair]) for k in range(3)]
        np.testing.assert_allclose(weights[:, pair], np.array(confidences) / sum(confidences), rtol=1e-9)


def test_arwc_of_a_pair_that_no_reference_tells_apart_is_uniform():
    side = spread([-3.0], [[-4.0], [-7.0]], 5)
    np.testing.assert_array_equal(weights_of('arwc', side, side), [[0.5], [0.5]])


@pytest.mark.parametrize('name', ['vdw', 'swcw', 'swcw_one_hot'])
@pytest.mark.parametrize('lengths', [False, True], ids=['own tokens', 'other tokenizers'])
def test_confidence_is_by_token_of_the_references_own_tokenizer(name, lengths):
    chosen, rejected = sides()
    if lengths:
        chosen, rejected = with_lengths(chosen), with_lengths(rejected, 1)
    seen = observed(name, chosen, rejected)
    np.testing.assert_allclose(seen, confidence_loop(chosen, rejected), rtol=1e-12)
    assert not np.allclose(seen, confidence_loop(chosen, rejected, sums))


@pytest.mark.parametrize('name', ['vdw', 'vaw', 'swcw'])
def test_half_a_pair_says_nothing_of_a_reference(name):
    chosen, rejected = sides()
    seen = observed(name, chosen, without(rejected, [0]))
    np.testing.assert_array_equal(seen[:, 0], np.zeros(3))
    np.testing.assert_array_equal(seen[:, 1:], observed(name, chosen, rejected)[:, 1:])


def test_vdw_equals_a_loop():
    chosen, rejected = sides()
    state = weighting.find('vdw').update(first_state('vdw'), observed('vdw', chosen, rejected).mean(axis=-1))
    sums_of = [sum(confidence_loop(chosen, rejected)[k]) for k in range(3)]
    weights = weights_of('vdw', *sides(seed=9), state=state)
    np.testing.assert_allclose(weights, np.repeat(np.array(sums_of)[:, None] / sum(sums_of), 4, axis=1), rtol=1e-12)


def test_vaw_equals_a_loop_and_a_tie_counts_half():
    chosen, rejected = sides(seed=5)
    tie = rejected.reference_logps.at[2, 0].set(0).at[2, 0, :3].set(sums(chosen)[2, 0] / 5)
    rejected = rejected.replace(reference_logps=tie)
    counts = np.zeros(3)
    for k in range(3):
        for pair in range(4):
            ahead = means(chosen)[k, pair] - means(rejected)[k, pair]
            counts[k] += 0.5 if abs(ahead) < 1e-15 else float(ahead > 0)
    assert counts[2] % 1 == 0.5 and len(set(counts)) > 1
    seen = observed('vaw', chosen, rejected)
    np.testing.assert_array_equal(seen.sum(axis=-1), counts)
    state = weighting.find('vaw').update(first_state('vaw'), seen.mean(axis=-1))
    np.testing.assert_allclose(weights_of('vaw', chosen, rejected, state=state)[:, 1], counts / counts.sum())


@pytest.mark.parametrize('name', ['vdw', 'vaw'])
def test_validation_without_a_sign_of_preference_leaves_weights_uniform(name):
    state = weighting.find(name).update(first_state(name), jnp.zeros(3))
    np.testing.assert_allclose(weights_of(name, *sides(), state=state), np.full((3, 4), 1 / 3))


@pytest.mark.parametrize('window', [1, 2, 3])
@pytest.mark.parametrize('name', ['swcw', 'swcw_one_hot'])
def test_a_window_slides_over_the_steps_before(name, window):
    state, seen = first_state(name, window=window), []
    assert state['window'].shape == (window, 3)
    for step in range(5):
        chosen, rejected = sides(seed=step)
        weights = weights_of(name, chosen, rejected, state=state, primary=2)
        totals = sum(seen[-window:], np.zeros(3))
        if name == 'swcw':
            expected = totals / totals.sum() if seen else np.full(3, 1 / 3)
        else:
            expected = np.eye(3)[np.argmax(totals) if seen else 2]
        np.testing.assert_allclose(weights, np.repeat(expected[:, None], 4, axis=1), rtol=1e-12)
        seen.append(confidence_loop(chosen, rejected).mean(axis=-1))
        state = weighting.find(name).update(state, observed(name, chosen, rejected).mean(axis=-1))


def draws(state, prior, count=4000):
    chosen, rejected = (spread([-1.0], [[-1.0]] * 3, 1) for _ in range(2))
    keys = jax.random.split(KEY, count)

    def draw(key):
        return weights_of('tsw', chosen, rejected, state=state, key=key, prior=prior)[:, 0]

    return np.asarray(jax.jit(jax.vmap(draw))(keys))


TRIED = {'successes': jnp.array([3.0, 9.0, 6.0]), 'failures': jnp.array([7.0, 3.0, 2.0])}


def test_arms_are_drawn_as_often_as_their_beta_is_highest():
    drawn = draws(TRIED, 5.0)
    assert set(np.unique(drawn)) == {0.0, 1.0} and (drawn.sum(axis=1) == 1).all()
    random = np.random.default_rng(0)
    theta = random.beta(5 + np.asarray(TRIED['successes']), 5 + np.asarray(TRIED['failures']), (400_000, 3))
    expected = np.bincount(theta.argmax(axis=1), minlength=3) / len(theta)
    np.testing.assert_allclose(drawn.mean(axis=0), expected, atol=4 * 0.5 / np.sqrt(len(drawn)))
    assert expected.min() > 0.005 and expected.max() < 0.9


def test_a_strong_prior_draws_arms_alike():
    np.testing.assert_allclose(draws(TRIED, 1e5).mean(axis=0), np.full(3, 1 / 3), atol=0.035)


def test_the_same_key_draws_the_same_arm_and_others_do_not():
    chosen, rejected = sides()
    one, again = (weights_of('tsw', chosen, rejected, state=TRIED, key=KEY, prior=5.0) for _ in range(2))
    np.testing.assert_array_equal(one, again)
    assert len(np.unique(draws(TRIED, 50.0, 50), axis=0)) == 3


def test_evaluation_takes_the_highest_posterior_mean_by_its_prior():
    # 6 / 8 beats 9 / 12 only where the prior counts for nothing.
    for prior, arm in ((5.0, 1), (1e-6, 2)):
        state = {'successes': jnp.array([3.0, 9.0, 6.1]), 'failures': TRIED['failures']}
        weights = weights_of('tsw', *sides(), state=state, prior=prior)
        np.testing.assert_array_equal(weights[:, 0], np.eye(3)[arm])


@pytest.mark.parametrize('reward', [0.0, 0.25, 1.0])
def test_a_reward_is_credited_to_the_arm_that_its_key_drew(reward):
    entry, arms = weighting.find('tsw'), set()
    for key in jax.random.split(KEY, 12):
        arm = np.asarray(weights_of('tsw', *sides(), state=TRIED, key=key, prior=2.0)[:, 0])
        after = entry.update(TRIED, reward, key=key, primary=0, prior=2.0)
        np.testing.assert_allclose(after['successes'] - TRIED['successes'], reward * arm)
        np.testing.assert_allclose(after['failures'] - TRIED['failures'], (1 - reward) * arm)
        arms.add(int(arm.argmax()))
    assert len(arms) > 1


def test_a_bandit_finds_the_arm_that_pays():
    chosen, rejected = (spread([-1.0], [[-1.0]] * 3, 1) for _ in range(2))
    entry, pay = weighting.find('tsw'), jnp.array([0.2, 0.35, 0.8])

    def step(state, key):
        arm = weights_of('tsw', chosen, rejected, state=state, key=key, prior=1.0)[:, 0]
        won = jax.random.bernoulli(jax.random.fold_in(key, 1), (pay * arm).sum()).astype(jnp.float64)
        return entry.update(state, won, key=key, primary=0, prior=1.0), arm

    _, arms = jax.lax.scan(step, first_state('tsw'), jax.random.split(KEY, 300))
    assert arms[200:].mean(axis=0)[2] > 0.85


def learned_loop(chosen, rejected, shares, primary):
    """What `learned` sees of each pair, from probabilities: `[K, B]`."""
    seen = np.zeros((len(shares), 4))
    for side in (chosen, rejected):
        for pair in np.flatnonzero(np.asarray(side.weights).sum(axis=-1)):
            probabilities = np.exp(sums(side)[:, pair])
            importance = np.exp(np.asarray(side.policy_logps)[pair].sum()) / probabilities[primary]
            joint = np.asarray(shares) * probabilities
            seen[:, pair] += min(importance, np.exp(5.0)) * joint / joint.sum()
    return seen


@pytest.mark.parametrize('primary', [0, 2])
@examples
@given(seed=seeds)
def test_what_learned_sees_equals_a_loop_also_of_unpaired_rows(primary, seed):
    chosen, rejected = sides(seed=seed)
    chosen, rejected = without(chosen, [1]), without(rejected, [3])
    shares = np.random.default_rng(seed).dirichlet(np.ones(3)) * 7.0
    seen = observed('learned', chosen, rejected, state={'shares': jnp.asarray(shares)}, primary=primary)
    np.testing.assert_allclose(seen, learned_loop(chosen, rejected, shares, primary), rtol=1e-9)


def test_each_completion_counts_by_its_truncated_importance():
    # The chosen is 2 nats likelier under the policy than under the primary, the rejected 5 less likely or 6 likelier.
    chosen, rejected = spread([-40.0], [[-42.0], [-35.0]], 4), spread([-55.0], [[-50.0], [-50.0]], 6)
    state = first_state('learned', references=2)
    seen = observed('learned', chosen, rejected, state=state)[:, 0]
    responsible = 1 / (1 + np.exp(7.0))
    importance = np.exp(2.0) * np.array([responsible, 1 - responsible]) + np.exp(-5.0) / 2
    np.testing.assert_allclose(seen, importance, rtol=1e-12)
    likelier = spread([-44.0], [[-50.0], [-50.0]], 6)
    np.testing.assert_allclose(
        observed('learned', chosen, likelier, state=state)[:, 0] - seen, (np.exp(5.0) - np.exp(-5.0)) / 2, rtol=1e-12
    )


def test_the_policys_sign_has_its_say():
    """A completion that the policy likes better than the primary does counts for more than one it likes less."""
    better = spread([-1.0], [[-3.0], [-1.0]], 2)
    worse = spread([-3.0], [[-1.0], [-3.0]], 2)
    seen = observed('learned', better, worse, state=first_state('learned', references=2))[:, 0]
    assert seen[1] > seen[0]


def test_an_empty_slot_has_no_responsibilities():
    chosen, rejected = sides(empty=(0,))
    seen = observed('learned', chosen, rejected, state=first_state('learned'))
    np.testing.assert_array_equal(seen[:, 0], np.zeros(3))
    assert (seen[:, 1:] > 0).all()


def learned_run(chosen, rejected, steps, rate, dtype=jnp.float64, primary=0):
    def step(state, _):
        seen = observed('learned', chosen, rejected, state=state, primary=primary).mean(axis=-1)
        return weighting.find('learned').update(state, seen, rate=rate), None

    state = {'shares': jnp.full(chosen.reference_logps.shape[0], 1 / chosen.reference_logps.shape[0], dtype)}
    state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=steps))(state)
    assert state['shares'].dtype == dtype
    return np.asarray(weights_of('learned', chosen, rejected, state=state)[:, 0])


def nearly_alike(seed=11, dtype=jnp.float64):
    """Sides whose best mixture holds more than one reference."""
    return (
        side.replace(reference_logps=side.reference_logps * 0.3, policy_logps=side.policy_logps * 0.3)
        for side in sides(seed=seed, dtype=dtype)
    )


@pytest.mark.parametrize('dtype, tolerance', [(jnp.float64, 1e-6), (jnp.float32, 1e-3)])
@pytest.mark.parametrize('rate', [0.1, 1.0])
def test_learned_weights_converge_to_the_fixed_point_of_expectation_maximisation(rate, dtype, tolerance):
    chosen, rejected = nearly_alike(dtype=dtype)
    weights = np.full(3, 1 / 3)
    for _ in range(4000):
        seen = learned_loop(chosen, rejected, weights, 0).sum(axis=-1)
        weights = seen / seen.sum()
    reached = learned_run(chosen, rejected, int(4000 / rate), rate, dtype)
    np.testing.assert_allclose(reached, weights, atol=tolerance)
    assert (np.sort(weights)[-2:] > 0.05).all()


def test_learned_weights_go_with_their_references():
    chosen, rejected = nearly_alike()
    order = [2, 0, 1]
    moved = (side.replace(reference_logps=side.reference_logps[jnp.array(order)]) for side in (chosen, rejected))
    weights, permuted = learned_run(chosen, rejected, 50, 0.1), learned_run(*moved, 50, 0.1, primary=1)
    np.testing.assert_allclose(permuted, weights[order], rtol=1e-10)
    assert np.ptp(weights) > 0.05


@pytest.mark.parametrize('dtype', [jnp.float64, jnp.float32])
def test_identical_references_keep_equal_weights(dtype):
    chosen, rejected = (
        side.replace(reference_logps=jnp.repeat(side.reference_logps, 3, axis=0))
        for side in sides(references=1, dtype=dtype)
    )
    np.testing.assert_allclose(learned_run(chosen, rejected, 300, 0.1, dtype), np.full(3, 1 / 3), rtol=1e-5)


def test_learned_weights_start_towards_the_primary_while_the_policy_is_it():
    chosen, rejected = nearly_alike()
    chosen, rejected = (side.replace(policy_logps=side.reference_logps[1]) for side in (chosen, rejected))
    seen = observed('learned', chosen, rejected, state=first_state('learned'), primary=1)
    np.testing.assert_allclose(seen.sum(axis=0), np.full(4, 2.0), rtol=1e-12)


def test_shares_move_by_the_rate_and_keep_what_normalises_them():
    state = {'shares': jnp.array([0.5, 0.25, 0.25])}
    moved = weighting.find('learned').update(state, jnp.array([0.4, 0.8, 2.8]), rate=0.2)
    np.testing.assert_allclose(moved['shares'], [0.48, 0.36, 0.76], rtol=1e-12)
    weights = weights_of('learned', *sides(), state=moved)
    np.testing.assert_allclose(weights[:, 0], np.array([0.48, 0.36, 0.76]) / 1.6, rtol=1e-12)


@pytest.mark.parametrize('rate', [0.5, 1.0])
def test_a_weight_is_never_lost_for_good(rate):
    entry = weighting.find('learned')
    state = {'shares': jnp.full(2, 0.5, jnp.float32)}
    for _ in range(400):
        state = entry.update(state, jnp.array([1.0, 0.0], jnp.float32), rate=rate)
    assert 0 < state['shares'][1] < 1e-14
    state = entry.update(state, jnp.array([0.0, 1.0], jnp.float32), rate=0.5)
    np.testing.assert_allclose(state['shares'], [0.5, 0.5], rtol=1e-5)


@pytest.mark.parametrize('rate', [0.5, 1.0])
def test_steps_that_see_nothing_leave_the_weights_as_they_are(rate):
    """Completions that the policy has all but ruled out have importance weights that underflow."""
    entry, state = weighting.find('learned'), {'shares': jnp.array([1.2, 0.6, 0.2], jnp.float32)}
    for _ in range(400):
        state = entry.update(state, jnp.zeros(3, jnp.float32), rate=rate)
    weights = weights_of('learned', *sides(dtype=jnp.float32), state=state)[:, 0]
    np.testing.assert_allclose(weights, [0.6, 0.3, 0.1], rtol=1e-4)
    state = entry.update(state, jnp.array([0.0, 0.0, 1e-3], jnp.float32), rate=rate)
    assert weights_of('learned', *sides(dtype=jnp.float32), state=state)[2, 0] > 0.99


@pytest.mark.parametrize('name, nearest', [('arwk', 'arwc'), ('swcw_one_hut', 'swcw_one_hot')])
def test_an_unknown_weighting_names_the_nearest(name, nearest):
    with pytest.raises(InputError, match=f'Did you mean {nearest!r}'):
        weighting.find(name)
