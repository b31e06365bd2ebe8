"""The joint optimum of policy and prior on finite problems, against what theory and brute force say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo.errors import InputError
from jaxpo.losses.blahut_arimoto import blahut_arimoto

BETAS = [0.5, 2.0, 5.0]


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def problem(seed=0, prompts=4, completions=6):
    random = np.random.default_rng(seed)
    return random.normal(size=(prompts, completions)), random.dirichlet(np.ones(prompts))


def solved(rewards, prompts, beta, iterations=20_000):
    return jax.tree.map(np.asarray, blahut_arimoto(rewards, prompts, beta, iterations=iterations))


def mutual_information(policy, prompts):
    """sum p(x, y) log(p(x, y) / (p(x) p(y))), by its definition. policy [..., X, Y]."""
    joint = prompts[:, None] * policy
    independent = prompts[:, None] * joint.sum(axis=-2, keepdims=True)
    told = np.log(np.where(joint > 0, joint, 1.0)) - np.log(np.where(joint > 0, independent, 1.0))
    return (joint * told).sum(axis=(-2, -1))


def earned(policy, prompts, rewards):
    return (prompts[:, None] * policy * rewards).sum(axis=(-2, -1))


@pytest.mark.parametrize('beta', BETAS)
def test_the_objective_never_falls(beta):
    rewards, prompts = problem()
    climb = np.diff(solved(rewards, prompts, beta, iterations=500).objective)
    assert (climb > -1e-14).all() and climb[0] > 1e-4


@pytest.mark.parametrize('beta', BETAS)
def test_the_objective_is_reward_less_mutual_information(beta):
    """At every iteration, since the prior is the policy's marginal: E KL(pi || zeta) = I."""
    rewards, prompts = problem()
    for iterations in (1, 7, 400):
        policy, prior, objective = solved(rewards, prompts, beta, iterations)
        np.testing.assert_allclose(prior, prompts @ policy, rtol=1e-12, atol=1e-300)
        np.testing.assert_allclose(policy.sum(axis=1), 1.0, rtol=1e-12)
        expected = earned(policy, prompts, rewards) - mutual_information(policy, prompts) / beta
        np.testing.assert_allclose(objective[-1], expected, rtol=1e-12)
        assert objective.shape == (iterations,)


@pytest.mark.parametrize('beta', BETAS)
@pytest.mark.parametrize('seed', range(3))
def test_the_fixed_point_satisfies_the_conditions_of_an_optimum(beta, seed):
    rewards, prompts = problem(seed)
    policy, prior, objective = solved(rewards, prompts, beta)
    normaliser = np.exp(beta * rewards) @ prior
    np.testing.assert_allclose(objective[-1], prompts @ np.log(normaliser) / beta, rtol=1e-10)
    np.testing.assert_allclose(policy, prior * np.exp(beta * rewards) / normaliser[:, None], atol=1e-8)
    slackness = prompts @ (np.exp(beta * rewards) / normaliser[:, None])
    np.testing.assert_allclose(slackness[prior > 1e-6], 1.0, atol=1e-7)
    assert (slackness <= 1 + 1e-7).all()


def test_the_best_prior_is_sparse_and_a_lost_completion_does_no_harm():
    rewards, prompts = problem()
    policy, prior, objective = solved(rewards, prompts, 0.5)
    assert (prior == 0).sum() == 4 and (policy[:, prior == 0] == 0).all()
    assert np.isfinite(objective).all() and np.isfinite(policy).all()
    policy, prior, objective = solved(1e3 * rewards, np.array([0.0, 0.0, 0.5, 0.5]), 20.0, iterations=50)
    assert np.isfinite(objective).all() and np.isfinite(policy).all()
    np.testing.assert_allclose(prior.sum(), 1.0)


@pytest.mark.parametrize('beta', BETAS)
def test_no_policy_of_a_fine_grid_is_better(beta):
    """Two prompts, two completions: every policy is two numbers, and all of them are tried."""
    rewards, prompts = np.array([[1.0, 0.2], [-0.3, 0.4]]), np.array([0.3, 0.7])
    side = np.linspace(0.0, 1.0, 801)
    first = np.stack(np.meshgrid(side, side, indexing='ij'), axis=-1)
    policies = np.stack([first, 1 - first], axis=-1)
    values = earned(policies, prompts, rewards) - mutual_information(policies, prompts) / beta
    policy, _, objective = solved(rewards, prompts, beta)
    assert -1e-15 < objective[-1] - values.max() < 1e-5  # the grid holds the optimum itself at beta = 0.5
    best = policies[np.unravel_index(values.argmax(), values.shape)]
    np.testing.assert_allclose(policy, best, atol=5e-3)


def test_at_any_temperature_information_is_bought_while_it_pays():
    """A higher beta buys more reward with more information; a very low one tells nothing of the prompt."""
    rewards, prompts = problem()
    policies = [solved(rewards, prompts, beta, iterations=2000).policy for beta in (1e-3, 0.5, 2.0, 8.0)]
    told = [mutual_information(policy, prompts) for policy in policies]
    got = [earned(policy, prompts, rewards) for policy in policies]
    assert np.all(np.diff(told) > 1e-3) and np.all(np.diff(got) > 0) and told[0] < 1e-3


def test_jitted_and_vmapped_is_the_same():
    rewards, prompts = (jnp.asarray(each) for each in problem())
    betas = jnp.array(BETAS)
    together = jax.jit(jax.vmap(lambda beta: blahut_arimoto(rewards, prompts, beta, iterations=20)))(betas)
    for place, beta in enumerate(BETAS):
        alone = blahut_arimoto(rewards, prompts, beta, iterations=20)
        for ours, one in zip(together, alone):
            np.testing.assert_allclose(ours[place], one, rtol=1e-12)


def test_shapes_are_checked():
    rewards, prompts = problem()
    with pytest.raises(InputError, match=r'\[4, 6\] and \[6\]'):
        blahut_arimoto(rewards, np.ones(6) / 6, 1.0)
    with pytest.raises(InputError, match='at least 1'):
        blahut_arimoto(rewards, prompts, 1.0, iterations=0)
