"""DPO against a mixture of references whose weights follow the policy, on problems small enough to enumerate.

The policy descends the expected loss `dpo`, its reference the arithmetic mixture under the weights of the moment; the
weights follow the policy's completions. Both must end at the optimum of `mixture_blahut_arimoto`, which knows the
rewards that here show in preferences only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxpo import losses
from jaxpo.losses.blahut_arimoto import em_step, mixture_blahut_arimoto
from jaxpo.references import mixture as mixtures
from jaxpo.references.weighting_online import LARGEST_LOG_RATIO
from jaxpo.types import Completion

PROMPTS, COMPLETIONS, REFERENCES = 3, 5, 3
BETA = 0.5
# Their best mixtures are of all three references, of two, and of one alone. Their primaries are those that the best
# policy is nowhere more than 5 nats above: importance weights of completions from these are not truncated.
PRIMARIES = {219: 'r2', 3: 'r1', 2: 'r0'}
SEEDS = list(PRIMARIES)
# Every prompt with both orders of every two completions of it.
PAIRS = np.array(
    [(x, y, z) for x in range(PROMPTS) for y in range(COMPLETIONS) for z in range(COMPLETIONS) if y != z]
).T
# Every prompt with every two completions, the same twice among them.
DRAWN = np.indices((PROMPTS, COMPLETIONS, COMPLETIONS)).reshape(3, -1)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def problem(seed):
    """Rewards `[X, Y]`, prompts `[X]` and references `[K, X, Y]`."""
    random = np.random.default_rng(seed)
    components = random.dirichlet(np.full(COMPLETIONS, 0.6), size=(REFERENCES, PROMPTS)) + 1e-3
    components /= components.sum(axis=-1, keepdims=True)
    rewards = random.normal(size=(PROMPTS, COMPLETIONS))
    return rewards, random.dirichlet(np.full(PROMPTS, 3.0)), components


def optimum(seed):
    rewards, prompts, components = problem(seed)
    found = jax.jit(mixture_blahut_arimoto, static_argnames='iterations')(
        rewards, prompts, 1 / BETA, components, iterations=20_000
    )
    return jax.tree.map(np.asarray, found)


def preferences(rewards, prompts):
    """How often each of PAIRS is met: `[B]`, sum 1, by Bradley and Terry's model of the rewards."""
    x, chosen, rejected = PAIRS
    share = prompts[x] / (COMPLETIONS * (COMPLETIONS - 1) / 2)
    return share / (1 + np.exp(rewards[x, rejected] - rewards[x, chosen]))


def completion(log_policy, logps, x, y):
    """Completions y of prompts x, of one token each."""
    return Completion(log_policy[x, y][:, None], logps[:, x, y][..., None], jnp.ones((len(x), 1)))


def mixture_of(mix='arithmetic', **more):
    return mixtures.make({'mix': mix, 'weights': 'learned', **more}, [f'r{k}' for k in range(REFERENCES)])


def from_primary_of(seed, **more):
    return mixture_of(primary=PRIMARIES[seed], **more)


def expectation_maximised(log_policy, logps, prompts, state, _):
    """The weights by `em_step` on every completion, as often as the policy writes it."""
    often = prompts[:, None] * jnp.exp(log_policy)
    log_weights = em_step(jnp.log(state['shares']), logps.reshape(REFERENCES, -1), often.ravel())
    return {'shares': jnp.exp(log_weights)}


def written(logps, prompts):
    """How often each of DRAWN is met where one reference of `logps` `[X, Y]` writes both completions: `[N]`, sum 1."""
    x, y, z = DRAWN
    return prompts[x] * jnp.exp(logps[x, y] + logps[x, z])


def observed(log_policy, logps, prompts, state, made):
    """The weights by the weighting `learned`, from pairs that the primary reference wrote: exact expectations."""
    x, *both = DRAWN
    seen = mixtures.observe(*made, *(completion(log_policy, logps, x, y) for y in both), state=state)
    often = written(logps[made[0].primary], prompts)
    return mixtures.update(*made, state, (seen * often[None]).sum(axis=-1))


def trained(seed, follow, made, iterations=4000, swapped=False):
    """Policy and weights after steps of both in turn."""
    rewards, prompts, components = problem(seed)
    logps, often = jnp.log(components), preferences(rewards, prompts)
    mixture, numbers = made
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, iterations))

    def loss(logits, state):
        log_policy = jax.nn.log_softmax(logits)
        x, *both = PAIRS
        sides = [completion(log_policy, logps, x, y) for y in (both[::-1] if swapped else both)]
        found = mixtures.combine(mixture, numbers, *sides, state=state, key=None)
        values, _ = losses.find('dpo')(found.chosen, found.rejected, beta=BETA)
        return (values * often).sum()

    def step(carry, _):
        logits, optimizer_state, state = carry
        gradient = jax.grad(loss)(logits, state)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        logits = logits + updates
        state = follow(jax.nn.log_softmax(logits), logps, jnp.asarray(prompts), state, made)
        return (logits, optimizer_state, state), None

    logits = jnp.zeros((PROMPTS, COMPLETIONS))
    start = logits, optimizer.init(logits), mixtures.init_state(mixture)
    (logits, _, state), _ = jax.jit(functools.partial(jax.lax.scan, step, length=iterations))(start)
    return np.asarray(jax.nn.softmax(logits)), np.asarray(state['shares'] / state['shares'].sum())


def value(policy, weights, seed):
    """F, which the optimum maximises."""
    rewards, prompts, components = problem(seed)
    told = np.log(policy / np.tensordot(weights, components, 1))
    return (prompts[:, None] * policy * (rewards - BETA * told)).sum()


def test_the_problems_have_best_mixtures_of_every_kind():
    assert [int((optimum(seed).weights > 1e-6).sum()) for seed in SEEDS] == [3, 2, 1]


@pytest.mark.parametrize('seed', SEEDS)
@pytest.mark.parametrize('follow', [expectation_maximised, observed])
def test_policy_and_weights_reach_the_joint_optimum(seed, follow):
    policy, weights = trained(seed, follow, from_primary_of(seed))
    best = optimum(seed)
    np.testing.assert_allclose(weights, best.weights, atol=1e-3)
    np.testing.assert_allclose(policy, best.policy, atol=1e-3)
    np.testing.assert_allclose(value(policy, weights, seed), best.objective[-1], atol=1e-5)


def unmoved(log_policy, logps, prompts, state, made):
    return state


@pytest.mark.parametrize('seed', SEEDS[:2])
def test_no_other_weights_mix_or_order_reaches_it(seed):
    """What the test above can tell apart: equal weights, another mean of the references, labels exchanged.

    Where one reference is best alone, all means of references with these weights are alike.
    """
    best = optimum(seed)
    equal, geometric = mixture_of(), mixture_of('geometric')
    wrong = {
        'equal weights': trained(seed, unmoved, equal, 2000),
        'geometric': trained(seed, expectation_maximised, geometric, 2000),
        'exchanged': trained(seed, expectation_maximised, equal, 2000, swapped=True),
    }
    for name, (policy, weights) in wrong.items():
        assert np.abs(policy - best.policy).max() > 1e-2, name
        assert value(policy, weights, seed) < best.objective[-1] - 1e-4, name


def test_a_whole_step_of_the_weighting_is_expectation_maximisation():
    rewards, prompts, components = problem(SEEDS[0])
    log_policy, logps = jax.nn.log_softmax(jnp.asarray(rewards)), jnp.log(components)
    made = from_primary_of(SEEDS[0], rate=1.0)
    state = {'shares': jnp.array([0.2, 0.5, 0.3])}
    ours = expectation_maximised(log_policy, logps, jnp.asarray(prompts), state, made)
    theirs = observed(log_policy, logps, jnp.asarray(prompts), state, made)
    np.testing.assert_allclose(theirs['shares'], 2 * ours['shares'], rtol=1e-12)
    assert np.abs(ours['shares'] - state['shares']).max() > 1e-2


def test_truncated_importance_weights_find_another_mixture():
    """One completion is 5.4 nats likelier under the best policy than under this primary."""
    policy, weights = trained(219, observed, mixture_of(primary='r0'))
    best = optimum(219)
    assert np.log(best.policy / problem(219)[2][0]).max() > LARGEST_LOG_RATIO
    assert np.abs(weights - best.weights).max() > 0.05
    assert value(policy, np.full(REFERENCES, 1 / REFERENCES), 219) < value(policy, weights, 219) < best.objective[-1]


def streamed(seed, made, follows, steps=4000, pairs=64):
    """Policy and weights after steps of 64 sampled pairs each, that the primary reference wrote and rewards label."""
    rewards, prompts, components = map(jnp.asarray, problem(seed))
    logps, (mixture, numbers) = jnp.log(components), made
    often = written(logps[mixture.primary], prompts)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))

    def drawn(key):
        one, other = jax.random.split(key)
        x, y, z = (jnp.asarray(each)[jax.random.categorical(one, jnp.log(often), shape=(pairs,))] for each in DRAWN)
        first = jax.random.bernoulli(other, jax.nn.sigmoid(rewards[x, y] - rewards[x, z]))
        return x, jnp.where(first, y, z), jnp.where(first, z, y)

    def step(carry, key):
        logits, optimizer_state, state = carry
        x, *both = drawn(key)

        def sides(logits):
            return [completion(jax.nn.log_softmax(logits), logps, x, y) for y in both]

        def loss(logits):
            found = mixtures.combine(mixture, numbers, *sides(logits), state=state, key=None)
            return losses.find('dpo')(found.chosen, found.rejected, beta=BETA)[0].mean()

        updates, optimizer_state = optimizer.update(jax.grad(loss)(logits), optimizer_state)
        if follows:
            seen = mixtures.observe(*made, *sides(logits), state=state).mean(axis=-1)
            state = mixtures.update(*made, state, seen)
        return (logits + updates, optimizer_state, state), None

    logits = jnp.zeros((PROMPTS, COMPLETIONS))
    start = logits, optimizer.init(logits), mixtures.init_state(mixture)
    keys = jax.random.split(jax.random.key(seed), steps)
    (logits, _, state), _ = jax.jit(functools.partial(jax.lax.scan, step))(start, keys)
    return np.asarray(jax.nn.softmax(logits)), np.asarray(state['shares'] / state['shares'].sum())


@pytest.mark.parametrize('seed', SEEDS)
def test_sampled_pairs_lead_nearer_to_the_optimum_than_equal_weights(seed):
    made, best = from_primary_of(seed, rate=0.02), optimum(seed)
    gaps = [best.objective[-1] - value(*streamed(seed, made, follows), seed) for follows in (True, False)]
    assert gaps[0] < gaps[1] / 2
