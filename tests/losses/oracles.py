"""Every loss once more, from its paper, in float64 NumPy, one pair at a time. Shares no code with jaxpo.

A side is `(policy, reference, weights)`: token log-probabilities `[T]`, nats. Each oracle returns the pair's loss.
"""

import math

import numpy as np


def summed(side, which):
    return float(np.sum(side[which] * side[2]))


def dpo(chosen, rejected, beta=0.1):
    h = (summed(chosen, 0) - summed(chosen, 1)) - (summed(rejected, 0) - summed(rejected, 1))
    return math.log(1 + math.exp(-beta * h))


def ipo(chosen, rejected, tau=0.1, reduction='mean'):
    divisors = [side[2].sum() if reduction == 'mean' else 1.0 for side in (chosen, rejected)]
    ratios = [(summed(side, 0) - summed(side, 1)) / divisor for side, divisor in zip((chosen, rejected), divisors)]
    return (ratios[0] - ratios[1] - 1 / (2 * tau)) ** 2


def simpo(chosen, rejected, beta=2.0, gamma=0.5):
    means = [summed(side, 0) / side[2].sum() for side in (chosen, rejected)]
    return math.log(1 + math.exp(-(beta * means[0] - beta * means[1] - gamma)))


def sft(chosen, rejected):
    return -summed(chosen, 0)


ORACLES = {'dpo': dpo, 'ipo': ipo, 'simpo': simpo, 'sft': sft}

# What each loss is where the policy equals the reference (reference-free losses: where both completions are alike).
AT_REFERENCE = {
    'dpo': lambda beta=0.1: math.log(2),
    'ipo': lambda tau=0.1, reduction='mean': 1 / (4 * tau**2),
    'simpo': lambda beta=2.0, gamma=0.5: math.log(1 + math.exp(gamma)),
}

# Losses for which exchanging chosen and rejected turns the margin z into -z: L(z) - L(-z) = -z.
LOGISTIC = {'dpo': lambda h, hyper: hyper['beta'] * h}

# Golden values: sequence log-probabilities -12, -15 (policy), -13, -14.5 (reference) over 6 and 9 tokens.
GOLDEN = [
    ('dpo', {'beta': 0.1}, 0.620957047790),
    ('ipo', {'tau': 0.1, 'reduction': 'sum'}, 12.25),
    ('ipo', {'tau': 0.1, 'reduction': 'mean'}, 22.827160493827),
    ('simpo', {'beta': 2.0, 'gamma': 1.0}, 1.839674655553),
]
