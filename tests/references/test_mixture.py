"""The mixture entry of an objective: its checks, its golden values under DPO, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from references.many import NAMES, golden_sides, sides, sums, without

from jaxpo import losses
from jaxpo.errors import InputError
from jaxpo.losses import scores
from jaxpo.references import mixing, mixture, weighting
from jaxpo.types import Completion

pytestmark = pytest.mark.usefixtures('compiled_quickly')

KEY = jax.random.key(0)
TWO = NAMES[:2]
WEIGHTINGS = sorted(weighting.WEIGHTINGS)
SPECS = [{'weights': weights, 'mix': 'harmonic', 'clip': 'adaptive'} for weights in WEIGHTINGS]
SPECS += [{'weights': 'fixed', 'mix': mix, 'clip': clip} for mix in mixing.MIXES for clip in mixing.CLIPS]
examples = settings(deadline=None, max_examples=15)
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def combined(spec, chosen, rejected, references=NAMES, state=None, key=None):
    made, numbers = mixture.make(spec, references)
    state = mixture.init_state(made) if state is None else state
    return mixture.combine(made, numbers, chosen, rejected, state=state, key=key)


def dpo(chosen, rejected, beta=0.1):
    return losses.find('dpo')(chosen, rejected, beta=beta)[0]


def single(side, k):
    """The side measured against its k-th reference alone."""
    return side.replace(reference_logps=side.reference_logps[k][None])


@pytest.mark.parametrize(
    'spec, value',
    [
        ({'mix': 'harmonic'}, 0.9774136918),
        ({'mix': 'harmonic', 'clip': 'adaptive'}, 0.6727470104),
        ({'mix': 'harmonic', 'clip': 'adaptive', 'order': 'official_code'}, 0.5958178930),
        ({'mix': 'geometric'}, 1.1118262507),
        ({'mix': 'geometric', 'clip': 'adaptive'}, 0.6666397390),
        ({'mix': 'arithmetic'}, 0.9163360163),
        ({'mix': 'arithmetic', 'clip': 'adaptive'}, 0.6311310046),
    ],
)
def test_golden_values_of_mrpo(spec, value):
    made = combined({'weights': 'arwc', **spec}, *golden_sides(), references=TWO)
    np.testing.assert_allclose(dpo(made.chosen, made.rejected), [value], atol=1e-9)
    np.testing.assert_allclose(made.weights[:, 0], [0.2580645161, 0.7419354839], atol=1e-9)


@pytest.mark.parametrize('k, value', [(0, 0.5130152524), (1, 1.3873353251)])
def test_golden_values_of_all_weight_on_one_reference(k, value):
    made = combined({TWO[1 - k]: 0.0}, *golden_sides(), references=TWO)
    np.testing.assert_allclose(dpo(made.chosen, made.rejected), [value], atol=1e-9)


def test_both_orders_are_alike_at_equal_weights():
    one, other = (
        combined({'clip': 'adaptive', 'order': order}, *golden_sides(), references=TWO) for order in mixing.ORDERS
    )
    np.testing.assert_allclose(dpo(one.chosen, one.rejected), dpo(other.chosen, other.rejected), rtol=1e-13)


def test_the_exchanged_weights_fall_on_the_other_reference():
    spec = {'initial': 0.1, 'external': 0.9, 'order': 'official_code'}
    made = combined(spec, *golden_sides(), references=TWO)
    expected = mixing.harmonic(jnp.array([[-42.0], [-35.0]]), jnp.array([[0.9], [0.1]]))
    np.testing.assert_allclose(sums(made.chosen)[0], expected, rtol=1e-13)
    np.testing.assert_allclose(made.weights[:, 0], [0.1, 0.9], rtol=1e-13)


def test_the_clip_has_its_size_and_its_primary():
    made = combined({'clip': 'fixed', 'eps': 0.05, 'primary': 'external'}, *golden_sides(), references=TWO)
    np.testing.assert_allclose(sums(made.many_chosen)[:, 0], [-36.75, -35.0], rtol=1e-13)
    np.testing.assert_allclose(sums(made.many_rejected)[:, 0], [-55.1, -58.0], rtol=1e-13)


@pytest.mark.parametrize('weights', WEIGHTINGS)
@pytest.mark.parametrize('mix', mixing.MIXES)
def test_one_reference_is_dpo_and_stays_untouched(mix, weights):
    chosen, rejected = sides(references=1)
    made = combined({'mix': mix, 'weights': weights}, chosen, rejected, NAMES[:1], key=KEY)
    assert made.chosen is chosen and made.rejected is rejected
    np.testing.assert_array_equal(made.weights, np.ones((1, 4)))
    np.testing.assert_array_equal(made.many_chosen.mixing_weights, np.ones((1, 4)))


def thrice(side):
    return side.replace(reference_logps=jnp.repeat(side.reference_logps, 3, axis=0))


@pytest.mark.parametrize('spec', SPECS, ids=lambda spec: '-'.join(spec.values()))
@jax.enable_x64(False)
def test_identical_references_are_dpo_bit_for_bit_also_of_4000_tokens(spec):
    """In float32, where a completion's log-probability itself is rounded by half a thousandth of a nat."""
    random = np.random.default_rng(0)
    pair = []
    for length in (4000, 2500):
        there = jnp.asarray(np.broadcast_to(np.arange(4000) < length, (2, 4000)), jnp.float32)
        logps = jnp.asarray(-random.exponential(2.0, (2, 4000)), jnp.float32) * there
        pair.append(Completion(logps, logps[None], there))

    @jax.jit
    def of_many(chosen, rejected):
        made = combined(spec, thrice(chosen), thrice(rejected), key=KEY)
        return made[:4], [scores.log_ratio(side) for side in made[:2]]

    for share in (1.0, 1.01):
        moved = [side.replace(policy_logps=side.policy_logps * share) for side in pair]
        made, ratios = of_many(*moved)
        for one, many, side in zip(made[:2], made[2:], moved):
            np.testing.assert_array_equal(one.reference_logps, side.reference_logps)
            np.testing.assert_array_equal(many.reference_logps, thrice(side).reference_logps)
        np.testing.assert_array_equal(ratios, [jax.jit(scores.log_ratio)(side) for side in moved])
        assert np.any(ratios) == (share != 1)


@pytest.mark.parametrize('weights', ['arwc', 'fixed'])
@pytest.mark.parametrize('clip', mixing.CLIPS)
@pytest.mark.parametrize('mix', mixing.MIXES)
@examples
@given(seed=seeds)
def test_the_order_of_references_is_of_no_matter(mix, clip, weights, seed):
    chosen, rejected = sides(seed=seed)
    order = np.random.default_rng(seed).permutation(3)
    spec = {'weights': weights, 'mix': mix, 'clip': clip} | ({'primary': NAMES[1]} if clip != 'none' else {})
    if weights == 'fixed':
        spec |= dict(zip(NAMES, (1.0, 2.0, 0.5)))
    made = combined(spec, chosen, rejected)
    moved = (side.replace(reference_logps=side.reference_logps[order]) for side in (chosen, rejected))
    other = combined(spec, *moved, references=[NAMES[k] for k in order])
    np.testing.assert_allclose(dpo(other.chosen, other.rejected), dpo(made.chosen, made.rejected), rtol=1e-10)
    np.testing.assert_allclose(other.weights, made.weights[order], rtol=1e-12)


@pytest.mark.parametrize('clip', ['adaptive', 'fixed'])
@pytest.mark.parametrize('mix', mixing.MIXES)
def test_without_a_region_it_is_dpo_against_the_primary(mix, clip):
    chosen, rejected = sides()
    spec = {'weights': 'arwc', 'mix': mix, 'clip': clip, 'eps': 0.0, 'primary': NAMES[2]}
    made = combined(spec, chosen, rejected)
    np.testing.assert_allclose(dpo(made.chosen, made.rejected), dpo(single(chosen, 2), single(rejected, 2)), rtol=1e-12)


def test_weights_are_of_references_as_they_are_and_the_mix_of_them_clipped():
    chosen, rejected = sides()
    plain, made = (combined({'weights': 'arwc', 'clip': clip}, chosen, rejected) for clip in ('none', 'fixed'))
    np.testing.assert_array_equal(made.weights, plain.weights)
    held = mixing.clipped(sums(chosen), sums(rejected), 0, 0.1, False)
    for one, many, logps in zip(made[:2], made[2:4], held):
        np.testing.assert_allclose(sums(many), logps, rtol=1e-12)
        np.testing.assert_allclose(sums(one)[0], mixing.harmonic(logps, made.weights), rtol=1e-12)
        np.testing.assert_array_equal(many.mixing_weights, made.weights)
    assert np.abs(sums(plain.chosen) - sums(made.chosen)).max() > 0.1


@pytest.mark.parametrize('mix', mixing.MIXES)
def test_a_reference_without_weight_has_no_say(mix):
    chosen, rejected = sides()
    quiet = combined({'mix': mix, NAMES[1]: 0.0}, chosen, rejected)
    loud = (side.replace(reference_logps=side.reference_logps.at[1].set(-1e4)) for side in (chosen, rejected))
    made = combined({'mix': mix, NAMES[1]: 0}, *loud)
    np.testing.assert_array_equal(dpo(made.chosen, made.rejected), dpo(quiet.chosen, quiet.rejected))


def companion(seed):
    return sides(seed=seed)[1]


def test_companions_are_mixed_with_the_pairs_weights_and_not_clipped():
    chosen, rejected = sides()
    chosen = chosen.replace(companions={'mismatched': companion(7)})
    made = combined({'weights': 'arwc', 'mix': 'arithmetic', 'clip': 'adaptive'}, chosen, rejected)
    mixed = made.chosen.companions['mismatched']
    expected = mixing.arithmetic(jnp.asarray(sums(companion(7))), made.weights)
    np.testing.assert_allclose(sums(mixed)[0], expected, rtol=1e-12)
    np.testing.assert_array_equal(mixed.policy_logps, companion(7).policy_logps)
    assert made.rejected.companions == {}


def test_all_else_of_a_completion_is_left_alone():
    chosen, rejected = sides()
    chosen = chosen.replace(columns={'score': jnp.arange(4.0)}, entropy=jnp.ones((4, 7)), vocabulary=11)
    made = combined({}, chosen, rejected)
    kept = {field.name for field in dataclasses.fields(Completion)} - {'reference_logps'}
    for name in kept:
        mine, given = (jax.tree.leaves(getattr(side, name)) for side in (made.chosen, chosen))
        assert len(mine) == len(given) and all(np.array_equal(*both) for both in zip(mine, given)), name


@pytest.mark.parametrize('spec', SPECS, ids=lambda spec: '-'.join(spec.values()))
def test_references_are_constants_and_the_policys_gradient_is_finite_at_empty_slots(spec):
    pair = sides(empty=(2,))
    pair[1] = without(pair[1], [0])

    @jax.jit
    def total(policies, references):
        chosen, rejected = (
            side.replace(policy_logps=policy, reference_logps=reference)
            for side, policy, reference in zip(pair, policies, references)
        )
        made = combined(spec, chosen, rejected, key=KEY)
        many = sum(side.reference_logps.sum() for side in (made.many_chosen, made.many_rejected))
        return dpo(made.chosen, made.rejected).sum() + many + (made.weights**2).sum()

    values, slopes = jax.value_and_grad(total, argnums=(0, 1))(
        [side.policy_logps for side in pair], [side.reference_logps for side in pair]
    )
    assert np.isfinite(values)
    for policy, reference, side in zip(*slopes, pair):
        np.testing.assert_array_equal(reference, jnp.zeros((3, 4, 7)))
        there = np.asarray(side.weights) > 0
        assert np.isfinite(policy).all() and (policy != 0)[there].all()


def test_dpos_gradient_is_that_of_the_mixed_reference():
    chosen, rejected = sides()
    made = combined({'weights': 'arwc'}, chosen, rejected)

    def outer(policy):
        mixed = combined({'weights': 'arwc'}, chosen.replace(policy_logps=policy), rejected)
        return dpo(mixed.chosen, mixed.rejected).sum()

    def inner(policy):
        return dpo(made.chosen.replace(policy_logps=policy), made.rejected).sum()

    np.testing.assert_allclose(jax.grad(outer)(chosen.policy_logps), jax.grad(inner)(chosen.policy_logps), rtol=1e-12)


def test_a_learned_weight_has_no_gradient_to_the_policy():
    made, numbers = mixture.make({'weights': 'learned'}, NAMES)
    chosen, rejected = sides()

    def seen(policy):
        side = chosen.replace(policy_logps=policy)
        return (mixture.observe(made, numbers, side, rejected, state=mixture.init_state(made)) ** 2).sum()

    assert not np.allclose(seen(chosen.policy_logps), seen(chosen.policy_logps * 2))
    np.testing.assert_array_equal(jax.grad(seen)(chosen.policy_logps), jnp.zeros((4, 7)))


NUMBERS = [
    ({'clip': 'adaptive'}, 'eps', 0.3),
    ({}, 'weight_of/external', 4.0),
    ({'weights': 'tsw'}, 'prior', 500.0),
    ({'weights': 'learned'}, 'rate', 0.7),
]


@pytest.mark.parametrize('spec, name, other', NUMBERS, ids=lambda x: x if isinstance(x, str) else None)
def test_a_new_number_compiles_nothing_and_changes_something(spec, name, other):
    made, numbers = mixture.make(spec, NAMES)
    assert isinstance(numbers[name], float) and hash(made) == hash(mixture.make(spec, NAMES)[0])
    state = mixture.init_state(made)
    if made.weights == 'tsw':
        state = {'successes': jnp.array([0.0, 5.0, 0.0]), 'failures': jnp.zeros(3)}
    compiled = []

    @jax.jit
    def step(numbers, chosen, rejected, state, keys):
        compiled.append(1)

        def one(key):
            mixed = mixture.combine(made, numbers, chosen, rejected, state=state, key=key)
            after = state
            if made.observes == 'step':
                means = mixture.observe(made, numbers, chosen, rejected, state=state).mean(axis=-1)
                after = mixture.update(made, numbers, state, means)
            return dpo(mixed.chosen, mixed.rejected), after

        return jax.vmap(one)(keys)

    chosen, rejected = sides()
    keys = jax.random.split(KEY, 30)
    results = [step(numbers | {name: value}, chosen, rejected, state, keys) for value in (numbers[name], other)]
    assert len(compiled) == 1
    assert not all(np.allclose(*pair) for pair in zip(*map(jax.tree.leaves, results)))


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_states_keep_their_shapes_and_types_through_a_run(name):
    with jax.enable_x64(False):
        made, numbers = mixture.make({'weights': name}, NAMES)
        chosen, rejected = sides(dtype=jnp.float32)
        state = mixture.init_state(made)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state))
        seen = mixture.observe(made, numbers, chosen, rejected, state=state)
        assert (seen is None) == (made.observes in ('nothing', 'reward'))
        after = mixture.update(made, numbers, state, jax.tree.map(lambda x: x.mean(axis=-1), seen))
        after = mixture.rewarded(made, numbers, after, KEY, 1.0)
        shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), each) for each in (state, after)]
        assert shapes[0] == shapes[1]
        changed = jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), state, after))
        assert any(changed) == (made.observes != 'nothing')


def test_a_reward_goes_to_the_reference_that_the_steps_key_drew():
    made, numbers = mixture.make({'weights': 'tsw'}, NAMES)
    chosen, rejected = sides()
    state = mixture.init_state(made)
    for key in jax.random.split(KEY, 8):
        mixed = mixture.combine(made, numbers, chosen, rejected, state=state, key=key)
        after = mixture.rewarded(made, numbers, state, key, 1.0)
        np.testing.assert_array_equal(after['successes'] - state['successes'], mixed.weights[:, 0])
        k = int(mixed.weights[:, 0].argmax())
        np.testing.assert_array_equal(dpo(mixed.chosen, mixed.rejected), dpo(single(chosen, k), single(rejected, k)))
        state = after


def test_mixtures_do_not_couple_pairs():
    for name in WEIGHTINGS:
        made, numbers = mixture.make({'weights': name, 'clip': 'adaptive'}, NAMES)
        chosen, rejected = sides()
        whole = mixture.combine(made, numbers, chosen, rejected, state=mixture.init_state(made), key=KEY)

        def first(side):
            return Completion(side.policy_logps[:1], side.reference_logps[:, :1], side.weights[:1])

        alone = mixture.combine(made, numbers, first(chosen), first(rejected), state=mixture.init_state(made), key=KEY)
        np.testing.assert_allclose(alone.chosen.reference_logps, whole.chosen.reference_logps[:, :1], rtol=1e-12)


def test_make_gives_words_apart_from_numbers():
    made, numbers = mixture.make({'weights': 'swcw', 'window': 3, 'clip': 'fixed', 'primary': 'third'}, NAMES)
    assert made == mixture.Mixture(NAMES, 'harmonic', 'swcw', 'fixed', 'paper', 2, (('window', 3),))
    assert numbers == {'eps': 0.1} and made.observes == 'step'
    assert mixture.init_state(made)['window'].shape == (3, 3)
    made, numbers = mixture.make({'external': 3}, TWO)
    assert numbers == {'weight_of/initial': 1.0, 'weight_of/external': 3.0}
    assert mixture.init_state(made) == {}


@pytest.mark.parametrize('weights', WEIGHTINGS)
@pytest.mark.parametrize('references', [NAMES[:1], TWO, NAMES])
@pytest.mark.parametrize('clip', ['none', 'adaptive'])
def test_what_is_spelled_out_makes_the_same_mixture(weights, references, clip):
    spec = {'weights': weights, 'clip': clip}
    full = mixture.spelled_out(spec, references)
    assert mixture.make(full, references) == mixture.make(spec, references)
    assert ('eps' in full) == (clip != 'none') and ('order' in full) == (len(references) == 2)
    reads_primary = clip != 'none' or weights in ('learned', 'swcw_one_hot', 'tsw')
    assert full.get('primary') == ('initial' if reads_primary else None)
    assert mixture.spelled_out(full, references) == full


def test_spelled_out_names_every_default():
    assert mixture.spelled_out({'clip': 'adaptive', 'external': 2.0}, TWO) == {
        'mix': 'harmonic',
        'weights': 'fixed',
        'clip': 'adaptive',
        'eps': 0.1,
        'order': 'paper',
        'primary': 'initial',
        'initial': 1.0,
        'external': 2.0,
    }
    assert mixture.spelled_out({'weights': 'tsw'}, NAMES)['prior'] == 5.0
    assert mixture.spelled_out({'weights': 'arwc'}, NAMES)['confidence'] == 'sum'


REFUSED = [
    ({'mixx': 'harmonic'}, NAMES, "Did you mean 'mix'"),
    ({'mix': 'harmonics'}, NAMES, "Did you mean 'harmonic'"),
    ({'weights': 'arwk'}, NAMES, "Did you mean 'arwc'"),
    ({'clip': 'adaptiv'}, NAMES, "Did you mean 'adaptive'"),
    ({'order': 'official'}, TWO, "Did you mean 'official_code'"),
    ({'primary': 'externa', 'clip': 'fixed'}, NAMES, "Did you mean 'external'"),
    ({'primary': 'externa', 'weights': 'learned'}, NAMES, "Did you mean 'external'"),
    ({'primary': 'external'}, NAMES, 'primary has no effect: no clip is around it, and the weights fixed'),
    ({'primary': 'initial', 'weights': 'arwc', 'clip': 'none'}, NAMES, 'primary has no effect'),
    ({'externl': 1.0}, NAMES, "Did you mean 'external'"),
    ({'weights': 'arwc', 'confidence': 'means'}, NAMES, "Did you mean 'mean'"),
    ({'weights': 'arwc', 'window': 2}, NAMES, "Unknown key of objective.mixture 'window'"),
    ({'eps': 0.2}, NAMES, 'add clip'),
    ({'clip': 'none', 'eps': 0.2}, NAMES, 'add clip'),
    ({'clip': 'fixed', 'eps': 1.5}, NAMES, 'objective.mixture.eps is at least 0 and at most 1, not 1.5'),
    ({'clip': 'fixed', 'eps': -0.1}, NAMES, 'objective.mixture.eps'),
    ({'clip': 'fixed', 'eps': 'wide'}, NAMES, 'finite number'),
    ({'weights': 'arwc', 'external': 0.5}, NAMES, "weights is 'arwc'"),
    ({'external': -1.0}, NAMES, 'objective.mixture.external is at least 0'),
    ({'external': True}, NAMES, 'finite number'),
    ({'initial': 0, 'external': 0, 'third': 0.0}, NAMES, 'every fixed weight is 0'),
    ({'order': 'official_code'}, NAMES, 'two references'),
    ({'order': 'official_code', 'mix': 'geometric'}, TWO, 'two references'),
    ({'weights': 'swcw', 'window': 0}, NAMES, 'objective.mixture.window is at least 1'),
    ({'weights': 'swcw', 'window': 1.5}, NAMES, 'whole number'),
    ({'weights': 'tsw', 'prior': 0.0}, NAMES, 'objective.mixture.prior is above 0'),
    ({'weights': 'learned', 'rate': 1.1}, NAMES, 'objective.mixture.rate is above 0 and at most 1'),
    ({'weights': 'learned', 'rate': 0}, NAMES, 'objective.mixture.rate'),
    ({}, ('initial', 'mix'), "named 'mix'"),
    ({}, ('initial', 'eps'), "named 'eps'"),
    ({'weights': 'tsw'}, ('initial', 'prior'), "named 'prior'"),
    ({}, (), 'no reference'),
]


@pytest.mark.parametrize('spec, references, message', REFUSED)
def test_what_makes_no_sense_is_refused(spec, references, message):
    with pytest.raises(InputError, match=message):
        mixture.make(spec, references)
