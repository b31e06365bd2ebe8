"""What a policy gained for how far it went from its reference: points (KL, reward) of a method's runs.

The points are those of one method and one seed over all its settings and steps. Step 0 is (0, the reference's reward),
a point like others, to be given by the caller. KL is in nats (of a sequence, usually), reward in the metric's units.
Neither function extrapolates: what was not reached is None.
"""

import numpy as np
from scipy import integrate

from jaxpo.errors import InputError


def pareto_front(kl: np.ndarray, reward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points, by growing KL, with more reward than every point at the same or at less KL: two arrays `[m]`.

    A maximum over points that are themselves uncertain is too high on average, the more so the more points there are:
    compare methods by equally many. InputError for arrays of unequal length, of none, or that are not finite.
    """
    kl, reward = (np.asarray(values, dtype=np.float64) for values in (kl, reward))
    if kl.ndim != 1 or kl.shape != reward.shape or not kl.size:
        raise InputError(f'frontier: KL and reward are one each a point, not of shapes {kl.shape} and {reward.shape}.')
    wrong = int(np.count_nonzero(~(np.isfinite(kl) & np.isfinite(reward))))
    if wrong:
        raise InputError(f'frontier: {wrong} of {kl.size} points are not finite.')
    order = np.lexsort((-reward, kl))
    kl, reward = kl[order], reward[order]
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(reward)[:-1]])
    return kl[reward > best_before], reward[reward > best_before]


def at_matched_kl(kl: np.ndarray, reward: np.ndarray, target_kl: float) -> float | None:
    """Reward on the front of points `[n]` at `target_kl`: linear between its points, level behind the last of them.

    None where `target_kl` is below the smallest or above the largest KL of all points.
    """
    front = pareto_front(kl, reward)
    if not np.min(kl) <= target_kl <= np.max(kl):
        return None
    return float(np.interp(target_kl, *front))


def area_under_frontier(kl: np.ndarray, reward: np.ndarray, up_to_kl: float, from_kl: float = 0.0) -> float | None:
    """Integral of the front, as of `at_matched_kl`, over KL between two bounds: reward times nats.

    Divided by `up_to_kl - from_kl` it is the mean reward over that range. None where either bound was not reached.
    InputError unless `from_kl < up_to_kl`.
    """
    if not from_kl < up_to_kl:
        raise InputError(f'frontier: area from KL {from_kl} to {up_to_kl}: the second must be the larger.')
    ends = [at_matched_kl(kl, reward, bound) for bound in (from_kl, up_to_kl)]
    if None in ends:
        return None
    front_kl, front_reward = pareto_front(kl, reward)
    inside = (from_kl < front_kl) & (front_kl < up_to_kl)
    return float(
        integrate.trapezoid(
            np.concatenate([ends[:1], front_reward[inside], ends[1:]]),
            np.concatenate([[from_kl], front_kl[inside], [up_to_kl]]),
        )
    )
