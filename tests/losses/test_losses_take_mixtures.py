"""Every loss that takes one reference takes many: behind a mixture it is itself against the mix, made here by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import losses, objective
from jaxpo.losses import contract
from jaxpo.references import mixing

THREE = ('initial', 'external', 'third')
GIVEN = (1.0, 3.0, 0.5)
SHARES = np.array(GIVEN) / sum(GIVEN)
OF_REFERENCES = ('forward_kl', 'reverse_kl', 'reference_entropy')
PAIR_WEIGHT = (1.0, 0.7, 0.0, 1.3)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def words_of(entry):
    """The defaults, and every other choice of a structural word."""
    return [given for given in contract.settings(entry) if all(isinstance(value, str) for value in given.values())]


def made_of(name, given, mix):
    roles = losses.find(name).needs_of(given).models
    spec = {'mixture': {'mix': mix, **dict(zip(THREE, GIVEN))}, name: {**given, 'weight': 0.5}}
    return objective.make(spec, (*THREE, *roles))


def measured(name, given):
    """Whether the loss measures the policy against references that are mixed."""
    roles = losses.find(name).needs_of(given).models
    made = objective.make({name: given}, ('initial', *roles))
    return made.runs_references and not losses.find(name).many_references


CASES = [
    (name, given) for name in sorted(losses.LOSSES) for given in words_of(losses.find(name)) if measured(name, given)
]


def with_three_references(side, random):
    """The side with two further references, and what each reference says for itself."""
    shape = side.weights.shape

    def three():
        return jnp.asarray(random.exponential(1.5, (3, *shape)))

    by_reference = {name: three() for name in OF_REFERENCES if getattr(side, name) is not None}
    return side.replace(
        reference_logps=-three(),
        by_reference=by_reference,
        companions={name: with_three_references(other, random) for name, other in side.companions.items()},
        **dict.fromkeys(by_reference),
    )


def mixed_by_numpy(side, mix, spread=None):
    """The side with the one reference that the mix of three is; `spread` `[B, C]`, sum 1, in place of evenly."""
    weights, logps = np.asarray(side.weights), np.asarray(side.reference_logps)
    sums, shares = (weights * logps).sum(axis=-1), SHARES[:, None]
    sequence = {
        'harmonic': lambda: -np.log((shares / np.exp(sums)).sum(axis=0)),
        'geometric': lambda: (shares * sums).sum(axis=0),
        'arithmetic': lambda: np.log((shares * np.exp(sums)).sum(axis=0)),
    }[mix]()
    tokens = (SHARES[:, None, None] * logps).sum(axis=0)
    missing = sequence - (weights * tokens).sum(axis=-1)
    spread = weights / weights.sum(axis=-1, keepdims=True) if spread is None else spread
    tokens = np.where(weights > 0, tokens + missing[:, None] * spread, 0)
    statistics = {
        name: jnp.asarray((SHARES[:, None, None] * np.asarray(each)).sum(axis=0))
        for name, each in side.by_reference.items()
    }
    return side.replace(
        reference_logps=jnp.asarray(tokens)[None],
        by_reference={},
        companions={name: mixed_by_numpy(other, mix) for name, other in side.companions.items()},
        **statistics,
    )


def on_the_first_token(side):
    return np.eye(contract.TOKENS)[np.zeros(contract.PAIRS, int)] * np.asarray(side.weights)


def sample_of(name, given):
    sample, random = contract.example(losses.find(name), given), np.random.default_rng(7)
    return contract.replaced(
        sample, *(with_three_references(side, random) for side in (sample.chosen, sample.rejected))
    )


def through_the_objective(made, sample, policies, by_reference):
    """Half of the loss (its weight is 0.5), metrics, and the running state after the step."""
    (term,) = made.terms
    chosen, rejected = (
        side.replace(**policy, by_reference=each)
        for side, policy, each in zip((sample.chosen, sample.rejected), policies, by_reference)
    )
    counts, extra, name = objective.counts_of(chosen.weights, rejected.weights), sample.extra, term.loss.name
    state = {name: extra['state']} if 'state' in extra else {}
    state = objective.update_state(made, made.hyperparameters, state, chosen, rejected, key=extra['key'])
    total, metrics = objective.evaluate(
        made,
        made.hyperparameters,
        chosen,
        rejected,
        jnp.array(PAIR_WEIGHT),
        counts,
        state=state,
        params={name: extra['params']} if 'params' in extra else {},
        key=extra['key'],
    )
    return total, (metrics, state)


def alone(made, sample, policies, by_reference, mix, spread=lambda side: None):
    """As above, by the loss itself on completions that have one reference."""
    (term,) = made.terms
    sides = [
        mixed_by_numpy(side.replace(by_reference=jax.lax.stop_gradient(each)), mix, spread(side)).replace(**policy)
        for side, policy, each in zip((sample.chosen, sample.rejected), policies, by_reference)
    ]
    # Divergences are differentiated through: the plain weighted mean, by hand.
    sides = [
        side.replace(**{name: sum(share * one for share, one in zip(SHARES, values)) for name, values in each.items()})
        for side, each in zip(sides, by_reference)
    ]
    counts, extra = objective.counts_of(sides[0].weights, sides[1].weights), dict(sample.extra)
    numbers = {key: value for key, value in made.hyperparameters[term.loss.name].items() if key != 'weight'}
    numbers |= dict(term.choices)
    state = {}
    if term.loss.init_state:
        frozen = jax.lax.stop_gradient(sides)
        extra['state'] = state[term.loss.name] = term.loss.updated(extra['state'], *frozen, **numbers)
    extra['key'] = jax.random.fold_in(extra['key'], 0)
    values, rewards = term.loss(*sides, **extra, **numbers)
    return 0.5 * (values * jnp.array(PAIR_WEIGHT)).sum() / counts[term.loss.normaliser], (rewards, state)


def everything(function, made, sample, *more):
    """The value, its gradients by all that is differentiated, and the rest."""
    sides = (sample.chosen, sample.rejected)
    policies = [
        {
            name: getattr(side, name)
            for name in contract.DIFFERENTIATED
            if name not in OF_REFERENCES and getattr(side, name) is not None
        }
        for side in sides
    ]
    by_reference = [side.by_reference for side in sides]
    (value, rest), gradient = jax.value_and_grad(
        lambda *given: function(made, sample, *given, *more), argnums=(0, 1), has_aux=True
    )(policies, by_reference)
    return value, gradient, rest


@pytest.mark.parametrize('mix', mixing.MIXES)
@pytest.mark.parametrize('name, given', CASES, ids=lambda x: x if isinstance(x, str) else '-'.join(x.values()) or None)
def test_behind_a_mixture_a_loss_is_itself_against_the_mix(name, given, mix):
    made, sample = made_of(name, given, mix), sample_of(name, given)
    value, gradient, (metrics, state) = everything(through_the_objective, made, sample)
    expected, slopes, (rewards, moments) = everything(alone, made, sample, mix)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    scale = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(slopes))
    assert scale > 0
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12 * scale)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(moments), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    margins = np.asarray((rewards.chosen - rewards.rejected) * jnp.array(PAIR_WEIGHT)).sum() / contract.PAIRS
    np.testing.assert_allclose(metrics['rewards/margins'], margins, rtol=1e-9, atol=1e-12)


BY_TOKEN = {'ld_dpo', 'mapo', 'sdpo', 'sparse_po', 'tis_dpo', 'token_weighted_dpo'}


@pytest.mark.parametrize('name', sorted({name for name, _ in CASES}))
def test_where_the_correction_lies_matters_only_to_losses_that_read_tokens(name):
    made, sample = made_of(name, {}, 'harmonic'), sample_of(name, {})
    value, gradient, _ = everything(alone, made, sample, 'harmonic')
    moved, slopes, _ = everything(alone, made, sample, 'harmonic', on_the_first_token)
    same = np.isclose(moved, value, rtol=1e-10) and all(
        np.allclose(*both, rtol=1e-9, atol=1e-12) for both in zip(jax.tree.leaves(gradient), jax.tree.leaves(slopes))
    )
    assert same == (name not in BY_TOKEN)
