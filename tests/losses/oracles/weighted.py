"""jaxpo/losses/weighted.py once more."""

import math

import numpy as np
from losses.oracles.side import softplus


def wpo_weight(side):
    aligned = [policy - squares for policy, squares in zip(side.policy, side.statistics['log_sum_squares'])]
    return math.exp(side.sum(aligned) / side.length)


def wpo(chosen, rejected, frozen, beta=0.01):
    weight = min(1.0, wpo_weight(frozen[0]) * wpo_weight(frozen[1]))
    return weight * softplus(-beta * (chosen.log_ratio - rejected.log_ratio))


def rainbow_po(chosen, rejected, beta=10.0, mixing_alpha=0.25, home_advantage=0.1, eta=0.29):
    policy = chosen.logp / chosen.length - rejected.logp / rejected.length
    reference = chosen.reference_logp / chosen.length - rejected.reference_logp / rejected.length
    normalised = [
        side.sum(side.statistics['reference_entropy']) / side.length / np.log(side.vocabulary)
        for side in (chosen, rejected)
    ]
    phi = -eta * np.log(0.5 * sum(normalised))
    return softplus(-beta * phi * (policy - mixing_alpha * reference - (1 - mixing_alpha) * home_advantage))


ORACLES = {'wpo': wpo, 'rainbow_po': rainbow_po}
COUPLED = {}
AT_REFERENCE = {}
LOGISTIC = set()
GOLDEN = []
