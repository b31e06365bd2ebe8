"""Losses in programs that see a share of the pairs equal those of one device that sees all: value, gradient, state."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import tiny_meshes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpo import losses, objective, sharding
from jaxpo.losses import contract
from jaxpo.losses.parallel import by_pair, data_parallel
from jaxpo.types import Completion, Rewards

pytestmark = pytest.mark.usefixtures('compiled_quickly')
NAMES = sorted(losses.LOSSES)
COUPLED = [name for name in NAMES if losses.find(name).couples_batch]
INDEPENDENT = tuple(name for name in NAMES if name not in COUPLED)  # cheaper to compile as one program
DEVICES, PAIRS = 8, 16
EMPTY = (5, 14, 15)  # the last device has no pair at all
FILLED = np.array([float(pair not in EMPTY) for pair in range(PAIRS)])
TIGHT = {'rtol': 1e-11, 'atol': 1e-14}


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def pairs_axis(array):
    return array.shape.index(PAIRS)


@functools.cache
def example(name):
    """The contract's example of a loss, four times over with other numbers, and some of its slots emptied."""
    samples = [contract.example(losses.find(name), {}, seed=seed) for seed in range(PAIRS // contract.PAIRS)]

    def joined(*arrays):
        whole = np.concatenate(arrays, axis=arrays[0].shape.index(contract.PAIRS))
        return whole * FILLED.reshape([PAIRS if axis == pairs_axis(whole) else 1 for axis in range(whole.ndim)])

    sides = [jax.tree.map(joined, *(getattr(sample, side) for sample in samples)) for side in ('chosen', 'rejected')]
    return contract.replaced(samples[0], *sides)


def on_one(function, shares, wholes):
    return jax.jit(functools.partial(function, None))(shares, wholes)


def by_pmap(function, shares, wholes):
    """`function(axis name, shares, wholes) -> (arrays by pair, arrays that are the same on all)`, as from `on_one`."""

    def split(array):
        axis = pairs_axis(array)
        return np.moveaxis(array.reshape(*array.shape[:axis], DEVICES, -1, *array.shape[axis + 1 :]), axis, 0)

    mapped = jax.pmap(functools.partial(function, 'devices'), 'devices', in_axes=(0, None))
    by_device, same = mapped(jax.tree.map(split, shares), wholes)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape)), same)
    return jax.tree.map(lambda x: x.reshape(PAIRS, *x.shape[2:]), by_device), jax.tree.map(lambda x: x[0], same)


def by_shard_map(function, shares, wholes, check_vma=True):
    names = sharding.ROW_AXES
    specs = jax.tree.map(lambda x: P(*[None] * pairs_axis(x), names), shares)
    settings = {'in_specs': (specs, P()), 'out_specs': (P(names), P()), 'check_vma': check_vma}
    mesh = tiny_meshes.mesh(data=2, fsdp=2, replica=2)
    return jax.jit(jax.shard_map(functools.partial(function, names), mesh=mesh, **settings))(shares, wholes)


def by_jit(function, shares, wholes):
    mesh = tiny_meshes.mesh(data=4, fsdp=2)
    place = jax.tree.map(lambda x: NamedSharding(mesh, P(*[None] * pairs_axis(x), sharding.ROW_AXES)), shares)
    return on_one(function, jax.device_put(shares, place), jax.device_put(wholes, sharding.replicated(mesh)))


FORMS = {
    'one device': on_one,
    'pmap': by_pmap,
    'shard_map': by_shard_map,
    'shard_map unchecked': functools.partial(by_shard_map, check_vma=False),
    'jit': by_jit,
}


def kernel_and_gradient(entry, axis_name, shares, wholes):
    """Losses and rewards, their weighted sum's gradient by all that is by pair, and the running state."""
    sides, weights = shares
    entry = data_parallel(entry, axis_name) if axis_name else entry
    state = entry.updated(wholes['state'], *sides, **entry.defaults) if entry.init_state else {}

    def total(differentiated):
        sample = contract.with_differentiated(contract.Example(*sides, {}), differentiated)
        given = {**wholes, 'state': state, **entry.defaults}
        values, rewards = entry(sample.chosen, sample.rejected, **given)
        return (values * weights).sum(), (values, rewards)

    gradient, found = jax.grad(total, has_aux=True)(contract.differentiated(contract.Example(*sides, {})))
    return (found, gradient), state


def kernels_and_gradients(names, axis_name, shares, wholes):
    """`kernel_and_gradient` of each of the losses."""
    sides, weights = shares
    found = {
        name: kernel_and_gradient(losses.find(name), axis_name, (sides[name], weights), wholes[name]) for name in names
    }
    return {name: by_pair for name, (by_pair, _) in found.items()}, {name: same for name, (_, same) in found.items()}


@functools.cache
def of_losses(names, form):
    """What a program of these losses makes of their examples."""
    samples = {name: example(name) for name in names}
    weights = np.random.default_rng(1).uniform(0.5, 1.5, PAIRS) * FILLED
    shares = ({name: (sample.chosen, sample.rejected) for name, sample in samples.items()}, weights)
    wholes = {name: sample.extra for name, sample in samples.items()}
    return FORMS[form](functools.partial(kernels_and_gradients, names), shares, wholes)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, **TIGHT), found, expected)


@pytest.mark.parametrize('form', ['pmap', 'shard_map', 'jit'])
@pytest.mark.parametrize('name', NAMES)
def test_every_loss_equals_that_of_one_device(name, form):
    names = (name,) if name in COUPLED else INDEPENDENT
    for found, expected in zip(of_losses(names, form), of_losses(names, 'one device')):
        assert_equal(found[name], expected[name])


STEPS = {
    'kto and sft': ({'kto': {}, 'sft': {'weight': 0.3}}, 'kto'),
    'beta_dpo': ({'beta_dpo': {}}, 'beta_dpo'),
    'hpo': ({'hpo': {}}, 'hpo'),
    'mixture': ({'mixture': {'mix': 'harmonic', 'weights': 'swcw'}, 'aot_unpaired': {}}, 'multi_dpo'),
}


def step(made, axis_name, shares, wholes):
    """A training step's gradient, metrics and state, by `objective` on the device's own pairs."""
    sides, weight = shares
    state, key, numbers = wholes['state'], wholes['key'], made.hyperparameters
    psum = functools.partial(jax.lax.psum, axis_name=axis_name) if axis_name else lambda x: x
    pmean = functools.partial(jax.lax.pmean, axis_name=axis_name) if axis_name else lambda x: x
    weights = [side.weights for side in sides]
    if axis_name:
        weights = jax.lax.all_gather(weights, axis_name, tiled=True)
        parallel = (dataclasses.replace(term, loss=data_parallel(term.loss, axis_name)) for term in made.terms)
        made = dataclasses.replace(made, terms=tuple(parallel))
    counts = objective.counts_of(*weights)

    def scored(policy):
        return [side.replace(policy_logps=policy * side.policy_logps) for side in sides]

    state = objective.update_state(made, numbers, state, *scored(wholes['policy']), key=key)

    def loss(policy, method):
        parts = {'state': state, 'params': method, 'key': key}
        return psum(objective.evaluate(made, numbers, *scored(policy), weight, counts, **parts))

    trained = wholes['policy'], wholes['method']
    (_, metrics), gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*trained)
    seen = psum(objective.observe(made, numbers, *sides, weight, counts, state=state))
    return (), (pmean(gradient), metrics, state, seen)


@functools.cache
def step_case(case):
    spec, name = STEPS[case]
    sample = example(name)
    made = objective.make(spec, [f'r{k}' for k in range(len(sample.chosen.reference_logps))])
    wholes = {
        'policy': np.linspace(0.8, 1.2, contract.TOKENS)[None],
        'method': {name: sample.extra['params']} if 'params' in sample.extra else {},
        'state': objective.init_state(made),
        'key': sample.extra['key'],
    }
    if 'state' in sample.extra:
        wholes['state'] |= {name: sample.extra['state']}
    sides = [sample.chosen, sample.rejected]
    if made.takes_unpaired:
        sides[1] = sides[1].replace(weights=sides[1].weights * (np.arange(PAIRS) % 3 > 0)[:, None])
    shares, function = (sides, FILLED), functools.partial(step, made)
    return function, shares, wholes, on_one(function, shares, wholes)


@pytest.mark.parametrize('form', ['pmap', 'shard_map'])
@pytest.mark.parametrize('case', STEPS)
def test_a_step_equals_that_of_one_device(case, form):
    function, shares, wholes, expected = step_case(case)
    gradient = expected[1][0]
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient))
    assert_equal(FORMS[form](function, shares, wholes), expected)


def loop_of_ones_own(axis_name, shares, wholes):
    """The recipe of the module's docstring, where the parameter multiplies log-probabilities."""
    sides, pair_weight = shares
    kernel = losses.find('kto')
    psum = pmean = gather = lambda x: x
    if axis_name:
        kernel = data_parallel(kernel, axis_name)
        psum, pmean = (functools.partial(mean, axis_name=axis_name) for mean in (jax.lax.psum, jax.lax.pmean))
        gather = functools.partial(jax.lax.all_gather, axis_name=axis_name, tiled=True)

    def loss(policy):
        chosen, rejected = (side.replace(policy_logps=policy * side.policy_logps) for side in sides)
        counts = objective.counts_of(*gather((chosen.weights, rejected.weights)))
        values, _ = kernel(chosen, rejected)
        return psum((values * pair_weight).sum() / counts[kernel.normaliser])

    value, gradient = jax.value_and_grad(loss)(wholes)
    return (), (value, pmean(gradient))


@pytest.mark.parametrize('form', ['pmap', 'shard_map', 'shard_map unchecked'])
def test_a_loop_of_ones_own_equals_that_of_one_device(form):
    sample, policy = example('kto'), np.linspace(0.8, 1.2, contract.TOKENS)[None]
    shares = ((sample.chosen, sample.rejected), FILLED)
    assert_equal(FORMS[form](loop_of_ones_own, shares, policy), on_one(loop_of_ones_own, shares, policy))


def test_only_losses_that_need_all_pairs_gather_them():
    changed = {name for name in NAMES if data_parallel(losses.find(name), 'devices') is not losses.find(name)}
    assert changed == set(COUPLED)


def test_a_parallel_loss_is_called_and_described_as_the_loss():
    for name in NAMES:
        entry, parallel = losses.find(name), data_parallel(losses.find(name), 'devices')
        assert (parallel.name, parallel.summary, parallel.defaults) == (name, entry.summary, entry.defaults)
        parallel.check({})


def test_a_loss_that_draws_for_each_pair_draws_as_on_one_device(registry_as_it_was):
    @losses.loss('this test')
    def noisy(chosen: Completion, rejected: Completion, *, key):
        """Draws for each pair."""
        noise = jax.random.normal(key, chosen.policy_logps.shape[:1])
        margin = noise * (chosen.policy_logps - rejected.policy_logps).sum(axis=-1)
        return margin, Rewards(margin, margin)

    function = functools.partial(kernel_and_gradient, losses.find('noisy'))
    sample = example('dpo')
    shares, wholes = ((sample.chosen, sample.rejected), FILLED), {'key': jax.random.key(3)}
    expected = on_one(function, shares, wholes)
    assert_equal(by_pmap(function, shares, wholes), expected)
    assert_equal(by_shard_map(function, shares, wholes), expected)


def full_completion():
    """Every field there is, no two axes of one size but that of the pairs."""
    by_token, by_reference, pairs = np.zeros((PAIRS, 7)), np.zeros((3, PAIRS, 7)), np.zeros(PAIRS)
    names = ('policy_logps', 'weights', 'forward_kl', 'reverse_kl', 'entropy', 'log_sum_squares', 'reference_entropy')
    return Completion(
        **dict.fromkeys(names, by_token),
        reference_logps=by_reference,
        columns={'margin': pairs, 'activations': by_token},
        model_logps={'earlier': by_token},
        activations={'mlp': np.zeros((2, PAIRS, 7))},
        masks={'reward': by_token},
        prompt_hidden=np.zeros((PAIRS, 5)),
        by_reference={'forward_kl': by_reference},
        reference_lengths=np.zeros((3, PAIRS)),
        mixing_weights=np.zeros((3, PAIRS)),
        companions={'mismatched': Completion(by_token, by_reference, by_token)},
        vocabulary=50,
    )


def test_by_pair_knows_where_the_pairs_are_in_every_field():
    side = full_completion()
    fields = {field.name: getattr(side, field.name) for field in dataclasses.fields(side)}
    assert all(jax.tree.leaves(value) for value in fields.values()), 'a new field: add it to full_completion'
    sizes = jax.tree.leaves(by_pair(lambda array, axis: array.shape[axis], [side, Rewards(np.ones(16), np.ones(16))]))
    assert sizes == [PAIRS] * len(jax.tree.leaves(side)) + [PAIRS] * 2
