"""jaxpo/losses/batch.py once more."""

import numpy as np
from losses.oracles.side import sigmoid, softplus


def kto(chosen, rejected, frozen, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    mismatched = [side.companions['mismatched'] for side in frozen[0]]
    ratios = [side.log_ratio for side in mismatched if side.length > 0]
    z = max(0.0, float(np.mean(ratios))) if ratios else 0.0
    losses = []
    for good, bad in zip(chosen, rejected):
        loss = 0.0
        if good.length > 0:
            loss += desirable_weight * (1 - sigmoid(beta * (good.log_ratio - z)))
        if bad.length > 0:
            loss += undesirable_weight * (1 - sigmoid(beta * (z - bad.log_ratio)))
        losses.append(loss)
    return losses


def quantiles_matched(first, second, beta, label_smoothing):
    """The i-th smallest of `first` against the i-th smallest of `second`; the loss stands where the first one stood."""
    losses = np.zeros(len(first))
    by_first = sorted(range(len(first)), key=lambda i: first[i])
    for place, other in zip(by_first, sorted(second)):
        z = beta * (first[place] - other)
        losses[place] = (1 - label_smoothing) * softplus(-z) + label_smoothing * softplus(z)
    return losses


def aot(chosen, rejected, beta=0.01, label_smoothing=0.0):
    policy = [good.logp - bad.logp for good, bad in zip(chosen, rejected)]
    reference = [good.reference_logp - bad.reference_logp for good, bad in zip(chosen, rejected)]
    return quantiles_matched(policy, reference, beta, label_smoothing)


def aot_unpaired(chosen, rejected, beta=0.01, label_smoothing=0.0):
    good, bad = ([side.log_ratio for side in sides] for sides in (chosen, rejected))
    return quantiles_matched(good, bad, beta, label_smoothing)


ORACLES = {}
COUPLED = {'kto': kto, 'aot': aot, 'aot_unpaired': aot_unpaired}
AT_REFERENCE = {'aot': lambda: 0.6931471805599453, 'aot_unpaired': lambda: 0.6931471805599453}
LOGISTIC = set()
GOLDEN = [
    # A step of one pair is DPO.
    ('aot', {'beta': 0.1}, 0.620957047790),
    ('aot_unpaired', {'beta': 0.1}, 0.620957047790),
    ('aot', {'beta': 0.1, 'label_smoothing': 0.1}, 0.635957047790),
]
