"""jaxpo/losses/moments.py once more. The draw of beta_dpo is made again with JAX's noise, but by sorting names."""

import math

import jax
import numpy as np
from losses.oracles.side import softplus


def bco(chosen, rejected, state, frozen, beta=0.01):
    halves = []
    for half, sides in enumerate(frozen):
        count, mean = float(state['count'][half]), float(state['mean'][half])
        ratios = [side.log_ratio for side in sides if side.length > 0]
        if count + len(ratios) > 0:
            halves.append((count * mean + sum(ratios)) / (count + len(ratios)))
    delta = beta * sum(halves) / max(len(halves), 1)
    losses = []
    for good, bad in zip(chosen, rejected):
        loss = softplus(-(beta * good.log_ratio - delta)) if good.length > 0 else 0.0
        loss += softplus(beta * bad.log_ratio - delta) if bad.length > 0 else 0.0
        losses.append(loss)
    return losses


def moved(state, values, momentum):
    """Running mean and standard deviation after this step's values."""
    mean, std = float(state['mean']), float(state['std'])
    if len(values) > 0:
        mean = momentum * mean + (1 - momentum) * np.mean(values)
    if len(values) > 1:
        std = momentum * std + (1 - momentum) * np.std(values, ddof=1)
    return mean, std


def beta_dpo(chosen, rejected, state, key, frozen, beta=0.1, alpha=0.6, rho=0.2, momentum=0.9):
    there = [i for i, side in enumerate(frozen[0]) if side.length > 0]
    gaps = [good.log_ratio - bad.log_ratio for good, bad in zip(*frozen)]
    mean, std = moved(state, [gaps[i] for i in there], momentum)
    likelihood = {}
    for place, i in enumerate(there):
        z = (gaps[i] - mean) / std if std > 0 else 0.0
        likelihood[i] = -(z**2) / 2 + float(jax.random.gumbel(jax.random.fold_in(key, place), (), np.float64))
    kept = sorted(there, key=lambda i: -likelihood[i])[: max(1, math.floor((1 - rho) * len(there)))]
    step_beta = max(1e-3, beta * (1 + alpha * (np.mean([gaps[i] for i in kept]) - mean)))
    losses = np.zeros(len(chosen))
    for i in kept:
        losses[i] = softplus(-step_beta * (chosen[i].log_ratio - rejected[i].log_ratio)) * len(there) / len(kept)
    return losses


def alpha_dpo(chosen, rejected, state, frozen, beta=2.5, gamma=1.5, alpha=0.2, momentum=0.9):
    def mean_gap(good, bad):
        return good.log_ratio / good.length - bad.log_ratio / bad.length

    there = [good.length > 0 for good in frozen[0]]
    mean, std = moved(state, [mean_gap(*pair) for pair, real in zip(zip(*frozen), there) if real], momentum)
    losses = []
    for good, bad, *still in zip(chosen, rejected, *frozen):
        if good.length == 0:
            losses.append(0.0)
            continue
        z = (mean_gap(*still) - mean) / std if std > 0 else 0.0
        margin = good.logp / good.length - bad.logp / bad.length
        losses.append(softplus(-(beta * (margin - alpha * z) - gamma)))
    return losses


ORACLES = {}
COUPLED = {'bco': bco, 'beta_dpo': beta_dpo, 'alpha_dpo': alpha_dpo}
AT_REFERENCE = {}
LOGISTIC = set()
GOLDEN = []
