"""jaxpo/losses/multi_objective.py once more."""

import numpy as np
from losses.oracles.side import softplus


def modpo(chosen, rejected, beta=0.1, preference_weight=0.5, margin='column'):
    ratios, others = [], []
    for side in (chosen, rejected):
        ratios.append(side.logp - side.reference_logp)
        implicit = beta * (side.sum(side.models['margin']) - side.reference_logp) if margin == 'model' else None
        others.append(side.columns['margin_reward'] if margin == 'column' else implicit)
    own = beta * (ratios[0] - ratios[1])
    return softplus(-(own - (1 - preference_weight) * (others[0] - others[1])) / preference_weight)


def spo(chosen, rejected, beta=0.1, multiplier=0.5):
    """Models in the order of rounds: earlier ones, the reference (the last round), the policy (this round)."""

    def summed(side):
        return [*(side.sum(side.models[name]) for name in sorted(side.models)), side.reference_logp, side.logp]

    gains = np.diff(summed(chosen)) - np.diff(summed(rejected))  # one for each round
    return softplus(-(beta * gains[-1] - sum(multiplier * beta * gain for gain in gains[:-1])))


def sipo(chosen, rejected, beta=0.1, nll_weight=0.1):
    preference = softplus(-beta * (chosen.log_ratio - rejected.log_ratio))
    return preference - nll_weight * chosen.logp / chosen.length


def hpo(chosen, rejected, params, beta=0.1, auxiliary_weight=0.1, temperature=0.1, cap=20.0, expectile=0.7):
    total = softplus(-beta * (chosen.log_ratio - rejected.log_ratio))
    for side in (chosen, rejected):
        value = np.dot(side.statistics['prompt_hidden'], np.asarray(params['kernel'])) + float(params['bias'])
        advantage = side.columns['auxiliary_reward'] - value
        strength = min(np.exp(advantage / temperature), cap)
        total -= auxiliary_weight * strength * side.logp / side.length / 2
        total += abs(expectile - (advantage < 0)) * advantage**2 / 2
    return total


ORACLES = {'modpo': modpo, 'spo': spo, 'sipo': sipo, 'hpo': hpo}
COUPLED = {}
AT_REFERENCE = {'modpo': lambda: np.log(2), 'spo': lambda: np.log(2)}
LOGISTIC = {'modpo', 'spo'}
GOLDEN = [('sipo', {}, 0.620957047790 + 0.1 * 12 / 6)]
