"""Theorems of the mutual-information view: each prior recovers its method, and is what it says it is."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import losses
from jaxpo.errors import InputError
from jaxpo.losses import contract, links, priors
from jaxpo.losses.priors import PRIORS, mi
from jaxpo.types import Completion

NAMES = sorted(PRIORS)
OF_POLICY = ('policy_logps', 'forward_kl', 'reverse_kl')  # what changes with the policy
SHARED_FORMULA = {'DICE': 'dpo'}  # methods that are a registered loss on data of their own
ALPHAS = {'beta': lambda beta, **_: beta, 'alpha * beta': lambda beta, alpha, **_: alpha * beta}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def direct(entry):
    """The registered loss that a prior recovers."""
    return losses.find(SHARED_FORMULA.get(entry.recovers, entry.recovers))


def given_to(entry, scale=1.0):
    """Hyperparameters of the direct loss: its defaults times `scale`, what stands outside the margin 0."""
    defaults = direct(entry).hyperparameters(entry.words)
    numbers = {name: value * scale for name, value in defaults.items() if not isinstance(value, str)}
    return numbers | dict.fromkeys(entry.outside, 0.0) | dict(entry.words)


def matched(entry, given):
    """Hyperparameters of `mi` for those of the direct loss."""
    inside = {k: v for k, v in given.items() if not isinstance(v, str) and k not in entry.outside}
    return entry.matching(**inside)


def sample_of(entry, dtype=jnp.float64, seed=0):
    return contract.example(direct(entry), entry.words, seed, dtype)


def direct_total(entry, sample, given):
    def scalar(chosen, rejected):
        return contract.losses_of(direct(entry), dataclasses.replace(sample, chosen=chosen, rejected=rejected), given)[
            0
        ].sum()

    return scalar


def with_prior(function, alpha, hyperparameters):
    """`mi` once more, with a prior that is not registered."""

    def scalar(chosen, rejected):
        scores = [
            (side.weights * (side.policy_logps - function(side, other, alpha, **hyperparameters))).sum(axis=-1)
            for side, other in ((chosen, rejected), (rejected, None))
        ]
        return links.logistic(alpha * (scores[0] - scores[1])).sum()

    return scalar


def gradients(scalar, sample):
    """Every slope of a scalar: in log-probabilities, statistics, masks, columns, all but which tokens count."""
    found = jax.grad(scalar, argnums=(0, 1))(sample.chosen, sample.rejected)
    return tuple(side.replace(weights=jnp.zeros_like(side.weights)) for side in found)


def alike(ours, theirs):
    return all(
        np.allclose(x, y, rtol=1e-10, atol=1e-13) for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs))
    )


@pytest.mark.parametrize('scale', [1.0, 1.7])
@pytest.mark.parametrize('name', NAMES)
def test_a_prior_recovers_its_method_in_value_and_gradient(double, name, scale):
    entry = PRIORS[name]
    sample, given = sample_of(entry), given_to(entry, scale)
    values, _ = contract.losses_of(direct(entry), sample, given)
    recovered, _ = mi(sample.chosen, sample.rejected, prior=name, **matched(entry, given))
    np.testing.assert_allclose(recovered, values, rtol=1e-11)

    def total(chosen, rejected):
        return mi(chosen, rejected, prior=name, **matched(entry, given))[0].sum()

    theirs = gradients(direct_total(entry, sample, given), sample)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-13), gradients(total, sample), theirs)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(theirs))


@pytest.mark.parametrize('name', NAMES)
def test_the_defaults_and_alpha_are_those_of_the_method(name):
    entry = PRIORS[name]
    own = losses.find('mi').hyperparameters({'prior': name} if name in priors.CHOICES else {})
    given = given_to(entry)
    expected = matched(entry, given)
    assert expected.pop('alpha') == ALPHAS[entry.alpha](**given)
    if name in priors.CHOICES:
        assert expected == {key: value for key, value in own.items() if key not in ('alpha', 'prior')}
    else:
        assert not expected


@pytest.mark.parametrize('name', NAMES)
def test_a_stop_gradient_on_zeta_keeps_the_gradient_exactly_where_zeta_does_not_depend_on_the_policy(double, name):
    entry = PRIORS[name]
    sample, given = sample_of(entry), given_to(entry)
    own = matched(entry, given)
    alpha = own.pop('alpha')

    def stopped(*arguments, **hyperparameters):
        return jax.lax.stop_gradient(entry.function(*arguments, **hyperparameters))

    theirs, ours = gradients(direct_total(entry, sample, given), sample), {}
    for which, function in (('as it is', entry.function), ('stopped', stopped)):
        scalar = with_prior(function, alpha, own)
        np.testing.assert_allclose(
            scalar(sample.chosen, sample.rejected), direct_total(entry, sample, given)(sample.chosen, sample.rejected)
        )
        ours[which] = gradients(scalar, sample)

    def of_policy(found):
        return [getattr(side, field) for side in found for field in OF_POLICY if getattr(side, field) is not None]

    assert alike(of_policy(ours['as it is']), of_policy(theirs))
    assert alike(of_policy(ours['stopped']), of_policy(theirs)) == (not entry.depends_on_policy)


@pytest.mark.parametrize('name', NAMES)
def test_a_part_of_zeta_is_stopped_exactly_if_the_prior_says_so(double, name):
    """Slopes against finite differences: they part where something is held constant, on the chosen side alone."""
    entry = PRIORS[name]
    sample, own = sample_of(entry), matched(entry, given_to(entry))
    alpha = own.pop('alpha')
    parts = {}
    for label, side, other in (('chosen', sample.chosen, sample.rejected), ('rejected', sample.rejected, None)):
        for field in (field for field in OF_POLICY if getattr(side, field) is not None):

            def total(values, side=side, other=other, field=field):
                moved = side.replace(**{field: values})
                return (side.weights * entry.function(moved, other, alpha, **own)).sum()

            values, step = getattr(side, field), 1e-4 * jnp.ones_like(getattr(side, field))
            difference = total(values + step) - total(values - step)
            slope = (jax.grad(total)(values) * 2 * step).sum()
            parts[label, field] = not np.allclose(difference, slope, rtol=1e-6, atol=1e-10)
    assert not any(stopped for (label, _), stopped in parts.items() if label == 'rejected')
    assert any(parts.values()) == bool(entry.stopped)


def test_simpo_with_zeta_stopped_is_wrong_by_the_length(double):
    sample = sample_of(PRIORS['simpo'])
    chosen = sample.chosen.replace(weights=jnp.ones_like(sample.chosen.weights).at[:, 6].set(0.0))

    def slope(function):
        return jax.grad(with_prior(function, 2.0, {}))(chosen, sample.rejected).policy_logps

    right = slope(PRIORS['simpo'].function)
    wrong = slope(lambda *arguments: jax.lax.stop_gradient(PRIORS['simpo'].function(*arguments)))
    np.testing.assert_allclose(wrong, 6.0 * right, rtol=1e-12)
    assert (right[:, :6] < 0).all()


def test_tdpo2_without_its_stop_has_the_value_and_not_the_gradient(double):
    """Its gradient is then that of TDPO1, where the divergence weighs 1."""
    entry = PRIORS['tdpo2']
    sample, given = sample_of(entry), {'beta': 0.1, 'alpha': 1.0}

    def unstopped(side, preferred_to, alpha):
        return entry.function(side, None, alpha, divergence_weight=1.0)

    free, theirs = with_prior(unstopped, 0.1, {}), direct_total(entry, sample, given)
    sides = (sample.chosen, sample.rejected)
    np.testing.assert_allclose(free(*sides), theirs(*sides), rtol=1e-12)
    free_chosen, free_rejected = gradients(free, sample)
    chosen, rejected = gradients(theirs, sample)
    assert not np.any(chosen.forward_kl) and np.any(free_chosen.forward_kl)
    np.testing.assert_allclose(free_rejected.forward_kl, rejected.forward_kl, rtol=1e-12)
    first = gradients(direct_total(PRIORS['tdpo1'], sample, {'beta': 0.1}), sample)
    np.testing.assert_allclose(free_chosen.forward_kl, first[0].forward_kl, rtol=1e-12)


def test_at_equal_lengths_simpo_without_gamma_has_a_uniform_prior(double):
    sample = contract.example(losses.find('simpo'), {})
    five = jnp.broadcast_to(jnp.arange(contract.TOKENS) < 5, sample.chosen.weights.shape).astype(jnp.float64)
    sides = [side.replace(weights=five) for side in (sample.chosen, sample.rejected)]
    values, _ = losses.find('simpo')(*sides, beta=2.0, gamma=0.0)
    np.testing.assert_allclose(mi(*sides, prior='uniform', alpha=2.0 / 5)[0], values, rtol=1e-12)
    unequal, _ = losses.find('simpo')(sample.chosen, sample.rejected, beta=2.0, gamma=0.0)
    assert not np.allclose(mi(sample.chosen, sample.rejected, prior='uniform', alpha=2.0 / 5)[0], unequal)


@pytest.mark.parametrize('name', sorted(set(NAMES) - {'uniform', 'simpo', 'h_dpo', 'r_dpo', 'odpo'}))
def test_a_policy_equal_to_its_reference_earns_exactly_nothing(name):
    sample = sample_of(PRIORS[name], jnp.float32, seed=3)

    def same(side):
        still = {field: jnp.zeros_like(side.weights) for field in ('forward_kl', 'reverse_kl')}
        return side.replace(reference_logps=side.policy_logps[None], **still)

    _, rewards = mi(same(sample.chosen), same(sample.rejected), prior=name, alpha=0.3)
    assert not np.any(rewards.chosen) and not np.any(rewards.rejected)


# A finite world: every completion of at most three of three tokens, of which token 0 ends one.
VOCABULARY, END, LONGEST = 3, 0, 3


def enumerated():
    """All completions that end, or are as long as they may be."""
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(VOCABULARY), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == LONGEST):
                yield tokens


WORLD = list(enumerated())


class Model:
    """Random distributions of the next token, one for each prefix."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        lengths = range(LONGEST)
        prefixes = [prefix for length in lengths for prefix in itertools.product(range(VOCABULARY), repeat=length)]
        self.logps = {prefix: np.log(random.dirichlet(np.ones(VOCABULARY))) for prefix in prefixes}

    def of(self, function):
        """[N, LONGEST]: `function(log-probabilities behind the prefix, prefix, token)` of the world's tokens."""
        table = np.zeros((len(WORLD), LONGEST))
        for row, tokens in enumerate(WORLD):
            for place, token in enumerate(tokens):
                table[row, place] = function(self.logps[tokens[:place]], tokens[:place], token)
        return jnp.asarray(table)

    def by_token(self):
        return self.of(lambda logps, prefix, token: logps[token])

    def divergence(self, other):
        return self.of(lambda logps, prefix, token: np.exp(logps) @ (logps - other.logps[prefix]))


def world(policy, score=0.0):
    """All completions under a policy, with all that a prior may ask for; everything but the policy is the same."""
    reference, random = Model(1), np.random.default_rng(2)

    def noise(*shape):
        return jnp.asarray(random.uniform(0.1, 0.9, (*shape, len(WORLD), LONGEST)))

    return Completion(
        policy.by_token(),
        reference.by_token()[None],
        policy.of(lambda *_: 1.0),
        forward_kl=reference.divergence(policy),
        reverse_kl=policy.divergence(reference),
        activations={'mlp': noise(2)},
        masks={'reward': noise(), 'kl': noise()},
        model_logps={'positive': Model(5).by_token(), 'negative': Model(6).by_token()},
        columns={'score': score + noise()[:, 0], 'token_weight': noise()},
    )


def log_zeta(entry, completion, chosen):
    """log zeta of every completion of the world, as the chosen one or as the rejected one."""
    own = matched(entry, given_to(entry))
    alpha = own.pop('alpha')
    other = world(Model(9), score=-3.0) if chosen else None
    return (completion.weights * entry.function(completion, other, alpha, **own)).sum(axis=-1)


def test_the_world_is_all_there_is(double):
    """Policy and reference are distributions over it, and their KLs per token are those of their distributions."""
    completions = world(Model(0))
    for logps in (completions.policy_logps, completions.reference_logps[0]):
        np.testing.assert_allclose(jnp.exp((completions.weights * logps).sum(axis=-1)).sum(), 1.0, rtol=1e-12)
    mass = jnp.exp((completions.weights * completions.policy_logps).sum(axis=-1))
    ratio = (completions.weights * (completions.policy_logps - completions.reference_logps[0])).sum(axis=-1)
    by_token = (completions.weights * completions.reverse_kl).sum(axis=-1)
    np.testing.assert_allclose((mass * ratio).sum(), (mass * by_token).sum(), rtol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_zeta_is_normalised_exactly_if_it_says_so(double, name):
    entry = PRIORS[name]
    masses = [np.exp(log_zeta(entry, world(Model(0)), chosen)).sum() for chosen in (True, False)]
    assert np.allclose(masses, 1.0, rtol=1e-12) == entry.normalised
    assert np.isfinite(masses).all()


@pytest.mark.parametrize('name', NAMES)
def test_zeta_depends_on_the_policy_exactly_if_it_says_so(double, name):
    """Up to a factor for the whole prompt, which cancels in the pair."""
    entry = PRIORS[name]
    for chosen in (True, False):
        change = log_zeta(entry, world(Model(0)), chosen) - log_zeta(entry, world(Model(7)), chosen)
        assert (np.ptp(change) > 1e-3) == entry.depends_on_policy
        assert entry.depends_on_policy or not np.any(change)


@pytest.mark.parametrize('name', NAMES)
def test_zeta_reads_the_reference_exactly_if_it_says_so(double, name):
    completion = world(Model(0))
    other = completion.replace(reference_logps=completion.reference_logps - 0.5)
    same = np.array_equal(*(log_zeta(PRIORS[name], each, True) for each in (completion, other)))
    assert same == (not PRIORS[name].reads_reference)


@pytest.mark.parametrize('name', NAMES)
def test_zeta_depends_on_the_label_exactly_if_it_says_so(double, name):
    """In its value or, where a part is stopped, in its slope."""
    entry = PRIORS[name]

    def slopes(chosen):
        slope = jax.grad(lambda completion: log_zeta(entry, completion, chosen).sum())(world(Model(0)))
        return [getattr(slope, field) for field in OF_POLICY]

    values = [log_zeta(entry, world(Model(0)), chosen) for chosen in (True, False)]
    same = np.allclose(*values, rtol=1e-12) and alike(slopes(True), slopes(False))
    assert same == (not entry.depends_on_label)


def test_the_genuine_priors_are_few():
    genuine = {name for name in NAMES if PRIORS[name].genuine}
    assert genuine == {'dpo', 'dice', 'h_dpo', 'r_dpo', 'uniform'}
    assert {name for name in genuine if PRIORS[name].normalised} == {'dpo', 'dice'}


def test_descent_on_a_free_prior_takes_mass_from_the_chosen(double):
    """The loss falls without bound, the policy untouched: why a prior must not be trained on it."""
    sample = contract.example(losses.find('mi'), {})
    sides = [side.replace(masks={'log_zeta': side.reference_logps[0]}) for side in (sample.chosen, sample.rejected)]
    scalar = with_prior(lambda side, preferred_to, alpha: side.masks['log_zeta'], 0.1, {})
    slopes = [side.masks['log_zeta'] for side in jax.grad(scalar, argnums=(0, 1))(*sides)]
    assert (slopes[0][sides[0].weights > 0] > 0).all() and (slopes[1][sides[1].weights > 0] < 0).all()
    lowered = sides[0].replace(masks={'log_zeta': sides[0].masks['log_zeta'] - 1e4})
    assert scalar(lowered, sides[1]) < 1e-12


def test_the_table_shows_every_prior():
    head, _, *rows = priors.unification_table().splitlines()
    assert len(rows) == len(PRIORS)
    for row, entry in zip(rows, PRIORS.values()):
        assert row.count('|') == head.count('|')
        assert entry.recovers in row and f'`{entry.formula}`' in row and entry.summary.rstrip('.') in row
        assert ('a prior' in row.replace('not a prior', '')) == entry.genuine


def test_an_objective_names_a_prior_and_its_hyperparameters():
    entry = losses.find('mi')
    entry.check({'prior': 'simpo', 'gamma': 1.0, 'alpha': 2.0})
    with pytest.raises(InputError, match='gamma'):
        entry.check({'prior': 'dpo', 'gamma': 1.0})
    with pytest.raises(InputError, match="'tdpo'. Did you mean 'tdpo[12]'"):
        entry.check({'prior': 'tdpo'})
    assert entry.needs_of({'prior': 'tdpo2'}).statistics == ('forward_kl',)
    assert entry.needs_of({'prior': 'odpo'}).completion_columns == ('score',)
    assert entry.needs_of({}) == losses.Needs()
    with pytest.raises(InputError, match="'sparse_po'"):
        entry.check({'prior': 'sparse_po'})  # nobody would train its masks
    sample = contract.example(entry, {}, dtype=jnp.float32)
    with pytest.raises(InputError, match="Did you mean 'simpo'"):
        mi(sample.chosen, sample.rejected, prior='sinpo')


def test_a_prior_of_ones_own_is_a_choice_at_once():
    try:

        @priors.prior('nothing known', depends_on_policy=False)
        def halved(completion, preferred_to, alpha, *, share: float = 0.5):
            """Part of the reference.

            share * log_ref
            """
            return share * completion.reference_logps[0]

        losses.find('mi').check({'prior': 'halved', 'share': 0.25})
        sample = contract.example(losses.find('mi'), {}, dtype=jnp.float32)
        values, _ = losses.find('mi')(sample.chosen, sample.rejected, prior='halved', alpha=0.1, share=1.0)
        np.testing.assert_array_equal(values, mi(sample.chosen, sample.rejected)[0])
        assert '`nothing known`' in priors.unification_table()
    finally:
        for table in (PRIORS, priors.CHOICES):
            table.pop('halved', None)


def test_a_name_is_registered_once():
    with pytest.raises(InputError, match="'dpo' is registered already"):

        @priors.prior('elsewhere')
        def dpo(completion, preferred_to, alpha):
            """Another.

            0
            """
