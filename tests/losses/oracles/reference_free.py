"""jaxpo/losses/reference_free.py once more."""

import numpy as np
from losses.oracles.side import softplus


def simpo(chosen, rejected, beta=2.0, gamma=0.5):
    return softplus(-(beta * chosen.logp / chosen.length - beta * rejected.logp / rejected.length - gamma))


def alpha_po(chosen, rejected, beta=2.5, gamma=0.1, alpha=0.25):
    p = [np.exp(side.logp / side.length) for side in (chosen, rejected)]
    reward = [beta * (1 - mean**-alpha) / alpha for mean in p]
    return softplus(-(reward[0] - reward[1] - gamma))


def slic(chosen, rejected, delta=1.0, nll_weight=0.1):
    return max(0.0, delta - chosen.logp + rejected.logp) - nll_weight * chosen.logp


def cpo(chosen, rejected, beta=0.1, nll_weight=1.0):
    return softplus(-beta * (chosen.logp - rejected.logp)) - nll_weight * chosen.logp


def orpo(chosen, rejected, odds_ratio_weight=0.1):
    p = [np.exp(side.logp / side.length) for side in (chosen, rejected)]
    odds = [mean / (1 - mean) for mean in p]
    return -chosen.logp / chosen.length + odds_ratio_weight * softplus(-np.log(odds[0] / odds[1]))


def sft(chosen, rejected):
    return -chosen.logp


ORACLES = {'simpo': simpo, 'alpha_po': alpha_po, 'slic': slic, 'cpo': cpo, 'orpo': orpo, 'sft': sft}
COUPLED = {}
AT_REFERENCE = {'simpo': lambda: softplus(0.5), 'alpha_po': lambda: softplus(0.1)}
LOGISTIC = set()
GOLDEN = [
    ('simpo', {'beta': 2.0, 'gamma': 1.0}, 1.839674655553),
    ('slic', {'delta': 5.0, 'nll_weight': 0.1}, 3.2),
    ('cpo', {'beta': 0.1, 'nll_weight': 0.0}, 0.554355244469),
]
