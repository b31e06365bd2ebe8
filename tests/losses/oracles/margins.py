"""jaxpo/losses/margins.py once more."""

import numpy as np
from losses.oracles.side import softplus


def odpo(chosen, rejected, beta=0.5, alpha=1.0):
    difference = max(chosen.columns['score'] - rejected.columns['score'], 1e-6)
    return softplus(-(beta * (chosen.log_ratio - rejected.log_ratio) - alpha * np.log(difference)))


def r_dpo(chosen, rejected, beta=0.1, alpha=0.01):
    # pi earns beta * log_ratio = r - alpha * |y|: the preference is that of r.
    reward = [beta * side.log_ratio + alpha * side.length for side in (chosen, rejected)]
    return softplus(-(reward[0] - reward[1]))


def ln_dpo(chosen, rejected, beta=5.0):
    return softplus(-beta * (chosen.log_ratio / chosen.length - rejected.log_ratio / rejected.length))


def h_dpo(chosen, rejected, beta=0.1, alpha=0.9):
    policy = chosen.logp - rejected.logp
    reference = chosen.reference_logp - rejected.reference_logp
    return softplus(-(alpha * beta * policy - beta * reference))


ORACLES = {'odpo': odpo, 'r_dpo': r_dpo, 'ln_dpo': ln_dpo, 'h_dpo': h_dpo}
COUPLED = {}
AT_REFERENCE = {
    'odpo': lambda: float(np.log1p(1e-6)),  # alike sides are a tie
    'r_dpo': lambda: 0.6931471805599453,
    'ln_dpo': lambda: 0.6931471805599453,
    'h_dpo': lambda: 0.6931471805599453,
}
LOGISTIC = {'ln_dpo', 'h_dpo'}
GOLDEN = [
    ('r_dpo', {'beta': 0.1, 'alpha': 0.02}, 0.649159339026),
    ('ln_dpo', {'beta': 2.0}, 0.495415731984),
    ('h_dpo', {'beta': 0.1, 'alpha': 0.9}, 0.634946101596),
]
