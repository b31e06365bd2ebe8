"""The joint optimum of policy and mixing weights on finite problems, against an independent optimiser and theory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jaxpo.errors import InputError
from jaxpo.losses.blahut_arimoto import blahut_arimoto, em_step, mixture_blahut_arimoto, responsibilities

BETAS = [0.5, 2.0, 5.0]
SEEDS = [1, 2, 4, 5]  # their best mixtures are of one, two and all three components
solve = jax.jit(mixture_blahut_arimoto, static_argnames='iterations')


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def problem(seed=1, prompts=4, completions=6, count=3):
    """Rewards, probabilities of prompts, and components."""
    random = np.random.default_rng(seed)
    components = random.dirichlet(np.full(completions, 0.4), size=(count, prompts))
    return random.normal(size=(prompts, completions)), random.dirichlet(np.full(prompts, 3.0)), components


def solved(rewards, prompts, beta, components, iterations=10_000, weights=None):
    found = solve(rewards, prompts, beta, components, weights=weights, iterations=iterations)
    return jax.tree.map(np.asarray, found)


def best_over_policies(weights, rewards, prompts, beta, components):
    """max over pi of F(pi, w): the log-partition function, sum_x p(x) log sum_y zeta(y|x) exp(beta r(x, y)) / beta."""
    zeta = np.tensordot(weights, components, 1)
    return prompts @ np.log((zeta * np.exp(beta * rewards)).sum(axis=1)) / beta


def by_definition(policy, weights, rewards, prompts, beta, components):
    """F(pi, w), term by term."""
    value = 0.0
    for x, y in np.ndindex(rewards.shape):
        if policy[x, y] > 0:
            told = np.log(policy[x, y] / (weights @ components[:, x, y]))
            value += prompts[x] * policy[x, y] * (rewards[x, y] - told / beta)
    return value


def optimised(rewards, prompts, beta, components):
    """The optimum found without alternation: a general optimiser of a concave function on the simplex."""

    def loss(weights):
        return -best_over_policies(weights, rewards, prompts, beta, components)

    count = len(components)
    found = scipy.optimize.minimize(
        loss,
        np.full(count, 1 / count),
        method='SLSQP',
        bounds=[(0, 1)] * count,
        constraints={'type': 'eq', 'fun': lambda weights: weights.sum() - 1},
        options={'ftol': 1e-15, 'maxiter': 1000},
    )
    return found.x, -found.fun


@pytest.mark.parametrize('beta', BETAS)
@pytest.mark.parametrize('seed', SEEDS)
def test_it_finds_the_optimum_that_a_general_optimiser_finds(seed, beta):
    rewards, prompts, components = problem(seed)
    policy, weights, objective = solved(rewards, prompts, beta, components)
    expected, best = optimised(rewards, prompts, beta, components)
    np.testing.assert_allclose(objective[-1], best, rtol=1e-9)
    np.testing.assert_allclose(weights, expected, atol=1e-3)
    zeta = np.tensordot(expected, components, 1) * np.exp(beta * rewards)
    np.testing.assert_allclose(policy, zeta / zeta.sum(axis=1, keepdims=True), atol=1e-3)
    assert objective[0] < best


@pytest.mark.parametrize('beta', BETAS)
@pytest.mark.parametrize('seed', SEEDS)
def test_the_fixed_point_satisfies_the_conditions_of_an_optimum(seed, beta):
    rewards, prompts, components = problem(seed)
    policy, weights, objective = solved(rewards, prompts, beta, components)
    np.testing.assert_allclose(weights.sum(), 1.0)
    zeta = np.tensordot(weights, components, 1)
    slackness = (prompts[:, None] * policy * components / zeta).sum(axis=(1, 2))
    np.testing.assert_allclose(slackness[weights > 1e-6], 1.0, atol=1e-6)
    assert (slackness <= 1 + 1e-6).all()
    np.testing.assert_allclose(objective[-1], by_definition(policy, weights, rewards, prompts, beta, components))


def test_every_kind_of_optimum_occurs_among_the_problems():
    """The best mixture is of one, two or all three components: the tests above see faces and the interior."""
    supports = set()
    for seed in SEEDS:
        rewards, prompts, components = problem(seed)
        supports |= {int((solved(rewards, prompts, beta, components).weights > 1e-6).sum()) for beta in BETAS}
    assert supports == {1, 2, 3}


@pytest.mark.parametrize('beta', BETAS)
def test_the_objective_never_falls(beta):
    rewards, prompts, components = problem()
    policy, weights, objective = solved(rewards, prompts, beta, components, iterations=300)
    assert (np.diff(objective) > -1e-14).all() and objective[1] - objective[0] > 1e-5
    for iterations in (1, 7):
        found = solved(rewards, prompts, beta, components, iterations=iterations)
        expected = by_definition(*found[:2], rewards, prompts, beta, components)
        np.testing.assert_allclose(found.objective[-1], expected, rtol=1e-12)
        np.testing.assert_allclose(found.objective, objective[:iterations], rtol=1e-12)


@pytest.mark.parametrize('beta', BETAS)
def test_point_masses_give_the_free_prior(beta):
    """Iteration by iteration, where the components are the completions themselves, whatever the prompt."""
    rewards, prompts, _ = problem()
    prompts_count, completions = rewards.shape
    components = np.broadcast_to(np.eye(completions)[:, None], (completions, prompts_count, completions))
    for iterations in (1, 50, 2000):
        ours = solved(rewards, prompts, beta, components, iterations)
        free = blahut_arimoto(rewards, prompts, beta, iterations=iterations)
        np.testing.assert_allclose(ours.policy, free.policy, rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(ours.weights, free.prior, rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(ours.objective, free.objective, rtol=1e-12)


def test_a_single_component_is_the_prior():
    rewards, prompts, components = problem(count=1)
    policy, weights, objective = solved(rewards, prompts, 2.0, components, iterations=3)
    np.testing.assert_array_equal(weights, [1.0])
    tilted = components[0] * np.exp(2.0 * rewards)
    np.testing.assert_allclose(policy, tilted / tilted.sum(axis=1, keepdims=True), rtol=1e-12)
    np.testing.assert_allclose(objective, objective[0], rtol=1e-14)


def test_any_interior_start_reaches_the_same():
    rewards, prompts, components = problem(1)
    random = np.random.default_rng(5)
    expected = solved(rewards, prompts, 2.0, components, iterations=20_000)
    for start in (*random.dirichlet(np.full(3, 0.3), size=3), np.array([1e-6, 1e-6, 1 - 2e-6])):
        found = solved(rewards, prompts, 2.0, components, 20_000, weights=start)
        np.testing.assert_allclose(found.weights, expected.weights, atol=1e-6)
        np.testing.assert_allclose(found.policy, expected.policy, atol=1e-6)


def test_a_component_that_starts_at_nothing_stays_there():
    rewards, prompts, components = problem(1)
    found = solved(rewards, prompts, 2.0, components, weights=np.array([0.0, 0.5, 0.5]))
    without = solved(rewards, prompts, 2.0, components[1:])
    assert found.weights[0] == 0
    np.testing.assert_allclose(found.weights[1:], without.weights, atol=1e-10)
    np.testing.assert_allclose(found.objective, without.objective, rtol=1e-12)


def test_completions_that_no_component_has_and_prompts_that_do_not_occur_do_no_harm():
    rewards, prompts, components = problem()
    components[:, 1, 2:4] = 0
    components[:, 1] /= components[:, 1].sum(axis=-1, keepdims=True)
    prompts = np.array([0.5, 0.5, 0.0, 0.0])
    policy, weights, objective = solved(1e3 * rewards, prompts, 20.0, components, iterations=50)
    assert np.isfinite(policy).all() and np.isfinite(weights).all() and np.isfinite(objective).all()
    assert (policy[1, 2:4] == 0).all()
    np.testing.assert_allclose(weights.sum(), 1.0)


def test_jitted_and_vmapped_is_the_same():
    rewards, prompts, components = (jnp.asarray(each) for each in problem())

    def at(beta):
        return mixture_blahut_arimoto(rewards, prompts, beta, components, iterations=20)

    together = jax.jit(jax.vmap(at))(jnp.array(BETAS))
    for place, beta in enumerate(BETAS):
        for ours, one in zip(together, at(beta)):
            np.testing.assert_allclose(ours[place], one, rtol=1e-12)


def test_shapes_are_checked():
    rewards, prompts, components = problem()
    with pytest.raises(InputError, match=r'mixture_blahut_arimoto: rewards are .* not \[4, 6\] and \[6\]'):
        mixture_blahut_arimoto(rewards, np.ones(6) / 6, 1.0, components)
    for wrong in (components[0], components[..., :5], components[:0]):
        with pytest.raises(InputError, match=r'components are \[K, X, Y\] with rewards \[X, Y\] = \[4, 6\]'):
            mixture_blahut_arimoto(rewards, prompts, 1.0, wrong)
    with pytest.raises(InputError, match=r'weights are \[K\] = \[3\] as components are, not \[2\]'):
        mixture_blahut_arimoto(rewards, prompts, 1.0, components, weights=np.ones(2) / 2)
    with pytest.raises(InputError, match='at least 1, not 0'):
        mixture_blahut_arimoto(rewards, prompts, 1.0, components, iterations=0)


def samples(seed=3, count=3, size=50):
    random = np.random.default_rng(seed)
    return np.log(random.dirichlet(np.ones(count))), random.normal(-80, 1, (count, size)), random.exponential(size=size)


def test_a_step_of_expectation_maximisation_is_the_mean_responsibility():
    log_weights, logps, given = samples()
    joint = np.exp(log_weights[:, None] + logps)
    expected = (joint / joint.sum(axis=0)) @ (given / given.sum())
    found = em_step(log_weights, logps, given)
    np.testing.assert_allclose(np.exp(found), expected, rtol=1e-12)
    np.testing.assert_allclose(em_step(log_weights, logps, 1e-3 * given), found, rtol=1e-12)


def test_responsibilities_are_bayes_rule_whatever_is_added():
    log_weights, logps, _ = samples()
    joint = np.exp(log_weights[:, None] + logps)
    expected = joint / joint.sum(axis=0)
    np.testing.assert_allclose(responsibilities(log_weights, logps), expected, rtol=1e-11)
    shifted = responsibilities(log_weights + 3.0, logps - 900.0)
    np.testing.assert_allclose(shifted, expected, rtol=1e-10)
    none = responsibilities(np.log([0.5, 0.5]), np.full((2, 1), -np.inf))
    np.testing.assert_array_equal(none, np.zeros((2, 1)))


def test_steps_climb_the_likelihood():
    log_weights, logps, given = samples()
    reached = []
    for _ in range(40):
        reached.append(given @ jax.nn.logsumexp(log_weights[:, None] + logps, axis=0))
        log_weights = em_step(log_weights, logps, given)
        np.testing.assert_allclose(jax.nn.logsumexp(log_weights), 0.0, atol=1e-12)
    assert (np.diff(reached) > 0).all()


def test_samples_that_say_nothing_change_nothing():
    """Samples of no weight, and samples that no component with a weight can make; and with none at all, no step."""
    log_weights, logps, given = samples()
    expected = em_step(log_weights, logps, given)
    noisy = np.concatenate([logps, [[-1.0, -np.inf], [-9.0, -np.inf], [-5.0, -np.inf]]], axis=1)
    np.testing.assert_allclose(em_step(log_weights, noisy, [*given, 0.0, 2.0]), expected, rtol=1e-12)
    np.testing.assert_array_equal(em_step(log_weights, logps, np.zeros_like(given)), log_weights)
    gone = np.array([-np.inf, *np.log([0.4, 0.6])])
    kept = em_step(gone, noisy.copy(), [*given, 0.0, 2.0])
    assert kept[0] == -np.inf
    np.testing.assert_allclose(kept[1:], em_step(gone[1:], logps[1:], given), rtol=1e-12)


def test_shapes_of_a_step_are_checked():
    log_weights, logps, given = samples()
    with pytest.raises(InputError, match=r'not \[3\], \[3, 50\] and \[49\]'):
        em_step(log_weights, logps, given[:-1])
    with pytest.raises(InputError, match='em_step'):
        em_step(log_weights[:-1], logps, given)
