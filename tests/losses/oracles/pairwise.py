"""jaxpo/losses/pairwise.py once more."""

import numpy as np
from losses.oracles.side import sigmoid, softplus


def dpo(chosen, rejected, beta=0.1):
    return softplus(-beta * (chosen.log_ratio - rejected.log_ratio))


def cdpo(chosen, rejected, beta=0.1, label_smoothing=0.1):
    z = beta * (chosen.log_ratio - rejected.log_ratio)
    return -(1 - label_smoothing) * np.log(sigmoid(z)) - label_smoothing * np.log(sigmoid(-z))


def robust_dpo(chosen, rejected, beta=0.1, label_smoothing=0.1):
    z = beta * (chosen.log_ratio - rejected.log_ratio)
    clean = -(1 - label_smoothing) * np.log(sigmoid(z)) + label_smoothing * np.log(sigmoid(-z))
    return clean / (1 - 2 * label_smoothing)


def hinge(chosen, rejected, beta=0.05):
    return max(0.0, 1.0 - beta * (chosen.log_ratio - rejected.log_ratio))


def exo(chosen, rejected, beta=0.1, label_smoothing=1e-3):
    q = sigmoid(beta * (chosen.log_ratio - rejected.log_ratio))
    policy, label = np.array([q, 1 - q]), np.array([1 - label_smoothing, label_smoothing])
    return float(np.sum(policy * np.log(policy / label)))


def discopop(chosen, rejected, beta=0.05, tau=0.05):
    z = beta * (chosen.log_ratio - rejected.log_ratio)
    w = sigmoid(z / tau)
    return (1 - w) * softplus(-z) + w * np.exp(-z)


def ipo(chosen, rejected, tau=0.1, reduction='mean'):
    ratios = [side.log_ratio / (side.length if reduction == 'mean' else 1.0) for side in (chosen, rejected)]
    return (ratios[0] - ratios[1] - 1 / (2 * tau)) ** 2


def f_dpo(chosen, rejected, beta=0.1, divergence='reverse_kl', alpha=0.5):
    slope = {
        'reverse_kl': lambda u: np.log(u) + 1,
        'forward_kl': lambda u: -1 / u,
        'jensen_shannon': lambda u: np.log(2 * u / (1 + u)),
        'alpha': lambda u: (1 - u**-alpha) / alpha,
    }[divergence]
    return softplus(-beta * (slope(np.exp(chosen.log_ratio)) - slope(np.exp(rejected.log_ratio))))


LN2 = 0.6931471805599453
ORACLES = {
    'dpo': dpo,
    'cdpo': cdpo,
    'robust_dpo': robust_dpo,
    'hinge': hinge,
    'exo': exo,
    'discopop': discopop,
    'ipo': ipo,
    'f_dpo': f_dpo,
}
COUPLED = {}
AT_REFERENCE = {
    'dpo': lambda: LN2,
    'cdpo': lambda: LN2,
    'robust_dpo': lambda: LN2,
    'hinge': lambda: 1.0,
    'exo': lambda: -LN2 - 0.5 * np.log(0.999 * 0.001),
    'ipo': lambda: 25.0,
    'f_dpo': lambda: LN2,
}
LOGISTIC = {'dpo', 'f_dpo'}
GOLDEN = [
    ('dpo', {'beta': 0.1}, 0.620957047790),
    ('cdpo', {'beta': 0.1, 'label_smoothing': 0.1}, 0.635957047790),
    ('robust_dpo', {'beta': 0.1, 'label_smoothing': 0.1}, 0.602207047790),
    ('hinge', {'beta': 0.1}, 0.85),
    ('exo', {'beta': 0.1, 'label_smoothing': 1e-3}, 2.505516555478),
    ('discopop', {'beta': 0.1, 'tau': 0.05}, 0.849337579289),
    ('ipo', {'tau': 0.1, 'reduction': 'sum'}, 12.25),
    ('ipo', {'tau': 0.1, 'reduction': 'mean'}, 22.827160493827),
    ('f_dpo', {'beta': 0.1, 'divergence': 'forward_kl'}, 0.631154383572),
    ('f_dpo', {'beta': 0.1, 'divergence': 'jensen_shannon'}, 0.660652162510),
    ('f_dpo', {'beta': 0.1, 'divergence': 'alpha', 'alpha': 0.3}, 0.625437693864),
]
