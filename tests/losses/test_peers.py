"""Every loss of TRL and Liger against jaxpo's: values and gradients that their own code gave, held in golden files.

The files are made by tests/golden/make_trl_losses.py, make_trl_bco.py and make_liger_losses.py. All of Liger's
preference losses run on a CPU and are here; its Triton kernels need a GPU and hold none. TRL's online DPO generates
within its step and is not here: its losses are DPO's `sigmoid` and `ipo` of sums.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import peer_recipes as recipes
from losses import peers

from jaxpo import logps

GOLDEN = pathlib.Path(__file__).parents[1] / 'golden'
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(GOLDEN.glob('trl_*.json'))}
LIGER = json.loads((GOLDEN / 'liger_losses.json').read_text())
CASES = [(name, case) for name, file in FILES.items() for case in file['cases']]
IDS = [f'{name}-{case["name"]}' for name, case in CASES]
WHOLE = 'target_with_prompt'
LIGER_IDS = [case['name'] for case in LIGER['cases']]

TRAINERS = {
    'DPOTrainer': recipes.dpo_trainer,
    'KTOTrainer': recipes.kto_trainer,
    'CPOTrainer': recipes.cpo_trainer,
    'ORPOTrainer': recipes.orpo_trainer,
    'TPOTrainer': recipes.tpo_trainer,
    'BCOTrainer': recipes.bco_trainer,
}
FUSED = {
    'LigerFusedLinearDPOLoss': recipes.liger_dpo,
    'LigerFusedLinearCPOLoss': recipes.liger_cpo,
    'LigerFusedLinearSimPOLoss': recipes.liger_simpo,
    'LigerFusedLinearORPOLoss': recipes.liger_orpo,
    'LigerFusedLinearKTOLoss': functools.partial(
        recipes.liger_kto, labels=LIGER['inputs']['preference_labels'], kl=LIGER['inputs']['kl']
    ),
}
# Of the largest number of what is compared. Where the peer computes in float64 throughout, only rounding is left. In
# float32 a log-ratio of some 20 nats is off by 1e-6, and so, relatively, is its exponential; `ipo` squares that.
TOLERANCE = {'float64': 1e-12, 'float32': 1e-6, 'exponential': 5e-6}
ROUNDS = {'ORPOTrainer', 'BCOTrainer'}  # its odds, and its running mean, to float32


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def batch_of(name, case):
    """Arrays of a case's inputs; TPO's gold completions are four further rows."""
    batch = dict(FILES[name]['inputs'][case['inputs']])
    mismatched = batch.pop('mismatched', None)
    if case['peer'] == 'TPOTrainer' and case['settings']['tpo_alpha']:
        batch = {key: [*rows, *mismatched[key][:4]] for key, rows in batch.items()}
    return {key: np.array(rows) for key, rows in batch.items()}, mismatched


def statistics(logits, tokens):
    """Log-probabilities of the next tokens `[R, T - 1]`, and log sum_v pi(v)^2."""
    distribution = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    found = jnp.take_along_axis(distribution, jnp.asarray(tokens)[:, 1:, None], axis=-1)[..., 0]
    return found, jax.nn.logsumexp(2 * distribution, axis=-1)


def problem_of(batch, policy_logits, mismatched=None):
    policy, squares = statistics(policy_logits, batch['tokens'])
    reference, _ = statistics(jnp.asarray(batch['reference']), batch['tokens'])
    masks = {'completion': batch['completion_mask'][:, 1:] > 0, 'whole': batch['attention_mask'][:, 1:] > 0}
    if mismatched is not None:
        arrays = {key: np.array(rows) for key, rows in mismatched.items()}
        mismatched = problem_of(arrays, jnp.asarray(arrays['policy']))
    return peers.Problem(policy, reference, squares, masks, mismatched)


def recipe_of(name, case):
    if case['peer'] != 'BCOTrainer':
        return TRAINERS[case['peer']](case['settings'])
    batches = [batch_of(name, {**case, 'inputs': inputs})[0] for inputs in case['settings']['steps']]
    earlier = [problem_of(batch, jnp.asarray(batch['policy'])) for batch in batches]
    return recipes.bco_trainer(case['settings'], earlier)


def computed(name, case, scalar):
    """Value and gradient by the policy's logits."""
    batch, mismatched = batch_of(name, case)

    def of_logits(logits):
        return scalar(problem_of(batch, logits, mismatched))

    return jax.value_and_grad(of_logits)(jnp.asarray(batch['policy']))


def off(ours, theirs):
    """The largest difference, as a share of the largest number."""
    return float(np.abs(np.asarray(ours) - np.asarray(theirs)).max() / np.abs(np.asarray(theirs)).max())


def tolerance_of(case):
    if case['settings'].get('f_divergence_type') == 'alpha_divergence':
        return TOLERANCE['exponential']
    return TOLERANCE['float32' if case['peer'] in ROUNDS else case['dtype']]


@pytest.mark.parametrize('name, case', CASES, ids=IDS)
def test_trl(name, case):
    value, gradient = computed(name, case, recipe_of(name, case).ours)
    assert off(value, case['loss']) < tolerance_of(case)
    assert off(gradient, case['gradient']) < tolerance_of(case)


def differs(value, gradient, case_value, case_gradient):
    """Beyond any rounding, in value or gradient."""
    return max(off(value, case_value), off(gradient, case_gradient)) > 1e-3


@pytest.mark.parametrize('name, case', CASES, ids=IDS)
def test_trl_differs_where_the_recipe_says_so(name, case):
    recipe = recipe_of(name, case)
    if recipe.difference == 'unclamped' and case['inputs'] == 'random':  # no product is above 1
        return
    if recipe.difference:
        assert recipe.difference in recipes.DIFFERENCES
        value, gradient = computed(name, case, recipe.plain)
        assert differs(value, gradient, case['loss'], case['gradient'])


def test_wpo_is_trls_where_no_weight_is_clamped():
    (case,) = (c for n, c in CASES if c['inputs'] == 'random' and c['settings'].get('use_weighting'))
    value, gradient = computed('trl_dpo', case, recipe_of('trl_dpo', case).plain)
    assert max(off(value, case['loss']), off(gradient, case['gradient'])) < TOLERANCE['float64']


def test_every_loss_of_the_peers_has_a_case():
    for name in ('trl_dpo', 'trl_f_divergences'):
        assert set(FILES[name]['loss_types']) == set(recipes.DPO_TERMS)
    seen = {word for word in FILES['trl_dpo']['cases'] for word in word['settings']['loss_type']}
    assert seen == set(recipes.DPO_TERMS)
    fused = {case['settings'].get('loss_type') for case in LIGER['cases'] if case['peer'] == 'LigerFusedLinearDPOLoss'}
    assert fused == set(LIGER['loss_types'])
    assert {case['peer'] for _, case in CASES} == set(TRAINERS)
    assert {case['peer'] for case in LIGER['cases']} == set(FUSED)


def test_every_difference_is_met():
    met = {recipe_of(name, case).difference for name, case in CASES}
    met |= {FUSED[case['peer']](case['settings'], case['call']).difference for case in LIGER['cases']}
    assert met - {None} == set(recipes.DIFFERENCES)


def test_exchanged_completions_are_noticed():
    """The comparison can fail: the same recipes, chosen and rejected exchanged."""
    for name, case in CASES:
        if case['peer'] == 'DPOTrainer' and case['inputs'] == 'sure':
            batch, _ = batch_of(name, case)
            exchanged = {key: np.roll(rows, 4, axis=0) for key, rows in batch.items()}
            value = recipe_of(name, case).ours(problem_of(exchanged, jnp.asarray(exchanged['policy'])))
            assert off(value, case['loss']) > 1e-3, case['name']


def plain_statistics(hidden, head, targets):
    logits = jnp.einsum('rsd,vd->rsv', hidden, head)
    return jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]


def fused_statistics(hidden, head, targets):
    hidden, head = hidden.astype(jnp.float32), head.astype(jnp.float32)
    return logps.token_statistics(hidden, head, targets, slab=3).logps


@pytest.mark.parametrize('case', LIGER['cases'], ids=LIGER_IDS)
def test_liger(case):
    equals_liger(case, plain_statistics)


@pytest.mark.parametrize(
    'case', {case['peer']: case for case in LIGER['cases']}.values(), ids=lambda case: case['peer']
)
def test_liger_through_the_fused_head(case):
    equals_liger(case, fused_statistics)


def equals_liger(case, token_logps):
    """Value, and gradients by hidden states and head."""
    ours = FUSED[case['peer']](case['settings'], case['call']).ours
    value, gradients = jax.value_and_grad(liger_scalar(ours, token_logps), argnums=(0, 1))(*liger_models()[0])
    assert off(value, case['loss']) < TOLERANCE['float32']
    assert off(gradients[0], case['hidden_gradient']) < TOLERANCE['float32']
    assert off(gradients[1], case['head_gradient']) < TOLERANCE['float32']


@pytest.mark.parametrize('case', LIGER['cases'], ids=LIGER_IDS)
def test_liger_differs_where_the_recipe_says_so(case):
    recipe = FUSED[case['peer']](case['settings'], case['call'])
    if recipe.difference:
        scalar = liger_scalar(recipe.plain, plain_statistics)
        value, gradient = jax.value_and_grad(scalar)(*liger_models()[0])
        assert differs(value, gradient, case['loss'], case['hidden_gradient'])


def liger_models():
    arrays = {name: jnp.asarray(LIGER['inputs'][name]) for name in ('hidden', 'head')}
    reference = {name: jnp.asarray(LIGER['inputs'][f'reference_{name}']) for name in ('hidden', 'head')}
    return tuple(arrays.values()), tuple(reference.values())


def liger_scalar(ours, token_logps):
    masks = {name: np.array(LIGER['inputs'][target]) for name, target in (('completion', 'target'), ('whole', WHOLE))}
    targets = jnp.asarray(np.maximum(masks['whole'], 0))
    masks = {name: target >= 0 for name, target in masks.items()}
    reference = token_logps(*liger_models()[1], targets)

    def scalar(hidden, head):
        return ours(peers.Problem(token_logps(hidden, head, targets), reference, None, masks))

    return scalar
