"""The field's metrics of pairs, as sums that are divided by the counts of the whole step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxpo.losses import scores
from jaxpo.types import Completion, Rewards


def counts_of(chosen_weights: jax.Array, rejected_weights: jax.Array) -> dict[str, jax.Array]:
    """What the sums of a step are divided by, at least 1 each, from the weights `[..., C]` of all its completions."""
    chosen, rejected = (weights.any(axis=-1) for weights in (chosen_weights, rejected_weights))
    counts = {
        'pairs': (chosen | rejected).sum(),
        'tokens': chosen_weights.sum(),
        'completions': chosen.sum() + rejected.sum(),
        'chosen': chosen.sum(),
        'rejected': rejected.sum(),
        'both': (chosen & rejected).sum(),
    }
    return {name: jnp.maximum(count.astype(jnp.float32), 1.0) for name, count in counts.items()}


def reward_metrics(
    rewards: Rewards, chosen: Completion, rejected: Completion, pair_weight: jax.Array, counts: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """The field's metrics, of the rewards of the objective's first loss: means over the completions that there are.

    A tie counts one half in `rewards/accuracies`: where the policy is the reference, it says 0.5 and not 0. Of an
    unpaired row the missing completion counts as one of reward 0.
    """

    def mean(values, side, count):
        return jnp.where(side.weights.any(axis=-1), values * pair_weight, 0.0).sum() / counts[count]

    chosen_reward, rejected_reward = (
        mean(rewards.chosen, chosen, 'chosen'),
        mean(rewards.rejected, rejected, 'rejected'),
    )
    correct = (jnp.sign(rewards.chosen - rewards.rejected) + 1) / 2
    return {
        'rewards/chosen': chosen_reward,
        'rewards/rejected': rejected_reward,
        'rewards/margins': chosen_reward - rejected_reward,
        'rewards/accuracies': (correct * pair_weight).sum() / counts['pairs'],
        'logps/chosen': mean(scores.logp(chosen), chosen, 'chosen'),
        'logps/rejected': mean(scores.logp(rejected), rejected, 'rejected'),
        'logps/accuracies': preferred(chosen, rejected) / counts['both'],
    }


def reference_metrics(
    references: Sequence[str],
    chosen: Completion,
    rejected: Completion,
    weights: jax.Array,
    counts: dict[str, jax.Array],
) -> dict[str, jax.Array]:
    """Of each reference, its mean mixing weight, and the share of pairs that it agrees with: whose chosen completion
    has the larger mean token log-probability (by its own tokens) under it. A tie counts one half."""
    both = scores.present(chosen) & scores.present(rejected)
    margins = scores.mean_reference_logps(chosen) - scores.mean_reference_logps(rejected)
    agrees = jnp.where(both[None], (jnp.sign(margins) + 1) / 2, 0.0).sum(axis=-1) / counts['both']
    shares = weights.sum(axis=-1) / counts['pairs']
    return {
        **{f'references/{name}/weight': shares[place] for place, name in enumerate(references)},
        **{f'references/{name}/accuracies': agrees[place] for place, name in enumerate(references)},
    }


def preferred(chosen: Completion, rejected: Completion) -> jax.Array:
    """Pairs whose chosen completion has the larger mean token log-probability under the policy, a tie one half."""
    there = scores.present(chosen) & scores.present(rejected)
    margins = scores.mean_logp(chosen) - scores.mean_logp(rejected)
    return jnp.where(there, (jnp.sign(margins) + 1) / 2, 0.0).sum()
