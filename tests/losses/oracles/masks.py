"""jaxpo/losses/masks.py once more."""

import numpy as np
from losses.oracles.side import softplus


def masked_logit(chosen, rejected, beta, masks):
    """u - delta, for masks (m_u, m_d) of each side."""
    u = delta = 0.0
    for side, (reward, kl), sign in zip((chosen, rejected), masks, (1.0, -1.0)):
        u += sign * beta * side.sum(reward * (side.policy - side.reference))
        delta -= sign * beta * side.sum(kl * side.statistics['forward_kl'])
    return u - delta


def zn_rescale(values, weights):
    """Standardised over the completion, then to [0, 1]; 1 where there is no spread; 0 outside."""
    real = weights > 0
    mask = np.zeros_like(values)
    if real.any():
        spread = values[real].std()
        z = (values[real] - values[real].mean()) / spread if spread > 0 else np.zeros(real.sum())
        mask[real] = (z - z.min()) / (z.max() - z.min()) if spread > 0 else 1.0
    return mask


def activation_mask(side):
    kinds = [
        np.mean([zn_rescale(values, side.weights) for values in each], axis=0) for each in side.activations.values()
    ]
    return np.mean(kinds, axis=0)


def mapo(chosen, rejected, beta=0.1):
    masks = [(activation_mask(side),) * 2 for side in (chosen, rejected)]
    return softplus(-masked_logit(chosen, rejected, beta, masks))


def sparse_po(chosen, rejected, beta=0.1, reward_sparsity=0.0, kl_sparsity=0.0, masks='common'):
    pairs = [(side.masks['reward'], side.masks['kl']) for side in (chosen, rejected)]
    value = softplus(-masked_logit(chosen, rejected, beta, pairs))
    if masks == 'common':
        reward_sparsity, kl_sparsity = reward_sparsity / 2, kl_sparsity / 2
    for side, (reward, kl) in zip((chosen, rejected), pairs):
        value += reward_sparsity * side.sum(np.abs(reward)) + kl_sparsity * side.sum(np.abs(kl))
    return value


def learned_mask(params, hidden):
    """The mask of one token from its hidden states [L, D]."""
    by_layer = []
    for layer, state in enumerate(hidden):
        normal = (state - state.mean()) / np.sqrt(state.var() + 1e-5)
        normal = params['norm_scale'] * normal + params['norm_bias']
        by_layer.append(max(0.0, params['weights'][layer] @ normal + params['bias'][layer]))
    return max(0.0, float(np.dot(params['mixing'], by_layer)))


ORACLES = {'mapo': mapo, 'sparse_po': sparse_po}
COUPLED = {}
AT_REFERENCE = {}
LOGISTIC = {'mapo', 'sparse_po'}
GOLDEN = []
