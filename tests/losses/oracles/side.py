"""What an oracle is given of one completion: plain float64 NumPy, one pair at a time."""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Side:
    policy: np.ndarray  # [T] nats
    references: list[np.ndarray]  # of each [T]
    mixing_weights: list[float] | None  # of each, where there are any
    weights: np.ndarray  # [T] 1 or 0
    statistics: dict[str, np.ndarray]  # name -> [T] (prompt_hidden: [D])
    columns: dict[str, np.ndarray]  # name -> number, or [T]
    models: dict[str, np.ndarray]  # role -> [T]
    activations: dict[str, np.ndarray]  # kind -> [N, T]
    masks: dict[str, np.ndarray]  # name -> [T]
    companions: dict[str, 'Side']
    vocabulary: int

    def sum(self, values):
        return float(np.sum(np.asarray(values) * self.weights))

    @property
    def length(self):
        return float(self.weights.sum())

    @property
    def logp(self):
        return self.sum(self.policy)

    @property
    def reference(self):
        """[T]: the one reference, or the first."""
        return self.references[0]

    @property
    def reference_logp(self):
        return self.sum(self.reference)

    @property
    def log_ratio(self):
        return self.logp - self.reference_logp


def side_of(completion, index) -> Side:
    """One pair's side of a Completion, in arrays of its own."""
    names = ('forward_kl', 'reverse_kl', 'entropy', 'log_sum_squares', 'reference_entropy', 'prompt_hidden')
    found = {name: getattr(completion, name) for name in names}

    def pick(values):
        return {name: np.array(value[index], np.float64) for name, value in values.items() if value is not None}

    weights = completion.mixing_weights
    return Side(
        np.array(completion.policy_logps[index], np.float64),
        [np.asarray(logps[index], np.float64) for logps in completion.reference_logps],
        None if weights is None else np.asarray(weights[:, index], np.float64).tolist(),
        np.asarray(completion.weights[index], np.float64),
        pick(found),
        pick(completion.columns),
        pick(completion.model_logps),
        {kind: np.asarray(values[:, index], np.float64) for kind, values in completion.activations.items()},
        pick(completion.masks),
        {name: side_of(other, index) for name, other in completion.companions.items()},
        completion.vocabulary,
    )


def softplus(value):
    return float(np.logaddexp(0.0, value))


def sigmoid(value):
    return float(1.0 / (1.0 + np.exp(-value)))
