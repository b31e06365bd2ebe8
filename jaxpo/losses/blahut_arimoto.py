"""The mutual-information objective of finite problems, maximised exactly over policy and prior."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpo.errors import InputError


class Optimum(NamedTuple):
    """Policy and prior after the last iteration, and the objective after each."""

    policy: jax.Array  # [X, Y]: each prompt's distribution over completions
    prior: jax.Array  # [Y]: a distribution over completions
    objective: jax.Array  # [iterations]: F, in units of reward


def blahut_arimoto(
    rewards: jax.Array, prompt_probabilities: jax.Array, beta: jax.Array | float, *, iterations: int = 1000
) -> Optimum:
    """The policy that earns most, less 1 / beta for every nat that its completion tells of the prompt.

    F(pi, zeta) = sum_x p(x) * (sum_y pi(y|x) * r(x, y) - KL(pi(.|x) || zeta) / beta) is jointly concave. Each iteration
    takes both exact steps from a prior of full support, pi(y|x) proportional to zeta(y) * exp(beta * r(x, y)), then
    zeta(y) = sum_x p(x) * pi(y|x), so that F never falls and converges to its maximum over both. There KL averages to
    the mutual information of prompt and completion. The best prior is often sparse: log zeta of a completion that
    leaves it falls by about the same at every iteration (finite in logs, 0 as a probability in the end), while one on
    the edge takes its time.

    Runs under `jax.jit` and `jax.vmap`; `iterations` is static. The objective is that of Tutunov, Grosnit and Bou-Ammar
    2025, arXiv:2501.01544; the alternation is the classical one of Blahut and of Arimoto, 1972.

    Args:
      rewards: `[X, Y]`, finite.
      prompt_probabilities: `[X]`, at least 0, with sum 1.
      beta: inverse temperature, above 0: 1 / alpha of the loss `mi`, so 1 / beta of DPO.
      iterations: at least 1.

    Raises:
      InputError: shapes that do not fit, or no iteration.
    """
    rewards, prompt_probabilities = jnp.asarray(rewards), jnp.asarray(prompt_probabilities)
    if rewards.ndim != 2 or prompt_probabilities.shape != rewards.shape[:1]:
        raise InputError(
            f'blahut_arimoto: rewards are [X, Y] and prompt_probabilities [X], not {list(rewards.shape)} and '
            f'{list(prompt_probabilities.shape)}.'
        )
    if iterations < 1:
        raise InputError(f'blahut_arimoto: iterations is at least 1, not {iterations}.')
    step = functools.partial(_step, rewards, jnp.log(prompt_probabilities), beta)
    uniform = jnp.full(rewards.shape[1], -math.log(rewards.shape[1]), rewards.dtype)
    (log_policy, log_prior), objective = jax.lax.scan(
        step, (jnp.broadcast_to(uniform, rewards.shape), uniform), length=iterations
    )
    return Optimum(jnp.exp(log_policy), jnp.exp(log_prior), objective)


def _step(rewards, log_prompts, beta, logs, _):
    """One step of policy and prior, and F behind both: in logs, where nothing that leaves the prior underflows."""
    _, log_prior = logs
    log_policy = jax.nn.log_softmax(log_prior[None] + beta * rewards, axis=-1)
    log_joint = log_prompts[:, None] + log_policy
    log_prior = jax.nn.logsumexp(log_joint, axis=0)
    told = log_policy - log_prior[None]
    return (log_policy, log_prior), (jnp.exp(log_joint) * (rewards - told / beta)).sum()
