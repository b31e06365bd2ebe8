"""jaxpo/losses/pairwise.py once more."""

from losses.oracles.side import softplus


def dpo(chosen, rejected, beta=0.1):
    return softplus(-beta * (chosen.log_ratio - rejected.log_ratio))


def ipo(chosen, rejected, tau=0.1, reduction='mean'):
    ratios = [side.log_ratio / (side.length if reduction == 'mean' else 1.0) for side in (chosen, rejected)]
    return (ratios[0] - ratios[1] - 1 / (2 * tau)) ** 2


ORACLES = {'dpo': dpo, 'ipo': ipo}
COUPLED = {}
AT_REFERENCE = {'dpo': lambda: 0.6931471805599453, 'ipo': lambda: 25.0}
LOGISTIC = {'dpo'}
GOLDEN = [
    ('dpo', {'beta': 0.1}, 0.620957047790),
    ('ipo', {'tau': 0.1, 'reduction': 'sum'}, 12.25),
    ('ipo', {'tau': 0.1, 'reduction': 'mean'}, 22.827160493827),
]
