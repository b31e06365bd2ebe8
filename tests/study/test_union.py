"""Many objectives in one program: each is, by numbers alone, what it is by itself, whatever stands beside it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import losses
from jaxpo import objective as objectives
from jaxpo.errors import InputError
from jaxpo.losses import Needs, contract
from jaxpo.study.union import joins, traced, union
from jaxpo.types import Rewards

KEY = 7


pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def only_numbers(name):
    """Settings of a loss whose words are the default ones: words are never traced."""
    entry = losses.find(name)
    for given in contract.settings(entry):
        if not any(isinstance(value, str) for value in given.values()):
            try:
                entry.check(given)
                yield given
            except InputError:  # a number grown out of its range
                yield {key: entry.defaults[key] / 2 for key in given}


def made(spec, references=('initial',)):
    roles = {role for name, given in spec.items() if name != 'mixture' for role in roles_of(name, given)}
    return objectives.make(spec, (*references, *sorted(roles)))


def roles_of(name, given):
    return losses.find(name).needs_of({key: value for key, value in given.items() if key != 'weight'}).models


def partner_of(name):
    """A loss that any objective with this one may have too, without asking for more of the data."""
    return 'apo_zero' if losses.find(name).takes_unpaired else 'sipo' if name == 'dpo' else 'dpo'


def objectives_of(name):
    """A loss by itself at every setting of its numbers; one that asks for more, beside another too."""
    yield from (made({name: given}) for given in only_numbers(name))
    entry = losses.find(name)
    asks = entry.needs_of({}) != Needs() or entry.couples_batch or name in ('multi_dpo', 'sft')
    if asks and not entry.token_masks:
        both = [(name, {'weight': 0.3}), (partner_of(name), {'weight': 1.7})]
        yield made(dict(both if len(name) % 2 else reversed(both)))


def unions():
    """All of these, those together that can be."""
    found = []
    for name in sorted(losses.LOSSES):
        for objective in objectives_of(name):
            home = next((members for members in found if joins(objective, members)), None)
            if home is None:
                found.append([objective])
            else:
                home.append(objective)
    return found


UNIONS = unions()


def sides_of(objective):
    """Pairs with all that an objective needs, by the contract of its neediest loss."""
    entries = [term.loss for term in objective.terms if not term.loss.many_references]
    entry = max(entries, key=lambda entry: len(str(entry.needs_of({}))))
    sample = contract.example(entry, {})
    return sample.chosen, sample.rejected


def parts_of(objective):
    """Running state and trained parts of an objective's losses."""
    samples = {term.loss.name: contract.example(term.loss, {}).extra for term in objective.terms}
    return (
        {name: extra['state'] for name, extra in samples.items() if 'state' in extra},
        {name: extra['params'] for name, extra in samples.items() if 'params' in extra},
    )


def in_double(numbers):
    """As a program gets them: of float32's values."""
    return jax.tree.map(lambda value: value if isinstance(value, np.int32) else np.float64(np.float32(value)), numbers)


@functools.partial(jax.jit, static_argnums=0)
def step(objective, numbers, sides, state, params):
    """Loss, gradients by pairs and trained parts, metrics, numbers by pair and state of a step."""
    weight, key = jnp.ones(contract.PAIRS), jax.random.key(KEY)
    counts = objectives.counts_of(*(side.weights for side in sides))
    state = objectives.update_state(objective, numbers, state, *sides, key=key)

    def loss(sides, params):
        parts = {'state': state, 'params': params, 'key': key}
        return objectives.evaluate(objective, numbers, *sides, weight, counts, **parts)

    (total, metrics), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(sides, params)
    by_pair = objectives.by_pair(objective, numbers, *sides, state=state, params=params, key=key)
    return total, gradients, metrics, by_pair, state


def own(objective, found):
    """What of a union's step an objective by itself has too."""
    total, (by_sides, by_params), metrics, by_pair, state = found
    names = [term.loss.name for term in objective.terms]
    terms = {f'loss/{name}' for name in names} if len(names) > 1 else set()
    metrics = {key: value for key, value in metrics.items() if not key.startswith('loss/') or key in terms}
    mine = [{name: tree[name] for name in names if name in tree} for tree in (by_params, state)]
    return total, (by_sides, mine[0]), metrics, by_pair, mine[1]


def assert_equal(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        scale = max(1.0, float(np.max(np.abs(b), initial=0)))
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * scale)


def alone(members, sides, state, params):
    """The step of each objective by itself; one program for all, as each would be compiled for too little."""
    by_structure = {}
    for objective in members:
        by_structure.setdefault(objective, []).append(in_double(objective.hyperparameters))

    def parts(objective, tree):
        return {term.loss.name: tree[term.loss.name] for term in objective.terms if term.loss.name in tree}

    @jax.jit
    def steps(numbers, sides, state, params):
        return [
            step(objective, each, sides, parts(objective, state), parts(objective, params))
            for objective, each in zip(by_structure, numbers)
        ]

    found = {}
    for numbers in itertools.zip_longest(*by_structure.values()):
        numbers = [each or given[0] for each, given in zip(numbers, by_structure.values())]
        for objective, result in zip(by_structure, steps(numbers, sides, state, params)):
            found.setdefault(objective, []).append(result)
    return [found[objective].pop(0) for objective in members]


@pytest.mark.parametrize('members', UNIONS, ids=lambda members: '+'.join(t.loss.name for t in members[0].terms))
def test_every_objective_of_a_union_is_what_it_is_alone(members):
    whole = union(members)
    sides, (state, params) = sides_of(whole), parts_of(whole)
    for objective, expected in zip(members, alone(members, sides, state, params)):
        found = step(whole, in_double(traced(whole, objective)), sides, state, params)
        names = [term.loss.name for term in objective.terms]
        assert_equal(own(objective, found), expected)
        idle = [name for name in state if name not in names]
        assert_equal({name: found[4][name] for name in idle}, {name: state[name] for name in idle})
        quiet = [found[1][1][name] for name in params if name not in names]
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(quiet))


@pytest.fixture
def poisonous(registry_as_it_was):
    """Losses that are not finite, or whose derivatives are not, wherever they are in use."""

    @losses.loss('Nobody 2026, arXiv:0000.00000, Eq. 1', reads_reference=False)
    def steep(chosen, rejected, *, beta=0.1):
        """Its value is finite, its derivative is not."""
        rewards = Rewards(*(beta * side.policy_logps.sum(axis=-1) for side in (chosen, rejected)))
        return jnp.sqrt(rewards.chosen * 0), rewards

    @losses.loss('Nobody 2026, arXiv:0000.00000, Eq. 2', reads_reference=False)
    def undefined(chosen, rejected, *, beta=0.1):
        """The logarithm of a negative number."""
        rewards = Rewards(*(beta * side.policy_logps.sum(axis=-1) for side in (chosen, rejected)))
        return jnp.log(rewards.chosen) / beta, Rewards(jnp.log(rewards.chosen), rewards.rejected)


def test_a_loss_that_is_not_in_use_poisons_nothing(poisonous):
    members = [made({'steep': {}}), made({'undefined': {}}), made({'dpo': {'beta': 0.2}, 'sft': {'weight': 0.5}})]
    whole = union(members)
    sides = sides_of(members[2])
    for objective in members[:2]:
        total, gradients, *_ = step(whole, in_double(traced(whole, objective)), sides, {}, {})
        broken = [total, *jax.tree.leaves(gradients)]
        assert not all(np.isfinite(leaf).all() for leaf in broken)
    found = step(whole, in_double(traced(whole, members[2])), sides, {}, {})
    assert_equal(own(members[2], found), step(members[2], in_double(members[2].hyperparameters), sides, {}, {}))


def test_a_weighting_of_references_joins_and_draws_as_it_does_alone():
    """multi_dpo reads the references as they are, others the one that is made of them; each has a beta of its own."""
    mixture = {'weights': 'arwc', 'clip': 'adaptive'}
    names = ('initial', 'other', 'third')
    specs = [{'multi_dpo': {'beta': 0.4}}, {'dpo': {}}, {'ipo': {'weight': 0.5}, 'multi_dpo': {'weight': 2.0}}]
    specs = [{'mixture': mixture | {'eps': eps}, **spec} for eps, spec in zip((0.1, 0.3, 0.1), specs)]
    members = [objectives.make(spec, names) for spec in specs]
    assert all(joins(objective, members[:place]) for place, objective in enumerate(members))
    sides = contract.example(losses.find('multi_dpo'), {})
    sides = [side.replace(mixing_weights=None) for side in (sides.chosen, sides.rejected)]
    whole = union(members)
    for objective in members:
        found = step(whole, in_double(traced(whole, objective)), sides, {}, {})
        assert_equal(own(objective, found), step(objective, in_double(objective.hyperparameters), sides, {}, {}))


def test_first_rewards_are_those_of_the_cell_own_first_loss():
    members = [made({'dpo': {'beta': 0.1}, 'simpo': {}}), made({'simpo': {}, 'dpo': {'beta': 0.1}})]
    whole, sides = union(members), sides_of(made({'dpo': {}}))
    first, second = (step(whole, in_double(traced(whole, objective)), sides, {}, {}) for objective in members)
    assert first[0] == pytest.approx(float(second[0]), rel=1e-12)
    assert first[2]['rewards/chosen'] != second[2]['rewards/chosen']
    assert not np.allclose(first[3][1].chosen, second[3][1].chosen)


@pytest.mark.parametrize(
    'ours, theirs',
    [
        ({'dpo': {}}, {'tdpo1': {}}),  # statistics
        ({'dpo': {}}, {'aot': {}}),  # couples the batch
        ({'dpo': {}}, {'apo_zero': {}}),  # takes unpaired rows
        ({'dpo': {}}, {'odpo': {}}),  # a column
        ({'dpo': {}}, {'spo': {}}),  # a model with a role
        ({'dpo': {}}, {'dpo': {}, 'sparse_po': {}}),  # token masks
        ({'f_dpo': {'divergence': 'jensen_shannon'}}, {'f_dpo': {}, 'sft': {}}),  # a word
    ],
)
def test_what_needs_another_program_does_not_join(ours, theirs):
    ours, theirs = made(ours), made(theirs)
    assert joins(ours, [ours]) and joins(theirs, [theirs])
    assert not joins(ours, [theirs]) and not joins(theirs, [ours])
