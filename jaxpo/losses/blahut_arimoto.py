"""The mutual-information objective of finite problems, maximised exactly over policy and prior.

The prior is free (`blahut_arimoto`), or one of the mixtures of given components (`mixture_blahut_arimoto`).
"""

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
    _check('blahut_arimoto', rewards, prompt_probabilities, iterations)
    step = functools.partial(_step, rewards, jnp.log(prompt_probabilities), beta)
    uniform = jnp.full(rewards.shape[1], -math.log(rewards.shape[1]), rewards.dtype)
    (log_policy, log_prior), objective = jax.lax.scan(
        step, (jnp.broadcast_to(uniform, rewards.shape), uniform), length=iterations
    )
    return Optimum(jnp.exp(log_policy), jnp.exp(log_prior), objective)


def _step(rewards, log_prompts, beta, logs, _):
    """One step of policy and prior, and F behind both: in logs, where nothing that leaves the prior underflows."""
    _, log_prior = logs
    log_policy = _best_policy(rewards, beta, log_prior[None])
    log_joint = log_prompts[:, None] + log_policy
    log_prior = jax.nn.logsumexp(log_joint, axis=0)
    return (log_policy, log_prior), _objective(rewards, beta, log_joint, log_policy, log_prior[None])


def _best_policy(rewards, beta, log_prior):
    """log pi `[X, Y]`, pi(y|x) proportional to zeta(y|x) * exp(beta * r(x, y)): it maximises F for this prior."""
    return jax.nn.log_softmax(log_prior + beta * rewards, axis=-1)


def _objective(rewards, beta, log_joint, log_policy, log_prior):
    """F of policy and prior. A completion that the policy has ruled out tells nothing, also where the prior has too."""
    told = jnp.where(log_policy == -jnp.inf, 0.0, log_policy - log_prior)
    return (jnp.exp(log_joint) * (rewards - told / beta)).sum()


class MixtureOptimum(NamedTuple):
    """Policy and weights after the last iteration, and the objective after each."""

    policy: jax.Array  # [X, Y]: each prompt's distribution over completions
    weights: jax.Array  # [K]: of the components, with sum 1
    objective: jax.Array  # [iterations]: F, in units of reward


def mixture_blahut_arimoto(
    rewards: jax.Array,
    prompt_probabilities: jax.Array,
    beta: jax.Array | float,
    components: jax.Array,
    *,
    weights: jax.Array | None = None,
    iterations: int = 1000,
) -> MixtureOptimum:
    """The best policy and the best prior among mixtures zeta(y|x) = sum_k w_k * pi_k(y|x) of K fixed components.

    F(pi, w) = sum_x p(x) * (sum_y pi(y|x) * r(x, y) - KL(pi(.|x) || zeta(.|x)) / beta) is jointly concave: KL is
    jointly convex, and zeta linear in w. Each iteration takes the exact step of the policy, pi(y|x) proportional to
    zeta(y|x) * exp(beta * r(x, y)), then one `em_step` of the weights with sample weights p(x) * pi(y|x); neither
    lowers F. Together they multiply w_k by sum_x p(x) * c_k(x) / sum_j w_j * c_j(x), with
    c_k(x) = sum_y pi_k(y|x) * exp(beta * r(x, y)): Cover's iteration for the portfolio of highest expected log return
    where asset k returns c_k. It converges to the maximum of F over both wherever all starting weights are above 0; a
    component that starts at 0 stays there, and the limit is the best without it. The best weights
    are unique where the vectors c_k are linearly independent on the prompts that occur.

    With the point masses of all completions as components, this is `blahut_arimoto`, iteration by iteration. Runs under
    `jax.jit` and `jax.vmap`; `iterations` is static. Cover 1984, An algorithm for maximizing expected log investment
    return, IEEE Transactions on Information Theory 30(2).

    Args:
      rewards: `[X, Y]`, finite.
      prompt_probabilities: `[X]`, at least 0, with sum 1.
      beta: inverse temperature, above 0: 1 / beta of DPO.
      components: `[K, X, Y]` probabilities, each component's sum over Y is 1. All may be 0 at the same completion.
      weights: `[K]` to start from, above 0; None is 1 / K each.
      iterations: at least 1.

    Raises:
      InputError: shapes that do not fit, no component, or no iteration.
    """
    rewards, prompt_probabilities, components = map(jnp.asarray, (rewards, prompt_probabilities, components))
    _check('mixture_blahut_arimoto', rewards, prompt_probabilities, iterations)
    if components.ndim != 3 or components.shape[1:] != rewards.shape or not len(components):
        raise InputError(
            f'mixture_blahut_arimoto: components are [K, X, Y] with rewards [X, Y] = {list(rewards.shape)} and K at '
            f'least 1, not {list(components.shape)}.'
        )
    count = len(components)
    weights = jnp.full(count, 1 / count, rewards.dtype) if weights is None else jnp.asarray(weights, rewards.dtype)
    if weights.shape != (count,):
        raise InputError(
            f'mixture_blahut_arimoto: weights are [K] = [{count}] as components are, not {list(weights.shape)}.'
        )
    step = functools.partial(_mixture_step, rewards, jnp.log(prompt_probabilities), beta, jnp.log(components))
    start = jnp.zeros_like(rewards), jnp.log(weights)
    (log_policy, log_weights), objective = jax.lax.scan(step, start, length=iterations)
    return MixtureOptimum(jnp.exp(log_policy), jnp.exp(log_weights), objective)


def _mixture_step(rewards, log_prompts, beta, component_logps, logs, _):
    """One step of policy and weights, and F behind both."""
    _, log_weights = logs
    log_policy = _best_policy(rewards, beta, _log_mixture(log_weights, component_logps))
    log_joint = log_prompts[:, None] + log_policy
    flat = component_logps.reshape(len(component_logps), -1)
    log_weights = _em_step(log_weights, flat, log_joint.ravel())
    log_prior = _log_mixture(log_weights, component_logps)
    return (log_policy, log_weights), _objective(rewards, beta, log_joint, log_policy, log_prior)


def em_step(log_weights: jax.Array, component_logps: jax.Array, sample_weights: jax.Array) -> jax.Array:
    """One step of expectation maximisation for the weights of a mixture of fixed components.

    w_k <- sum_n s_n * w_k * p_k(n) / sum_j w_j * p_j(n), with the sample weights s scaled to sum 1, all in logs. The
    samples' weighted log-likelihood sum_n s_n * log sum_k w_k * p_k(n) is concave in w and never falls; from weights
    all above 0, repeated steps converge to its maximum. Dempster, Laird and Rubin 1977.

    Args:
      log_weights: `[K]`, nats, with logsumexp 0; -inf stays -inf.
      component_logps: `[K, N]`: each sample's log-probability under each component, nats; -inf is impossible.
      sample_weights: `[N]`, at least 0. Samples of weight 0, and those impossible under every component that has a
        weight, have no say; where none has a say the weights stay as they are.

    Returns:
      Log-weights `[K]`, nats, with logsumexp 0.

    Raises:
      InputError: shapes that do not fit.
    """
    log_weights, component_logps, sample_weights = map(jnp.asarray, (log_weights, component_logps, sample_weights))
    if component_logps.ndim != 2 or component_logps.shape != (*log_weights.shape, *sample_weights.shape):
        raise InputError(
            f'em_step: log_weights are [K], component_logps [K, N] and sample_weights [N], not '
            f'{list(log_weights.shape)}, {list(component_logps.shape)} and {list(sample_weights.shape)}.'
        )
    return _em_step(log_weights, component_logps, jnp.log(sample_weights))


def _log_mixture(log_weights, component_logps):
    """log sum_k w_k * p_k: `[K], [K, ...] -> [...]`."""
    trailing = (1,) * (component_logps.ndim - 1)
    return jax.nn.logsumexp(log_weights.reshape(-1, *trailing) + component_logps, axis=0)


def responsibilities(log_weights: jax.Array, component_logps: jax.Array) -> jax.Array:
    """How likely each component of a mixture made each sample: r_k(n) = w_k * p_k(n) / sum_j w_j * p_j(n), `[K, N]`.

    They sum to 1 over K, and are all 0 for a sample that no component with a weight can make. A constant added to all
    log-weights, or to all log-probabilities of a sample, changes nothing.

    Args:
      log_weights: `[K]`, nats; -inf is no weight.
      component_logps: `[K, N]`: each sample's log-probability under each component, nats; -inf is impossible.
    """
    return jnp.exp(_log_responsibilities(log_weights, component_logps))


def _log_responsibilities(log_weights, component_logps):
    """`[K, N]` in logs; -inf where all components that have a weight rule a sample out, in place of 0 / 0."""
    log_mixture = _log_mixture(log_weights, component_logps)
    possible = log_mixture > -jnp.inf
    log_joint = log_weights[:, None] + component_logps
    return jnp.where(possible[None], log_joint - jnp.where(possible, log_mixture, 0.0)[None], -jnp.inf)


def _em_step(log_weights, component_logps, log_sample_weights):
    """`em_step` of sample weights in logs, so that what a policy all but rules out still has its say."""
    log_shares = _log_responsibilities(log_weights, component_logps) + log_sample_weights[None]
    updated = jax.nn.logsumexp(log_shares, axis=-1)
    total = jax.nn.logsumexp(updated)
    return jnp.where(total > -jnp.inf, updated - jnp.where(total > -jnp.inf, total, 0.0), log_weights)


def _check(name, rewards, prompt_probabilities, iterations):
    """InputError for shapes that do not fit, or no iteration."""
    if rewards.ndim != 2 or prompt_probabilities.shape != rewards.shape[:1]:
        raise InputError(
            f'{name}: rewards are [X, Y] and prompt_probabilities [X], not {list(rewards.shape)} and '
            f'{list(prompt_probabilities.shape)}.'
        )
    if iterations < 1:
        raise InputError(f'{name}: iterations is at least 1, not {iterations}.')
