"""jaxpo/losses/priors.py once more: `mi` as the loss that its prior recovers, not by way of the prior."""

import numpy as np
from losses.oracles.side import softplus


def _reference(chosen, rejected, alpha, frozen, given):
    return chosen.log_ratio - rejected.log_ratio


def _tempered(chosen, rejected, alpha, frozen, given):
    tempered = [side.logp - side.reference_logp / given['entropy_weight'] for side in (chosen, rejected)]
    return tempered[0] - tempered[1]


def _length_penalised(chosen, rejected, alpha, frozen, given):
    return chosen.log_ratio - rejected.log_ratio + given['length_penalty'] / alpha * (chosen.length - rejected.length)


def _averaged_ratio(chosen, rejected, alpha, frozen, given):
    return chosen.log_ratio / chosen.length - rejected.log_ratio / rejected.length


def _averaged(chosen, rejected, alpha, frozen, given):
    return chosen.logp / chosen.length - rejected.logp / rejected.length - given['gamma'] / alpha


def _divergence(side):
    return side.sum(side.statistics['forward_kl'])


def _token_level(chosen, rejected, alpha, frozen, given):
    return chosen.log_ratio - rejected.log_ratio + _divergence(chosen) - _divergence(rejected)


def _token_level_stopped(chosen, rejected, alpha, frozen, given):
    divergence = _divergence(rejected) - _divergence(frozen[0])
    return chosen.log_ratio - rejected.log_ratio - given['divergence_weight'] * divergence


def _uniform(chosen, rejected, alpha, frozen, given):
    return chosen.logp - rejected.logp


def _offset(chosen, rejected, alpha, frozen, given):
    ahead = max(chosen.columns['score'] - rejected.columns['score'], 1e-6)
    return chosen.log_ratio - rejected.log_ratio - given['offset'] / alpha * np.log(ahead)


def _importance(side, sign, given):
    gap = np.clip(side.models['positive'] - side.models['negative'], given['lower'], given['upper'])
    return given['k'] * np.exp(sign * gap)


def _importance_sampled(chosen, rejected, alpha, frozen, given):
    total = 0.0
    for side, sign in ((chosen, 1), (rejected, -1)):
        by_token = side.policy - side.reference - given['kl_weight'] * side.statistics['reverse_kl']
        total += sign * side.sum(_importance(side, sign, given) * by_token)
    return total


def _importance_given(chosen, rejected, alpha, frozen, given):
    total = 0.0
    for side, sign in ((chosen, 1), (rejected, -1)):
        by_token = side.policy - side.reference - given['kl_weight'] * side.statistics['reverse_kl']
        total += sign * side.sum(side.columns['token_weight'] * by_token)
    return total


def _activity(side):
    """Each activation scaled to [0, 1] over the completion's tokens, 1 where it is constant; averaged."""
    real = side.weights > 0
    kinds = []
    for each in side.activations.values():
        low, high = (each[:, real].min(axis=1, keepdims=True), each[:, real].max(axis=1, keepdims=True))
        kinds.append(np.where(high > low, (each - low) / np.where(high > low, high - low, 1.0), 1.0).mean(axis=0))
    return np.mean(kinds, axis=0)


def _activation_masked(chosen, rejected, alpha, frozen, given):
    total = 0.0
    for side, sign in ((chosen, 1), (rejected, -1)):
        by_token = side.policy - side.reference + side.statistics['forward_kl']
        total += sign * side.sum(_activity(side) * by_token)
    return total


MARGINS = {
    'dpo': _reference,
    'h_dpo': _tempered,
    'r_dpo': _length_penalised,
    'ln_dpo': _averaged_ratio,
    'simpo': _averaged,
    'tdpo1': _token_level,
    'tdpo2': _token_level_stopped,
    'uniform': _uniform,
    'odpo': _offset,
    'tis_dpo': _importance_sampled,
    'tis_dpo_column': _importance_given,
    'mapo': _activation_masked,
}


def mi(
    chosen,
    rejected,
    alpha=0.1,
    prior='dpo',
    frozen=None,
    entropy_weight=None,
    length_penalty=None,
    gamma=None,
    divergence_weight=None,
    offset=None,
    kl_weight=None,
    k=None,
    lower=None,
    upper=None,
):
    given = {
        'entropy_weight': entropy_weight,
        'length_penalty': length_penalty,
        'gamma': gamma,
        'divergence_weight': divergence_weight,
        'offset': offset,
        'kl_weight': kl_weight,
        'k': k,
        'lower': lower,
        'upper': upper,
    }
    return softplus(-alpha * MARGINS[prior](chosen, rejected, alpha, frozen, given))


ORACLES = {'mi': mi}
COUPLED = {}
AT_REFERENCE = {'mi': lambda: float(np.log(2.0))}
LOGISTIC = {'mi'}
GOLDEN = [
    ('mi', {'alpha': 0.1}, 0.620957047790),
    ('mi', {'alpha': 0.1, 'prior': 'r_dpo', 'length_penalty': 0.02}, 0.649159339026),
    ('mi', {'alpha': 0.09, 'prior': 'h_dpo', 'entropy_weight': 0.9}, 0.634946101596),
    ('mi', {'alpha': 2.0, 'prior': 'ln_dpo'}, 0.495415731984),
    ('mi', {'alpha': 0.1, 'prior': 'uniform'}, 0.554355244469),
    ('mi', {'alpha': 2.0, 'prior': 'simpo', 'gamma': 1.0}, 1.839674655553),
]
