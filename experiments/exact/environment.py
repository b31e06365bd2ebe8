"""A world small enough to enumerate: a tabular policy over all completions of a few prompts, and their true reward.

A completion is up to T tokens of a vocabulary of V, the first of which (0) ends it; one that is still going at T is cut
there. A policy is a table of logits, one row for each prompt and each prefix, so that it can be any distribution over
completions, and a completion's tokens have log-probabilities, entropies and divergences as a language model's have.
Nothing is estimated: every expectation is a sum over the Y completions.

The functions here make arrays; the statistics of tokens are `jaxpo.vocabulary`'s, and losses read `Completion`s.
Everything is float64 where it is called under `jax.enable_x64(True)`, which all of this experiment is.
"""

import dataclasses
import functools
import itertools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import vocabulary
from jaxpo.errors import InputError, unknown
from jaxpo.objective import Objective
from jaxpo.types import Completion

END = 0  # the token
REFERENCES = ('reference', 'other')
STATISTICS = ('forward_kl', 'reverse_kl', 'entropy', 'log_sum_squares', 'reference_entropy')
"""Of `losses.registry.STATISTICS`, those that a table has. It has no hidden states and no activations."""
LEAST_BETA, LARGEST_BETA = 1e-4, 1e4


@dataclasses.dataclass(frozen=True)
class Environment:
    prompts: int = 4
    """X, equally likely; nothing learned of one helps with another."""
    vocabulary: int = 3
    """V tokens, the end token among them."""
    longest: int = 4
    """T: most tokens of a completion, its end token among them."""
    seed: int = 0
    """Of rewards and references: the world. Data have seeds of their own."""
    reward_scale: float = 0.5
    """Standard deviation of the part of the reward that is drawn for each completion."""
    length_reward: float = 0.1
    """Reward of every further token."""
    reference_scale: float = 0.7
    """Standard deviation of the references' logits."""
    proposals: Literal['reference', 'uniform'] = 'reference'
    """Who writes the completions that are compared."""


class World(NamedTuple):
    """Y completions, N prefixes; arrays of NumPy, float64."""

    tokens: np.ndarray  # [Y, T] int: 0 behind the end
    node: np.ndarray  # [Y, T] int: the prefix that a token follows; 0 behind the end
    weights: np.ndarray  # [Y, T]: 1 on tokens, 0 behind the end
    reward: np.ndarray  # [X, Y]: of Bradley and Terry, with mean 0 under the first reference at each prompt
    references: dict[str, np.ndarray]  # logits [X, N, V]
    proposals: np.ndarray  # [X, Y]: probability of being written


class Pairs(NamedTuple):
    """M pairs of completions of one prompt."""

    prompt: jax.Array  # [M] int
    chosen: jax.Array  # [M] int
    rejected: jax.Array  # [M] int


@functools.lru_cache(maxsize=8)
def make_world(environment: Environment) -> World:
    """The world of these settings. InputError for one that has nothing to compare."""
    for name in ('prompts', 'vocabulary', 'longest'):
        least = 1 if name == 'prompts' else 2
        if getattr(environment, name) < least:
            raise InputError(f'environment.{name} is at least {least}, not {getattr(environment, name)}.')
    if environment.proposals not in ('reference', 'uniform'):
        raise unknown('environment.proposals', environment.proposals, ('reference', 'uniform'))
    tokens, node, weights, nodes = _completions(environment.vocabulary, environment.longest)
    random = np.random.Generator(np.random.Philox(environment.seed))
    shape = (environment.prompts, nodes, environment.vocabulary)
    references = {name: environment.reference_scale * random.normal(size=shape) for name in REFERENCES}
    reward = environment.reward_scale * random.normal(size=(environment.prompts, len(tokens)))
    reward += environment.length_reward * weights.sum(axis=1)
    world = World(tokens, node, weights, reward, references, np.full(reward.shape, 1 / len(tokens)))
    with jax.enable_x64(True):
        likely = np.exp(jax.device_get(log_policy(world, references[REFERENCES[0]])))
    if environment.proposals == 'reference':
        world = world._replace(proposals=likely)
    return world._replace(reward=reward - (likely * reward).sum(axis=1, keepdims=True))


def _completions(size: int, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Tokens, prefixes and weights `[Y, T]` of all completions, and the number of prefixes."""
    words = range(END + 1, size)
    prefixes = [prefix for n in range(longest) for prefix in itertools.product(words, repeat=n)]
    place = {prefix: number for number, prefix in enumerate(prefixes)}
    whole = [(*prefix, END) for prefix in prefixes] + list(itertools.product(words, repeat=longest))
    tokens, node, weights = (np.zeros((len(whole), longest), kind) for kind in (np.int64, np.int64, np.float64))
    for row, completion in enumerate(whole):
        tokens[row, : len(completion)] = completion
        node[row, : len(completion)] = [place[completion[:n]] for n in range(len(completion))]
        weights[row, : len(completion)] = 1
    return tokens, node, weights, len(prefixes)


def log_policy(world: World, logits: jax.Array) -> jax.Array:
    """Log-probability of every completion `[..., X, Y]` under tables `[..., X, N, V]`, nats."""
    by_token = jax.nn.log_softmax(logits, axis=-1)[..., world.node, world.tokens]
    return jnp.einsum('...yt,yt->...y', by_token, world.weights)


def token_statistics(logits: jax.Array, reference_logits: jax.Array, names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Statistics of next tokens (of `jaxpo.vocabulary.VALUES`) `[...]` of two tables `[..., V]`, nats."""
    size = logits.shape[-1]
    logits, reference_logits = logits.reshape(-1, size), reference_logits.reshape(-1, size)
    sums = vocabulary.no_sums(tuple({*names, *vocabulary.DIVERGENCES}), len(logits))
    sums = vocabulary.grown(sums, logits, reference_logits, None)
    rise = vocabulary.rise(sums)
    return {name: vocabulary.VALUES[name](sums, rise, size) for name in names}


def sides(world: World, objective: Objective, logits: jax.Array, pairs: Pairs) -> tuple[Completion, Completion]:
    """Chosen and rejected Completions of B pairs under the policy's table `[X, N, V]`, as `objective` needs them."""
    shape = logits.shape[:2]
    references = jnp.stack([jnp.asarray(world.references[name]) for name in objective.references])
    asked = objective.needs.statistics
    own = tuple(name for name in asked if name in vocabulary.STATISTICS)
    found = [token_statistics(logits, table, own) for table in references] if own else []
    between = [name for name in own if name in vocabulary.DIVERGENCES]
    by_reference = {name: jnp.stack([one[name].reshape(shape) for one in found]) for name in between}
    if 'reference_entropy' in asked:
        entropies = [token_statistics(table, table, ('entropy',))['entropy'].reshape(shape) for table in references]
        by_reference['reference_entropy'] = jnp.stack(entropies)
    of_policy = {name: found[0][name].reshape(shape) for name in own if name not in between}
    # At once, so that equal tables have equal logs, to the last digit.
    policy_logps, *reference_logps = jax.nn.log_softmax(jnp.stack([logits, *references]), axis=-1)
    reference_logps = jnp.stack(reference_logps)
    only = len(objective.references) == 1

    def side(completion):
        prompt, node, tokens = pairs.prompt[:, None], world.node[completion], world.tokens[completion]
        weights = jnp.asarray(world.weights)[completion]

        def at_nodes(by_node):
            """`[..., X, N] -> [..., B, T]`, 0 behind the end."""
            return by_node[..., prompt, node] * jnp.broadcast_to(weights, (*by_node.shape[:-2], *weights.shape))

        def at_tokens(by_token):
            """`[..., X, N, V] -> [..., B, T]`, 0 behind the end."""
            picked = by_token[..., prompt, node, tokens]
            return picked * jnp.broadcast_to(weights, picked.shape)

        statistics = {name: at_nodes(values) for name, values in of_policy.items()}
        compared = {name: at_nodes(values) for name, values in by_reference.items()}
        if only:
            statistics, compared = statistics | {name: values[0] for name, values in compared.items()}, {}
        return Completion(
            at_tokens(policy_logps),
            at_tokens(reference_logps),
            weights,
            **statistics,
            by_reference=compared,
            vocabulary=logits.shape[-1],
        )

    return side(pairs.chosen), side(pairs.rejected)


def pair_probabilities(world: World) -> jax.Array:
    """`[X, Y, Y]`, sum 1 at each prompt: the proposals write these two, and the first is chosen of them.

    sigmoid(r(chosen) - r(rejected)), as Bradley and Terry have it, is the chance of the label. Two equal completions
    say nothing, and are drawn again.
    """
    written = jnp.asarray(world.proposals)[:, :, None] * jnp.asarray(world.proposals)[:, None, :]
    written *= 1 - jnp.eye(written.shape[-1])[None]
    label = jax.nn.sigmoid(world.reward[:, :, None] - world.reward[:, None, :])
    return 2 * written * label / written.sum(axis=(1, 2), keepdims=True)


def draw(world: World, key: jax.Array, count: int) -> Pairs:
    """`count` labelled pairs."""
    of_prompt, of_pair = jax.random.split(key)
    prompts, completions = world.reward.shape
    prompt = jax.random.randint(of_prompt, (count,), 0, prompts)
    log_pairs = jnp.log(pair_probabilities(world)).reshape(prompts, -1)
    pair = jax.random.categorical(of_pair, log_pairs[prompt])
    return Pairs(prompt, pair // completions, pair % completions)


def best_policy(world: World, beta: jax.Array) -> jax.Array:
    """log of the policy `[X, Y]` that earns most less beta for every nat of KL from the first reference.

    It is proportional to pi_ref * exp(r / beta), beta above 0.
    """
    log_reference = log_policy(world, jnp.asarray(world.references[REFERENCES[0]]))
    return jax.nn.log_softmax(log_reference + world.reward / beta, axis=-1)


def reward_and_kl(world: World, log_pi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """True reward and KL from the first reference of a policy given as logs `[X, Y]`, means over prompts."""
    log_reference = log_policy(world, jnp.asarray(world.references[REFERENCES[0]]))
    pi = jnp.exp(log_pi)
    return (pi * world.reward).sum(axis=-1).mean(), (pi * (log_pi - log_reference)).sum(axis=-1).mean()


def beta_of(world: World, kl: jax.Array) -> jax.Array:
    """The beta whose best policy has this KL, by bisection; LEAST_BETA where none goes as far.

    The frontier sup {E[r] : KL <= kl} is the reward of that policy.
    """

    def halve(_, ends):
        middle = (ends[0] + ends[1]) / 2
        too_far = reward_and_kl(world, best_policy(world, jnp.exp(middle)))[1] > kl
        return jnp.where(too_far, middle, ends[0]), jnp.where(too_far, ends[1], middle)

    ends = (jnp.full_like(kl, np.log(LEAST_BETA)), jnp.full_like(kl, np.log(LARGEST_BETA)))
    return jnp.exp(jax.lax.fori_loop(0, 60, halve, ends)[1])


def measure(world: World, log_pi: jax.Array, beta: jax.Array) -> dict[str, jax.Array]:
    """What is exactly true of a policy given as logs `[X, Y]`; means over prompts.

    reward: E[r], 0 for the first reference. kl: KL(policy || first reference), nats. gap: how much more the frontier
    earns at this KL, at least 0. optimum_kl and total_variation: from the policy that is best at price `beta` of a nat.
    length: mean tokens. entropy: of the completion, nats.
    """
    reward, kl = reward_and_kl(world, log_pi)
    frontier, _ = reward_and_kl(world, best_policy(world, beta_of(world, kl)))
    pi, log_best = jnp.exp(log_pi), best_policy(world, beta)
    return {
        'reward': reward,
        'kl': kl,
        'gap': frontier - reward,
        'optimum_kl': (pi * (log_pi - log_best)).sum(axis=-1).mean(),
        'total_variation': jnp.abs(pi - jnp.exp(log_best)).sum(axis=-1).mean() / 2,
        'length': (pi @ jnp.asarray(world.weights).sum(axis=-1)).mean(),
        'entropy': -(pi * log_pi).sum(axis=-1).mean(),
    }
