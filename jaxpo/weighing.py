"""Mixing weights that validation pairs choose: before training (vdw, vaw), or step by step as judges (tsw)."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo import objective as objectives
from jaxpo import sharding, step
from jaxpo.data import sampler
from jaxpo.objective import counts_of
from jaxpo.run import Run, make_batch
from jaxpo.state import TrainState
from jaxpo.types import Pair


def weigh(run: Run, state: TrainState, pairs: Sequence[Pair]) -> TrainState:
    """The state at step 0 with the mixing weights that validation pairs choose; as it was where they choose none."""
    mixture = run.objective.mixture
    if mixture is None or mixture.observes != 'validation':
        return state
    jit = _jit(run)
    observe = jit(step.make_observe_step(run.models, run.objective))
    lengths = np.array([(pair.chosen.size, pair.rejected.size) for pair in pairs])
    counts = jax.device_get(counts_of(lengths[:, :1], lengths[:, 1:]))
    bare, means = state.replace(opt_state=()), None
    for start in range(0, len(pairs), run.config.train.batch_pairs):
        batch = make_batch(run, pairs[start : start + run.config.train.batch_pairs])
        share = observe(bare, batch, run.traced, counts)
        means = share if means is None else jax.tree.map(jnp.add, means, share)
    follow = jit(functools.partial(objectives.follow, run.objective))
    return state.replace(method_state=follow(run.objective.hyperparameters, state.method_state, means))


@dataclasses.dataclass(frozen=True)
class Judge:
    """Rewards the reference that a step drew, where the policy's accuracy on validation pairs rose by that step."""

    run: Run
    pairs: list[Pair]
    accuracy_step: Callable
    reward_step: Callable

    def accuracy(self, state: TrainState, number: int) -> jax.Array:
        """Accuracy on the subset of validation pairs that judges step `number`, from 0."""
        size = min(self.run.config.evaluate.validation_pairs, len(self.pairs))
        subset = sampler.subset(self.run.config.train.seed, number, len(self.pairs), size)
        batch = make_batch(self.run, [self.pairs[place] for place in subset])
        return self.accuracy_step(state.replace(opt_state=()), batch)

    def credit(self, state: TrainState, number: int, before: jax.Array) -> TrainState:
        """The state after step `number`, before which the accuracy was `before`."""
        reward = (self.accuracy(state, number) > before).astype(jnp.float32)
        return state.replace(method_state=self.reward_step(state.replace(opt_state=()), self.run.traced, reward))


def make_judge(run: Run, pairs: list[Pair]) -> Judge | None:
    """A judge, where the objective's mixture draws references and wants them rewarded."""
    if not run.objective.draws_arm:
        return None
    accuracy, reward = step.make_accuracy_step(run.models), step.make_reward_step(run.objective)
    jit = _jit(run)
    return Judge(run, pairs, jit(accuracy), jit(reward))


def _jit(run: Run) -> Callable[[Callable], Callable]:
    """Compiles a function whose results are whole on every device, so that every process can read them."""
    return functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
