"""A peer's inputs as jaxpo's completions, and objectives of jaxpo on them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import losses, objective
from jaxpo.losses import scores
from jaxpo.types import Completion


@dataclasses.dataclass(frozen=True)
class Problem:
    """Token log-probabilities `[R, S]` of eight rows, chosen before rejected, and which tokens are scored."""

    policy: jax.Array
    reference: jax.Array
    log_sum_squares: jax.Array | None
    masks: dict[str, np.ndarray]  # `[R, S]` bool: `completion`, and `whole` with the prompt
    mismatched: 'Problem | None' = None

    def rows(self, mask: str, first: int, last: int) -> Completion:
        """Rows as a Completion: its tokens are moved to the left, as data make them."""
        mask = self.masks[mask][first:last]
        place = np.argsort(~mask, axis=1, kind='stable')[:, : mask.sum(axis=1).max()]
        weights = jnp.asarray(np.take_along_axis(mask, place, axis=1), self.policy.dtype)

        def pick(values):
            return weights * jnp.take_along_axis(values[first:last], jnp.asarray(place), axis=1)

        squares = {} if self.log_sum_squares is None else {'log_sum_squares': pick(self.log_sum_squares)}
        return Completion(pick(self.policy), pick(self.reference)[None], weights, **squares)

    @property
    def pair(self) -> tuple[Completion, Completion]:
        return self.rows('completion', 0, 4), self.rows('completion', 4, 8)

    @property
    def zero_reference(self) -> tuple[Completion, Completion]:
        return tuple(side.replace(reference_logps=0 * side.reference_logps) for side in self.pair)

    def unpaired(self, labels) -> tuple[Completion, Completion]:
        """Each row a pair with one side empty."""
        every = self.rows('completion', 0, 8)
        desirable = jnp.asarray(labels)[:, None]
        companions = {} if self.mismatched is None else {'mismatched': self.mismatched.rows('completion', 0, 8)}
        chosen, rejected = (
            every.replace(weights=jnp.where(there, every.weights, 0)) for there in (desirable, ~desirable)
        )
        return chosen.replace(companions=companions), rejected


NO_SHIFT = {'bco': {'count': np.zeros(2), 'mean': np.zeros(2)}}  # a running mean that has seen nothing


def value(spec, sides, state=None):
    """The scalar of an objective, as a step has it."""
    chosen, rejected = sides
    made = objective.make(spec, ['reference'])
    present = jnp.ones(len(chosen.weights), chosen.weights.dtype)
    counts = objective.counts_of(chosen.weights, rejected.weights)
    return objective.evaluate(made, made.hyperparameters, chosen, rejected, present, counts, state=state)[0]


def paired(**spec):
    return lambda problem: value(spec, problem.pair, NO_SHIFT)


def without_reference(**spec):
    return lambda problem: value(spec, problem.zero_reference)


def with_scores(score, chosen_offset=0.0, **spec):
    """The objective on completions whose log-ratio is any score: `score(problem)` gives that of chosen and rejected."""

    def scalar(problem):
        numbers = score(problem)
        numbers = numbers[0] + chosen_offset, numbers[1]
        return value(spec, [scored(side, number) for side, number in zip(problem.pair, numbers)])

    return scalar


def scored(side, number):
    """The completion with this log-ratio, `[B]`, spread over its tokens."""
    share = side.weights / scores.length(side)[:, None]
    return side.replace(policy_logps=share * number[:, None], reference_logps=0 * side.reference_logps)


def score_of(name, **hyperparameters):
    """The score within a loss's rewards."""

    def score(problem):
        _, rewards = losses.find(name)(*problem.pair, beta=1.0, **hyperparameters)
        return rewards.chosen, rewards.rejected

    return score


def plus(*terms):
    return lambda problem: sum(term(problem) for term in terms)


def likelihood(weight, mask='completion', first=0, last=4):
    """`sft` of the chosen completions, of these with their prompts, or of other rows."""

    def scalar(problem):
        side = problem.rows(mask, first, last)
        return value({'sft': {'weight': weight}}, (side, side))

    return scalar
