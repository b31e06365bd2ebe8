"""The program that trains many cells at once: settings and seeds side by side on a leading axis (`jax.vmap`).

Hyperparameters, learning rates and data are traced; the loss and its gradient are `jaxpo.objective`'s.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxpo import objective as objectives
from jaxpo.experiment import import_module
from jaxpo.losses import scores
from jaxpo.objective import Objective

environment = import_module(str(pathlib.Path(__file__).parent / 'environment.py'))
REFERENCES = environment.REFERENCES
SPLITS = ('selection', 'report')


class Data(NamedTuple):
    """What a seed draws."""

    training: environment.Pairs  # [pairs]
    held_out: environment.Pairs  # [splits, held_out_pairs]
    facts: dict[str, jax.Array]  # fields of PairNumbers that no policy changes, [splits, held_out_pairs]


class Lane(NamedTuple):
    """What differs between the cells of a program; a leading axis of all cells."""

    hyperparameters: Any
    learning_rate: jax.Array  # []
    seed: jax.Array  # [] int
    order: jax.Array  # [steps, batch_pairs] int: training pairs of each step
    data: Data


class Trained(NamedTuple):
    """What came of a lane. E = steps / evaluate_every + 1 evaluations, the first before any step."""

    logits: jax.Array  # [E, X, N, V]: the policy
    held_out: dict[str, jax.Array]  # fields of PairNumbers that the policy decides, [splits, E, held_out_pairs]
    metrics: dict[str, jax.Array]  # [steps]: of each step's pairs, before the step
    tokens: jax.Array  # []: of all training pairs that were taken


@functools.partial(jax.jit, static_argnums=(0, 1))
def drawn(count: int, held_out: int, world: environment.World, seed: int) -> Data:
    """Training pairs and those of both splits."""
    of_training, *of_splits = jax.random.split(jax.random.key(seed), 1 + len(SPLITS))
    splits = [environment.draw(world, key, held_out) for key in of_splits]
    pairs = jax.tree.map(lambda *parts: jnp.stack(parts), *splits)
    lengths = jnp.asarray(world.weights).sum(axis=-1).astype(int)
    facts = {
        'pair': jnp.broadcast_to(jnp.arange(held_out), pairs.prompt.shape),
        'prompt': pairs.prompt,
        'chosen_tokens': lengths[pairs.chosen],
        'rejected_tokens': lengths[pairs.rejected],
    }
    return Data(environment.draw(world, of_training, count), pairs, facts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def train_lanes(objective: Objective, train, world: environment.World, lanes: Lane) -> Trained:
    """All lanes, side by side. `train` is a `training.Train`, whose seed is not read."""
    optimizer = optax.scale_by_adam()
    start = jnp.asarray(world.references[REFERENCES[0]])

    def lane(one: Lane) -> Trained:
        of_steps = jax.random.key(one.seed)

        def step(carry, given):
            logits, opt_state, state = carry
            places, number = given
            pairs = jax.tree.map(lambda part: part[places], one.data.training)
            key = jax.random.fold_in(of_steps, number)
            state = _updated(objective, one.hyperparameters, state, world, logits, pairs, key)

            def loss(logits):
                sides = environment.sides(world, objective, logits, pairs)
                counts = objectives.counts_of(*(side.weights for side in sides))
                weight = jnp.ones(train.batch_pairs)
                parts = {'state': state, 'key': key}
                total, metrics = objectives.evaluate(objective, one.hyperparameters, *sides, weight, counts, **parts)
                return total, {**metrics, 'num_tokens': counts['tokens'] + sides[1].weights.sum()}

            gradient, metrics = jax.grad(loss, has_aux=True)(logits)
            updates, opt_state = optimizer.update(gradient, opt_state)
            new = logits - one.learning_rate * updates
            return (new, opt_state, state), {**metrics, 'grad_norm': optax.tree.norm(gradient)}

        def stretch(carry, given):
            """The steps up to the next evaluation, and the policy and state that it sees."""
            carry, metrics = jax.lax.scan(step, carry, given)
            return carry, (carry[0], carry[2], metrics)

        def numbers(logits, state, pairs):
            return _pair_numbers(objective, one.hyperparameters, state, world, logits, pairs, of_steps)

        steps = (one.order, jnp.arange(train.steps))
        by_stretch = jax.tree.map(lambda x: x.reshape(-1, train.evaluate_every, *x.shape[1:]), steps)
        first = (start, optimizer.init(start), objectives.init_state(objective))
        _, (*after, metrics) = jax.lax.scan(stretch, first, by_stretch)
        seen = jax.tree.map(lambda at, then: jnp.concatenate([at[None], then]), (first[0], first[2]), tuple(after))
        held_out = jax.vmap(jax.vmap(numbers, (0, 0, None)), (None, None, 0))(*seen, one.data.held_out)
        metrics = jax.tree.map(lambda values: values.reshape(-1), metrics)
        tokens = metrics.pop('num_tokens').sum()
        return Trained(seen[0], held_out, metrics, tokens)

    return jax.vmap(lane)(lanes)


def _updated(objective: Objective, hyperparameters, state, world, logits, pairs, key):
    """The running state of the objective's losses after a step's pairs."""
    if not state:
        return state
    sides = environment.sides(world, objective, logits, pairs)
    return objectives.update_state(objective, hyperparameters, state, *sides, key=key)


def _pair_numbers(objective: Objective, hyperparameters, state, world, logits, pairs, key) -> dict[str, jax.Array]:
    """Fields of PairNumbers that the policy decides, `[B]`. Losses that couple pairs see those of the split."""
    sides = environment.sides(world, objective, logits, pairs)
    ones = dict.fromkeys(('pairs', 'tokens', 'completions', 'chosen', 'rejected', 'both'), 1.0)

    def of_one(weight):
        parts = {'state': state, 'key': key}
        return objectives.evaluate(objective, hyperparameters, *sides, weight, ones, **parts, draw=False)[1]

    # An objective is linear in the pairs' weights: with a single one it is that pair's share.
    found = jax.vmap(of_one)(jnp.eye(len(pairs.prompt)))
    chosen, rejected = (scores.logp(side) for side in sides)
    return {
        'chosen_reward': found['rewards/chosen'],
        'rejected_reward': found['rewards/rejected'],
        'chosen_logps': chosen,
        'rejected_logps': rejected,
        'loss': found['loss'],
    }


@functools.partial(jax.jit, static_argnums=0)
def measure_lanes(samples: int, world, logits, seeds, beta) -> dict[str, dict[str, jax.Array]]:
    """By split, `[lanes, E]`: what is exactly true of the policies, and what their samples say of it."""
    log_reference = environment.log_policy(world, jnp.asarray(world.references[REFERENCES[0]]))
    lengths = jnp.asarray(world.weights).sum(axis=-1)

    def sampled(log_pi, seed):
        key = jax.random.fold_in(jax.random.key(seed), samples)
        drawn = jax.random.categorical(key, log_pi, shape=(samples, len(log_pi)))
        prompt = jnp.broadcast_to(jnp.arange(len(log_pi)), drawn.shape)
        log_ratio = (log_pi - log_reference)[prompt, drawn]
        means = {'reward': world.reward[prompt, drawn], 'kl': log_ratio, 'length': lengths[drawn]}
        return {name: values.mean() for name, values in means.items()}

    def of_lane(tables, seed):
        log_pi = environment.log_policy(world, tables)
        exact = jax.vmap(lambda one: environment.measure(world, one, jnp.asarray(beta)))(log_pi)
        return {'selection': jax.vmap(lambda one: sampled(one, seed))(log_pi), 'report': exact}

    return jax.vmap(of_lane)(logits, seeds)
