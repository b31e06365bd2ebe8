"""jaxpo/losses/token_level.py once more."""

import numpy as np
from losses.oracles.side import softplus


def log_ratios(side):
    return (side.policy - side.reference) * side.weights


def kl(side, name):
    return side.statistics[name] * side.weights


def tdpo1(chosen, rejected, beta=0.1):
    u = beta * (chosen.log_ratio - rejected.log_ratio)
    delta = beta * kl(rejected, 'forward_kl').sum() - beta * kl(chosen, 'forward_kl').sum()
    return softplus(-(u - delta))


def tdpo2(chosen, rejected, frozen, beta=0.1, alpha=0.5):
    u = beta * (chosen.log_ratio - rejected.log_ratio)
    delta = beta * kl(rejected, 'forward_kl').sum() - beta * kl(frozen[0], 'forward_kl').sum()
    return softplus(-(u - alpha * delta))


def tis_dpo(chosen, rejected, beta=0.1, kl_weight=1.0, weights='models', k=1.0, lower=-0.5, upper=1.5):
    u = eta = 0.0
    for side, sign in ((chosen, 1.0), (rejected, -1.0)):
        for token in range(len(side.policy)):
            if weights == 'column':
                w = side.columns['token_weight'][token]
            else:
                gap = side.models['positive'][token] - side.models['negative'][token]
                w = k * np.exp(sign * min(max(gap, lower), upper))
            u += sign * beta * w * log_ratios(side)[token]
            eta += sign * beta * w * kl(side, 'reverse_kl')[token]
    return softplus(-(u - kl_weight * eta))


def ld_dpo(chosen, rejected, beta=0.1, alpha=0.5):
    public = int(min(chosen.length, rejected.length))

    def hat(side):
        real = log_ratios(side)[side.weights > 0]
        return real[:public].sum() + alpha * real[public:].sum()

    return softplus(-beta * (hat(chosen) - hat(rejected)))


def sdpo(chosen, rejected, beta=0.1):
    sums = [log_ratios(side)[side.columns['segment'] > 0].sum() for side in (chosen, rejected)]
    return softplus(-beta * (sums[0] - sums[1]))


def token_weighted_dpo(chosen, rejected, beta=0.1):
    sums = [np.dot(side.columns['token_weight'], log_ratios(side)) for side in (chosen, rejected)]
    return softplus(-beta * (sums[0] - sums[1]))


LN_2 = 0.6931471805599453
ORACLES = {
    'tdpo1': tdpo1,
    'tdpo2': tdpo2,
    'tis_dpo': tis_dpo,
    'ld_dpo': ld_dpo,
    'sdpo': sdpo,
    'token_weighted_dpo': token_weighted_dpo,
}
COUPLED = {}
AT_REFERENCE = {'tdpo1': lambda: LN_2, 'tdpo2': lambda: LN_2, 'ld_dpo': lambda: LN_2}
LOGISTIC = {'tdpo1', 'ld_dpo', 'sdpo', 'token_weighted_dpo'}
# Log-ratios of 1 over 6 tokens and -0.5 over 9: three tokens of the rejected are beyond the chosen's length.
GOLDEN = [
    ('ld_dpo', {'beta': 0.1, 'alpha': 1.0}, 0.620957047790),
    ('ld_dpo', {'beta': 0.1, 'alpha': 0.0}, 0.628701091973),
]
