"""Where a method ends up with all the data there could be: the policy at which the expectation of its gradient is 0.

The expectation is over every pair of completions that the world can show and both its labels, each by its probability,
so that nothing is left of chance: what separates this policy from the best one is the method's own bias. Losses that
stop a gradient have no function that they minimise; a point where training stays is defined for them all the same.
"""

import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpo import objective as objectives
from jaxpo.errors import InputError
from jaxpo.experiment import import_module
from jaxpo.objective import Objective

environment = import_module(str(pathlib.Path(__file__).parent / 'environment.py'))

SMALL = 1e-10  # largest entry of the gradient at an optimum
_ADAM_STEPS, _LARGEST_RATE = 1500, 0.1
_LONGEST, _STEPS = 1e12, 200  # implicit steps: of time, and their number


class Population(NamedTuple):
    """All pairs of completions of each prompt, M in number, and how likely each is."""

    pairs: environment.Pairs  # [X, M]
    probability: jax.Array  # [X, M], sum 1 over M


def population(world: environment.World) -> Population:
    """Every ordered pair of different completions, the first of them chosen."""
    probability = np.asarray(environment.pair_probabilities(world))
    prompt, chosen, rejected = np.nonzero(probability)
    shape = (len(probability), -1)
    pairs = environment.Pairs(*(part.reshape(shape) for part in (prompt, chosen, rejected)))
    return Population(pairs, probability[prompt, chosen, rejected].reshape(shape))


def check(objective: Objective) -> None:
    """InputError for an objective whose expectation over pairs is not defined by the loss of each."""
    for term in objective.terms:
        if term.loss.couples_batch:
            raise InputError(
                f"{term.loss.name}: a pair's loss depends on the other pairs of its step, so that there is no "
                'expectation over pairs apart from the size of a step.'
            )
    if objective.mixture is not None and objective.mixture.observes != 'nothing':
        raise InputError(f'mixture.weights {objective.mixture.weights}: they move with the steps of a training run.')


class Found(NamedTuple):
    """What the solver ends with."""

    logits: jax.Array  # [X, N, V]
    gradient: jax.Array  # its largest entry; an optimum where at most SMALL
    steps: jax.Array  # [X]


@functools.partial(jax.jit, static_argnums=0)
def solve(objective: Objective, world: environment.World, all_pairs: Population, hyperparameters) -> Found:
    """Follows the expected gradient from the first reference: Adam's shrinking steps, then Newton's to a gradient of 0.

    Where these find no such point (a loss that falls without end, or one with kinks, whose least value has a gradient
    on either side), the policy is where Adam ended. Prompts are apart: each has a table of its own.
    """
    start = jnp.asarray(world.references[environment.REFERENCES[0]])
    lengths = jnp.asarray(world.weights).sum(axis=-1)
    # What a loss is divided by is an expectation too, over all prompts.
    tokens = (all_pairs.probability * lengths[all_pairs.pairs.chosen]).sum(axis=-1).mean()
    counts = {'pairs': 1.0, 'tokens': tokens, 'completions': 2.0, 'chosen': 1.0, 'rejected': 1.0, 'both': 1.0}

    def of_prompt(prompt, pairs, probability):
        here = world._replace(references={name: table[prompt][None] for name, table in references.items()})
        pairs = pairs._replace(prompt=jnp.zeros_like(pairs.prompt))

        def loss(flat):
            sides = environment.sides(here, objective, flat.reshape(1, *start.shape[1:]), pairs)
            return objectives.evaluate(objective, hyperparameters, *sides, probability, counts)[0]

        return _rest(jax.grad(loss), _descended(jax.grad(loss), start[prompt].reshape(-1)))

    references = {name: jnp.asarray(table) for name, table in world.references.items()}
    flat, gradient, steps = jax.vmap(of_prompt)(jnp.arange(len(start)), *all_pairs)
    return Found(flat.reshape(start.shape), gradient.max(), steps)


def _descended(gradient_of, flat):
    """Where Adam ends, whose steps fall to 0: it follows no gradient to a point that small changes would leave."""
    optimizer = optax.adam(optax.cosine_decay_schedule(_LARGEST_RATE, _ADAM_STEPS))

    def step(_, carry):
        flat, state = carry
        updates, state = optimizer.update(gradient_of(flat), state)
        return optax.apply_updates(flat, updates), state

    return jax.lax.fori_loop(0, _ADAM_STEPS, step, (flat, optimizer.init(flat)))[0]


def _rest(gradient_of, start):
    """A point near `start` where the gradient is 0, or `start`; the largest entry of its gradient, and steps taken.

    An implicit step of d(flat)/dt = -gradient, of length t, solves (1/t + J) d = -gradient with the exact Jacobian J; t
    grows as the gradient shrinks, until steps are Newton's.
    """

    def at(flat):
        jacobian, gradient = jax.jacfwd(lambda flat: (gradient_of(flat),) * 2, has_aux=True)(flat)
        return flat, gradient, jacobian

    def goes_on(state):
        (_, gradient, _), _, step = state
        return (jnp.abs(gradient).max() > SMALL / 100) & (step < _STEPS)

    def implicit_step(state):
        here, time, step = state
        flat, gradient, jacobian = here
        there = at(flat - jnp.linalg.solve(jacobian + jnp.eye(flat.size) / time, gradient))
        ratio = jnp.abs(gradient).max() / jnp.abs(there[1]).max()
        better = jnp.isfinite(ratio) & (ratio > 0.5)
        time = jnp.where(better, jnp.clip(2 * ratio, 0.5, 10.0), 0.1) * time
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), there, here)
        return kept, jnp.minimum(time, _LONGEST), step + 1

    first = at(start)
    (flat, gradient, _), _, steps = jax.lax.while_loop(goes_on, implicit_step, (first, 1.0, 0))
    largest, at_first = jnp.abs(gradient).max(), jnp.abs(first[1]).max()
    at_rest = largest <= SMALL
    return jnp.where(at_rest, flat, start), jnp.where(at_rest, largest, at_first), steps
