"""jaxpo/losses/many.py once more."""

import numpy as np
from losses.oracles.side import softplus


def multi_dpo(chosen, rejected, beta=0.1):
    total, count = 0.0, len(chosen.references)
    for k in range(count):
        gained = chosen.logp - rejected.logp
        owed = chosen.sum(chosen.references[k]) - rejected.sum(rejected.references[k])
        weight = 1 / count if chosen.mixing_weights is None else chosen.mixing_weights[k]
        total += weight * softplus(-beta * (gained - owed))
    return total


ORACLES = {'multi_dpo': multi_dpo}
COUPLED = {}
AT_REFERENCE = {'multi_dpo': lambda: np.log(2)}
LOGISTIC = {'multi_dpo'}
GOLDEN = [('multi_dpo', {'beta': 0.1}, 0.620957047790)]
