"""What a policy says of held-out pairs: numbers by pair, and the metrics made of them. NumPy alone.

`start` is the policy before its first step, which is the reference unless a study says otherwise.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PairNumbers:
    """N held-out pairs under one policy. Log-probabilities are of whole completions, nats, summed over tokens."""

    pair: np.ndarray  # [N] int: place in the audited data set
    prompt: np.ndarray  # [N] int: pairs with equal numbers share their prompt
    chosen_reward: np.ndarray  # [N] implicit reward by the method's own loss
    rejected_reward: np.ndarray
    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    chosen_start_logps: np.ndarray
    rejected_start_logps: np.ndarray
    chosen_tokens: np.ndarray  # [N] int
    rejected_tokens: np.ndarray
    loss: np.ndarray  # [N] the method's own loss, regularisers with their weights; before reduction


def metrics_of(numbers: PairNumbers) -> dict[str, float]:
    """Means over pairs, by the field's names; a tie counts one half in an accuracy.

    `log_ratios/...` measure the policy against its start: nats of a whole completion, or per token. `chosen_falling`
    is the share of pairs whose chosen completion has become less likely than it was at the start.
    """
    chosen = numbers.chosen_logps - numbers.chosen_start_logps
    rejected = numbers.rejected_logps - numbers.rejected_start_logps
    margins = numbers.chosen_reward - numbers.rejected_reward
    by_token = numbers.chosen_logps / numbers.chosen_tokens - numbers.rejected_logps / numbers.rejected_tokens
    longer = numbers.chosen_tokens - numbers.rejected_tokens
    return {
        'loss': _mean(numbers.loss),
        'rewards/accuracies': accuracy(margins),
        'rewards/margins': _mean(margins),
        'rewards/chosen': _mean(numbers.chosen_reward),
        'rewards/rejected': _mean(numbers.rejected_reward),
        'logps/chosen': _mean(numbers.chosen_logps),
        'logps/rejected': _mean(numbers.rejected_logps),
        'logps/accuracies': accuracy(by_token),
        'log_ratios/accuracies': accuracy(chosen - rejected),
        'log_ratios/margins': _mean(chosen - rejected),
        'log_ratios/chosen': _mean(chosen),
        'log_ratios/rejected': _mean(rejected),
        'log_ratios/chosen_per_token': _mean(chosen / numbers.chosen_tokens),
        'log_ratios/rejected_per_token': _mean(rejected / numbers.rejected_tokens),
        'chosen_falling': _mean(chosen < 0),
        'length_correlation': correlation(chosen - rejected, longer),
    }


def accuracy(margins: np.ndarray) -> float:
    """Share of positive margins; a tie counts one half."""
    return _mean(correct(margins))


def correct(margins: np.ndarray) -> np.ndarray:
    """1 where a margin is positive, one half where it is 0, else 0."""
    return (np.sign(margins) + 1) / 2


def correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Pearson's; 0 where either does not vary, as at the start."""
    if len(left) < 2 or np.ptp(left) == 0 or np.ptp(right) == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64))
