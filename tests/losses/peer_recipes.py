"""The peers' losses, each said in jaxpo's: what an objective must be for TRL's or Liger's number to come out.

A recipe is for one case of a golden file. Where the peer differs from what jaxpo has under the nearest name, the recipe
names the difference, of DIFFERENCES, and holds the plain objective too: that one must not give the peer's number.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from losses.peers import (
    Problem,
    likelihood,
    paired,
    plus,
    score_of,
    scored,
    value,
    with_scores,
    without_reference,
)

from jaxpo import losses
from jaxpo.losses import scores

DIFFERENCES = {
    'twice': 'Both peers leave out the factor 1/2 of SPPO: theirs is twice the loss.',
    'no shift': "The peers' `bco_pair` has no running mean of rewards: it is BCO with a shift of 0.",
    'one mean': "TRL's BCO has one running mean over all completions, not the midpoint of those of the two halves.",
    'completions': "TRL's BCO is a mean over completions, jaxpo's over rows: for pairs, jaxpo's is twice TRL's.",
    'deaf': "The peers' `sigmoid` takes label_smoothing and does nothing with it; in jaxpo that is `cdpo`.",
    'exponent': "TRL's alpha divergence has f'(u) = (u^(a - 1) - 1) / (a - 1): its a is 1 - alpha, 1/2 at 1/2 alone.",
    'unclamped': 'TRL does not clamp the product of the WPO weights at 1.',
    'weighting': 'TRL weighs any loss as WPO weighs DPO; jaxpo has the weights in `wpo` alone.',
    'tokens': "The peers average CPO's likelihood over the batch's tokens, as `sft`; the paper sums it, as `cpo`.",
    'prompt': "TRL's ORPO, and Liger's where asked, fits prompt and completion, averaged over the tokens of the batch.",
    'batch': "Liger's ORPO averages the likelihood over the chosen tokens of the batch, jaxpo within each pair.",
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    ours: Callable[[Problem], jax.Array]
    difference: str | None = None
    plain: Callable[[Problem], jax.Array] | None = None


# --- TRL's DPOTrainer -------------------------------------------------------------------------------------------------

DPO_TERMS = {
    'sigmoid': lambda s: {'dpo': {'beta': s['beta']}},
    'hinge': lambda s: {'hinge': {'beta': s['beta']}},
    'ipo': lambda s: {'ipo': {'tau': s['beta']}},
    'exo_pair': lambda s: {'exo': {'beta': s['beta'], 'label_smoothing': s['label_smoothing']}},
    'nca_pair': lambda s: {'nca': {'beta': s['beta']}},
    'robust': lambda s: {'robust_dpo': {'beta': s['beta'], 'label_smoothing': s.get('label_smoothing', 0.0)}},
    'bco_pair': lambda s: {'bco': {'beta': s['beta']}},
    'sppo_hard': lambda s: {'sppo': {'beta': s['beta'], 'weight': 2.0}},
    'aot': lambda s: {'aot': {'beta': s['beta'], 'label_smoothing': s.get('label_smoothing', 0.0)}},
    'aot_unpaired': lambda s: {'aot_unpaired': {'beta': s['beta'], 'label_smoothing': s.get('label_smoothing', 0.0)}},
    'apo_zero': lambda s: {'apo_zero': {'beta': s['beta']}},
    'apo_down': lambda s: {'apo_down': {'beta': s['beta']}},
    'discopop': lambda s: {'discopop': {'beta': s['beta'], 'tau': s.get('discopop_tau', 0.05)}},
    'sft': lambda s: {'sft': {}},
    'sigmoid_norm': lambda s: {'ln_dpo': {'beta': s['beta']}},
}
DIVERGENCES = {
    'forward_kl': lambda s: {'divergence': 'forward_kl'},
    'js_divergence': lambda s: {'divergence': 'jensen_shannon'},
    'alpha_divergence': lambda s: {'divergence': 'alpha', 'alpha': 1 - s.get('f_alpha_divergence_coef', 0.5)},
}


def dpo_trainer(settings):
    types = settings['loss_type']
    weights = settings.get('loss_weights') or [1.0] * len(types)
    spec = {}
    for loss_type, weight in zip(types, weights, strict=True):
        for name, numbers in DPO_TERMS[loss_type](settings).items():
            spec[name] = {**numbers, 'weight': weight * numbers.get('weight', 1.0)}
    divergence = settings.get('f_divergence_type', 'reverse_kl')
    if settings.get('use_weighting'):
        return _weighted(types, spec, settings)
    if 'ld_alpha' in settings:
        return _rescored(types, spec, settings, 'ld_dpo', {'alpha': settings['ld_alpha']})
    if divergence != 'reverse_kl':
        return _divergent(types, spec, settings, divergence)
    if types == ['bco_pair']:
        return Recipe(paired(**spec), 'no shift', lambda problem: _running(problem.pair, spec))
    if types == ['sppo_hard']:
        return Recipe(paired(**spec), 'twice', paired(sppo={'beta': settings['beta']}))
    if types == ['sigmoid'] and settings.get('label_smoothing'):
        smoothed = {'beta': settings['beta'], 'label_smoothing': settings['label_smoothing']}
        return Recipe(paired(**spec), 'deaf', paired(cdpo=smoothed))
    return Recipe(paired(**spec))


def _running(sides, spec):
    """BCO as jaxpo trains with it: its state updated by the step's own completions."""
    entry = losses.find('bco')
    return value(spec, sides, {'bco': entry.updated(entry.init_state(), *jax.lax.stop_gradient(sides))})


def _rescored(types, spec, settings, name, hyperparameters):
    """A loss of DPO's margin with another score in place of the log-ratio: its own method where it is DPO's link."""
    if types == ['sigmoid']:
        return Recipe(paired(**{name: {'beta': settings['beta'], **hyperparameters}}))
    if types == ['sft']:
        return Recipe(paired(**spec))
    return Recipe(with_scores(score_of(name, **hyperparameters), **spec))


def _divergent(types, spec, settings, divergence):
    hyperparameters = DIVERGENCES[divergence](settings)
    recipe = _rescored(types, spec, settings, 'f_dpo', hyperparameters)
    alpha = hyperparameters.get('alpha', 0.5)
    if alpha == 0.5 or types == ['sft']:
        return recipe
    misread = _rescored(types, spec, settings, 'f_dpo', {**hyperparameters, 'alpha': 1 - alpha})
    return Recipe(recipe.ours, 'exponent', misread.ours)


def _weighted(types, spec, settings):
    """WPO's weights: clamped by jaxpo, and in `wpo` only."""

    def products(problem):
        alike = [
            (side.weights * (side.policy_logps - side.log_sum_squares)).sum(axis=1) / scores.length(side)
            for side in problem.pair
        ]
        return jax.lax.stop_gradient(jnp.exp(alike[0] + alike[1]))

    def each(problem, name, hyperparameters, weight):
        values, _ = losses.find(name)(*problem.pair, **hyperparameters)
        return (values * weight).mean()

    if types == ['sigmoid']:
        beta = {'beta': settings['beta']}
        return Recipe(
            lambda problem: each(problem, 'wpo', beta, jnp.maximum(products(problem), 1)), 'unclamped', paired(wpo=beta)
        )
    ((name, numbers),) = spec.items()
    numbers = {key: number for key, number in numbers.items() if key != 'weight'}
    return Recipe(lambda problem: each(problem, name, numbers, products(problem)), 'weighting', paired(**spec))


# --- TRL's other trainers ---------------------------------------------------------------------------------------------


def kto_trainer(settings):
    numbers = {key: settings[key] for key in ('beta', 'desirable_weight', 'undesirable_weight')}
    spec = {
        'kto': {'kto': numbers},
        'apo_zero_unpaired': {'apo_zero': {'beta': settings['beta']}},
    }[settings['loss_type']]
    return Recipe(lambda problem: value(spec, problem.unpaired(settings['labels'])))


def cpo_trainer(settings):
    beta, alpha, smoothing = settings['beta'], settings['cpo_alpha'], settings['label_smoothing']
    gamma = settings['simpo_gamma']
    preference = {
        'sigmoid': paired(cpo={'beta': beta, 'nll_weight': 0.0}),
        'hinge': without_reference(hinge={'beta': beta}),
        'ipo': without_reference(ipo={'tau': beta}),
        'simpo': paired(simpo={'beta': beta, 'gamma': gamma}),
        'alphapo': paired(alpha_po={'beta': beta, 'gamma': gamma, 'alpha': settings['alpha']}),
    }[settings['loss_type']]
    if smoothing:
        preference = _smoothed(settings['loss_type'], beta, gamma, smoothing)
    if settings['loss_type'] == 'alphapo' or not alpha:
        return Recipe(preference)
    ours = plus(preference, likelihood(alpha))
    if settings['loss_type'] == 'sigmoid' and not smoothing:
        return Recipe(ours, 'tokens', paired(cpo={'beta': beta, 'nll_weight': alpha}))
    return Recipe(ours)


def _smoothed(loss_type, beta, gamma, label_smoothing):
    """cDPO's link on the margin of a loss without a reference."""
    numbers = {'beta': beta, 'label_smoothing': label_smoothing}
    if loss_type == 'sigmoid':
        return without_reference(cdpo=numbers)
    return with_scores(lambda problem: [*map(scores.mean_logp, problem.pair)], -gamma / beta, cdpo=numbers)


def orpo_trainer(settings):
    return _orpo(settings['beta'], 'whole', 'prompt')


def _orpo(beta, mask, difference):
    """ORPO with its likelihood exchanged for one averaged over the batch's tokens."""
    whole = paired(orpo={'odds_ratio_weight': beta})
    return Recipe(plus(whole, lambda p: scores.mean_logp(p.pair[0]).mean(), likelihood(1.0, mask)), difference, whole)


def tpo_trainer(settings):
    beta, gamma = settings['beta'], settings['tpo_l_gamma']
    preference = {
        'sigmoid': paired(cpo={'beta': beta, 'nll_weight': 0.0}),
        'hinge': without_reference(hinge={'beta': beta}),
        'ipo': without_reference(ipo={'tau': beta}),
        'tpo-l': paired(simpo={'beta': beta, 'gamma': gamma}),
    }[settings['loss_type']]
    if settings['label_smoothing']:
        preference = _smoothed(settings['loss_type'], beta, gamma, settings['label_smoothing'])
    if not settings['tpo_alpha']:
        return Recipe(preference)
    return Recipe(plus(preference, likelihood(settings['tpo_alpha'], first=8, last=12)))


def bco_trainer(settings, earlier):
    """`earlier`: the problems of the steps before, and of this one."""
    labels, beta = settings['labels'], settings['beta']
    entry, spec = losses.find('bco'), {'bco': {'beta': beta}}
    state = entry.init_state()
    for problem in earlier:
        state = entry.updated(state, *problem.unpaired(labels))

    def running(problem):
        return value(spec, problem.unpaired(labels), {'bco': state})

    if sum(labels) * 2 == len(labels):
        return Recipe(running, 'completions', lambda problem: value(spec, problem.pair, {'bco': state}))
    shift = {'count': jnp.ones(2), 'mean': jnp.full(2, settings['deltas'][-1] / beta)}
    return Recipe(lambda problem: value(spec, problem.unpaired(labels), {'bco': shift}), 'one mean', running)


# --- Liger ------------------------------------------------------------------------------------------------------------


def liger_dpo(settings, call):
    beta = settings['beta']
    if settings['average_log_prob']:
        recipe = Recipe(paired(ln_dpo={'beta': beta}))
    elif not settings['use_ref_model']:
        recipe = Recipe(without_reference(dpo={'beta': beta}))
    else:
        recipe = dpo_trainer({**settings, 'loss_type': [settings['loss_type']]})
    if settings['compute_nll_loss']:
        return Recipe(plus(recipe.ours, likelihood(settings['alpha'])))
    return recipe


def liger_cpo(settings, call):
    alpha = settings['alpha'] if settings['compute_nll_loss'] else 0.0
    return cpo_trainer({**settings, 'loss_type': 'sigmoid', 'cpo_alpha': alpha, 'simpo_gamma': 0.0})


def liger_simpo(settings, call):
    alpha = settings['alpha'] if settings['compute_nll_loss'] else 0.0
    return cpo_trainer({**settings, 'loss_type': 'simpo', 'cpo_alpha': alpha, 'simpo_gamma': settings['gamma']})


def liger_orpo(settings, call):
    return _orpo(settings['beta'], *(('whole', 'prompt') if 'nll_target' in call else ('completion', 'batch')))


def liger_kto(settings, call, labels, kl):
    """The KL is given: here as mismatched completions of that log-ratio. Without one it is 0: unpaired APO-zero."""
    if 'kl' not in call:
        return Recipe(lambda problem: value({'apo_zero': {'beta': settings['beta']}}, problem.unpaired(labels)))

    def scalar(problem):
        chosen, rejected = problem.unpaired(labels)
        mismatched = scored(problem.rows('completion', 0, 8), jnp.full(8, kl))
        return value(
            {'kto': {'beta': settings['beta']}}, (chosen.replace(companions={'mismatched': mismatched}), rejected)
        )

    return Recipe(scalar)
