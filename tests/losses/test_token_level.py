"""The losses on tokens: their golden values, from logits to loss, and the equalities between them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses.oracles import masks as oracle

from jaxpo import losses
from jaxpo.errors import InputError
from jaxpo.losses import contract
from jaxpo.losses.masks import activation_mask, init_params, token_masks
from jaxpo.types import Completion

LN_2 = 0.6931471805599453
NAMES = ('tdpo1', 'tdpo2', 'tis_dpo', 'ld_dpo', 'sdpo', 'token_weighted_dpo', 'mapo', 'sparse_po')
CHOSEN_LOGITS = [[1, 0, -1], [0.5, 0.2, 0]], [[0.8, 0.1, -0.5], [0, 0, 0]], [0, 1]
REJECTED_LOGITS = (
    [[0, 1, 0], [0.3, -0.3, 0], [1, 1, -1]],
    [[0.2, 0.5, 0], [0, 0, 0.1], [0.5, 1, 0]],
    [1, 2, 0],
)


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def from_logits(policy, reference, tokens, token_weight=None, masks=()):
    """A completion of one pair, padded to 4 tokens with numbers that nobody may read."""
    policy, reference = log_softmax(policy), log_softmax(reference)
    place = np.arange(len(tokens)), np.asarray(tokens)

    def padded(values):
        return jnp.asarray([[*values, *[7.0] * (4 - len(values))]])

    return Completion(
        padded(policy[place]),
        padded(reference[place])[None],
        padded(np.ones(len(tokens))).at[:, len(tokens) :].set(0.0),
        forward_kl=padded((np.exp(reference) * (reference - policy)).sum(-1)),
        reverse_kl=padded((np.exp(policy) * (policy - reference)).sum(-1)),
        columns={} if token_weight is None else {'token_weight': padded(token_weight)},
        masks={name: padded(mask) for name, mask in masks},
    )


@pytest.mark.parametrize(
    'name, options, value',
    [
        ('tdpo1', {}, 0.871616914639),
        ('tdpo2', {'alpha': 0.5}, 0.851441098626),
        ('tis_dpo', {'weights': 'column', 'kl_weight': 0.0}, 0.823311865929),
        ('tis_dpo', {'weights': 'column', 'kl_weight': 1.0}, 0.785878199416),
        ('tis_dpo', {'weights': 'column', 'kl_weight': 0.5}, 0.804453261178),
        ('token_weighted_dpo', {}, 0.823311865929),
        ('sparse_po', {'masks': 'independent'}, 0.954711040755),
        ('sparse_po', {'masks': 'independent', 'reward_sparsity': 1e-3, 'kl_sparsity': 1e-3}, 0.961711040755),
        # Half the penalty of the line above: what a common mask is charged.
        ('sparse_po', {'masks': 'common', 'reward_sparsity': 1e-3, 'kl_sparsity': 1e-3}, 0.958211040755),
    ],
)
def test_golden_value_from_logits(name, options, value):
    chosen = from_logits(*CHOSEN_LOGITS, [1.3, 0.7], [('reward', [1, 0]), ('kl', [0.5, 1])])
    rejected = from_logits(*REJECTED_LOGITS, [0.7, 1.0, 1.3], [('reward', [0.5, 0, 2]), ('kl', [0, 1, 1])])
    np.testing.assert_allclose(losses.find(name)(chosen, rejected, beta=0.5, **options)[0], [value], rtol=1e-11)


def pair(name='tdpo1', **given):
    sample = contract.example(losses.find(name), given)
    return sample.chosen, sample.rejected


def value_and_gradient(name, sides, **options):
    """Losses, Rewards, and the gradients with regard to both completions' log-probabilities and KLs."""

    def scalar(fields):
        values, rewards = losses.find(name)(*(side.replace(**own) for side, own in zip(sides, fields)), **options)
        return values.sum(), (values, rewards)

    fields = [{'policy_logps': side.policy_logps, 'forward_kl': side.forward_kl} for side in sides]
    (_, aux), gradients = jax.value_and_grad(scalar, has_aux=True)(fields)
    return aux, gradients


def with_masks(sides, reward, kl):
    def full(side, number):
        return jnp.full_like(side.weights, number)

    return [side.replace(masks={'reward': full(side, reward), 'kl': full(side, kl)}) for side in sides]


def with_column(sides, name, number):
    return [side.replace(columns={name: jnp.full_like(side.weights, number)}) for side in sides]


def same_reverse_kl(sides):
    return [side.replace(reverse_kl=side.forward_kl) for side in sides]


# The first loss, on completions made for it, is the second.
IDENTITIES = {
    'masks of 1 are TDPO1': ('sparse_po', {}, lambda sides: with_masks(sides, 1.0, 1.0), 'tdpo1'),
    'no KL mask is DPO': ('sparse_po', {'masks': 'independent'}, lambda sides: with_masks(sides, 1.0, 0.0), 'dpo'),
    'TDPO2 at alpha 0 is DPO': ('tdpo2', {'alpha': 0.0}, list, 'dpo'),
    'importance weights of 1 without KL are DPO': (
        'tis_dpo',
        {'weights': 'column', 'kl_weight': 0.0},
        lambda sides: same_reverse_kl(with_column(sides, 'token_weight', 1.0)),
        'dpo',
    ),
    'LD-DPO at alpha 1 is DPO': ('ld_dpo', {'alpha': 1.0}, list, 'dpo'),
    'a segment of all tokens is DPO': ('sdpo', {}, lambda sides: with_column(sides, 'segment', 2.0), 'dpo'),
    'token weights of 1 are DPO': (
        'token_weighted_dpo',
        {},
        lambda sides: with_column(sides, 'token_weight', 1.0),
        'dpo',
    ),
    'constant activations are TDPO1': (
        'mapo',
        {},
        lambda sides: [side.replace(activations={'mlp': jnp.full((3, *side.weights.shape), 0.7)}) for side in sides],
        'tdpo1',
    ),
}


@pytest.mark.parametrize('case', IDENTITIES)
def test_is_another_loss_in_value_and_gradient(case):
    name, options, prepared, other = IDENTITIES[case]
    sides = prepared(pair())
    (values, rewards), gradients = value_and_gradient(name, sides, beta=0.3, **options)
    (their_values, their_rewards), their_gradients = value_and_gradient(other, sides, beta=0.3)
    np.testing.assert_allclose(values, their_values, rtol=1e-12)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15), gradients, their_gradients)
    if name != 'tdpo2':  # its logged rewards hold the whole KL at any alpha
        np.testing.assert_allclose(rewards.chosen, their_rewards.chosen, rtol=1e-12)
        np.testing.assert_allclose(rewards.rejected, their_rewards.rejected, rtol=1e-12)


def test_tdpo2_at_alpha_1_has_the_value_of_tdpo1_and_not_its_gradient():
    sides = pair()
    (values, rewards), (chosen, rejected) = value_and_gradient('tdpo2', sides, alpha=1.0)
    (their_values, their_rewards), (their_chosen, their_rejected) = value_and_gradient('tdpo1', sides)
    np.testing.assert_allclose(values, their_values, rtol=1e-12)
    np.testing.assert_allclose(rewards.chosen, their_rewards.chosen, rtol=1e-12)
    real = sides[0].weights > 0
    assert not chosen['forward_kl'].any()
    assert (their_chosen['forward_kl'][real] < 0).all()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), rejected, their_rejected)
    assert (rejected['forward_kl'][sides[1].weights > 0] > 0).all()


@pytest.mark.parametrize('name', NAMES)
def test_a_policy_that_is_its_reference_loses_ln_2(name):
    """With the KLs that this makes 0, and a gradient that raises the chosen completion and lowers the rejected."""
    sample = contract.example(losses.find(name), {})

    def at_reference(side):
        kls = {kl: jnp.zeros_like(side.weights) for kl in ('forward_kl', 'reverse_kl') if getattr(side, kl) is not None}
        return side.replace(reference_logps=side.policy_logps[None], **kls)

    sides = [at_reference(side) for side in (sample.chosen, sample.rejected)]
    values, rewards = losses.find(name)(*sides)
    np.testing.assert_allclose(values, LN_2, rtol=1e-15)
    assert not rewards.chosen.any() and not rewards.rejected.any()
    gradients = jax.grad(lambda *sides: losses.find(name)(*sides)[0].sum(), argnums=(0, 1))(*sides)
    for gradient, sign in zip(gradients, (-1.0, 1.0)):
        assert (sign * gradient.policy_logps >= 0).all() and (sign * gradient.policy_logps).sum(axis=-1).any()


def test_ld_dpo_counts_the_tokens_of_the_shorter_completion_wherever_they_lie():
    ones = jnp.ones((1, 5))
    chosen = Completion(ones, jnp.zeros((1, 1, 5)), jnp.array([[0.0, 1, 0, 1, 0]]))
    rejected = Completion(jnp.array([[1.0, 2, 4, 8, 16]]), jnp.zeros((1, 1, 5)), jnp.array([[1.0, 0, 1, 1, 1]]))
    for sides, swap in (((chosen, rejected), 1), ((rejected, chosen), -1)):
        _, rewards = losses.find('ld_dpo')(*sides, beta=1.0, alpha=0.25)
        numbers = (rewards.chosen, rewards.rejected)[::swap]
        np.testing.assert_allclose(np.ravel(numbers), [1 + 1, 1 + 4 + 0.25 * (8 + 16)])


def test_tis_dpo_estimates_its_weights_from_two_models():
    chosen, rejected = pair('tis_dpo')
    gap = jnp.array([[-3.0, -0.5, -0.1, 0.0, 0.4, 1.5, 9.0]] * 4)
    sides = [
        side.replace(model_logps={'positive': gap - 2.0, 'negative': gap * 0 - 2.0}) for side in (chosen, rejected)
    ]
    clipped = np.array([[-0.5, -0.5, -0.1, 0.0, 0.4, 1.5, 1.5]] * 4)
    by_hand = [
        side.replace(columns={'token_weight': jnp.asarray(2.0 * np.exp(sign * clipped))})
        for side, sign in zip(sides, (1, -1))
    ]
    tis_dpo = losses.find('tis_dpo')
    np.testing.assert_allclose(tis_dpo(*sides, k=2.0)[0], tis_dpo(*by_hand, weights='column')[0], rtol=1e-12)
    narrow = tis_dpo(*sides, k=1.0, lower=0.0, upper=0.0)[0]
    even = with_column(sides, 'token_weight', 1.0)
    np.testing.assert_allclose(narrow, tis_dpo(*even, weights='column')[0], rtol=1e-12)


def test_tis_dpo_does_not_differentiate_its_weights():
    def total(sides, weights):
        return losses.find('tis_dpo')(*sides, weights=weights)[0].sum()

    for weights in ('models', 'column'):
        gradients = jax.grad(total)(pair('tis_dpo', weights=weights), weights)
        for gradient in gradients:
            assert not any(x.any() for x in jax.tree.leaves((gradient.model_logps, gradient.columns)))
            assert gradient.reverse_kl.any()


def test_tis_dpo_needs_what_its_weights_are_made_of():
    tis_dpo = losses.find('tis_dpo')
    assert tis_dpo.needs_of({}) == losses.Needs(statistics=('reverse_kl',), models=('positive', 'negative'))
    assert tis_dpo.needs_of({'weights': 'column'}) == losses.Needs(
        statistics=('reverse_kl',), token_columns=('token_weight',)
    )
    tis_dpo.check({'weights': 'models', 'k': 2.0, 'lower': -1.0})
    with pytest.raises(InputError, match="Unknown hyperparameter of tis_dpo 'lower'"):
        tis_dpo.check({'weights': 'column', 'lower': -1.0})
    with pytest.raises(InputError, match="Did you mean 'column'"):
        tis_dpo.check({'weights': 'columns'})


def activated(activations, weights):
    zeros = jnp.zeros_like(jnp.asarray(weights))
    return Completion(
        zeros, zeros[None], jnp.asarray(weights), activations={k: jnp.asarray(v) for k, v in activations.items()}
    )


def test_mapo_averages_activations_within_a_kind_and_then_kinds():
    """A flat average over the three activations would give [1/3, 2/3, 1/2]."""
    mlp = [[[2.0, 4.0, 3.0, 99.0]], [[-1.0, -5.0, -3.0, 99.0]]]
    side = activated({'mlp': mlp, 'residual': [[[10.0, 20.0, 15.0, -99.0]]]}, [[1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_allclose(activation_mask(side), [[0.25, 0.75, 0.5, 0.0]], rtol=1e-15)


def test_mapo_masks_lie_between_0_and_1_and_are_the_oracles():
    chosen, _ = pair('mapo')
    mask = activation_mask(chosen)
    for row in range(contract.PAIRS):
        activations = {kind: np.asarray(values[:, row]) for kind, values in chosen.activations.items()}
        side = dataclasses.make_dataclass('Side', ['activations', 'weights'])(
            activations, np.asarray(chosen.weights[row])
        )
        np.testing.assert_allclose(mask[row], oracle.activation_mask(side), rtol=1e-12, atol=1e-15)
    assert (mask >= 0).all() and (mask <= 1).all()
    assert not mask[chosen.weights == 0].any()


@pytest.mark.parametrize('noise', [-3e2, 3e2, np.inf, np.nan])
def test_mapo_ignores_the_activations_of_padding(noise):
    sides = pair('mapo')

    def noisy(side):
        return side.replace(
            activations={k: jnp.where(side.weights[None] > 0, v, noise) for k, v in side.activations.items()}
        )

    clean, _ = losses.find('mapo')(*sides)
    np.testing.assert_array_equal(losses.find('mapo')(*map(noisy, sides))[0], clean)


def test_mapo_counts_an_activation_without_spread_fully_and_an_empty_completion_not():
    side = activated(
        {'mlp': [[[3.0, 8.0, 8.0], [5.0, 5.0, 5.0], [1.0, 2.0, 3.0]]]}, [[1.0, 0, 0], [1.0, 1, 0], [0.0, 0, 0]]
    )
    np.testing.assert_array_equal(activation_mask(side), [[1.0, 0, 0], [1.0, 1, 0], [0.0, 0, 0]])


def test_mapo_does_not_differentiate_its_mask():
    gradients = jax.grad(lambda sides: losses.find('mapo')(*sides)[0].sum())(pair('mapo'))
    for gradient in gradients:
        assert not any(x.any() for x in gradient.activations.values())
        assert gradient.forward_kl.any()


def mask_parameters(masks, layers=3, width=5, seed=0):
    """Parameters away from where they begin, so that some masks are 0."""
    params = init_params(jax.random.key(seed), layers=layers, width=width, masks=masks)
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + random.normal(size=x.shape) * 0.7, jnp.float64), params)


@pytest.mark.parametrize('masks', ['common', 'independent'])
def test_sparse_po_masks_equal_the_oracles(masks):
    params = mask_parameters(masks)
    hidden = np.random.default_rng(1).normal(size=(3, 40, 5)) * 3 + 1
    ours = token_masks(params, jnp.asarray(hidden))
    assert set(ours) == {'reward', 'kl'}
    for name, mask in ours.items():
        own = jax.tree.map(np.asarray, params['common' if masks == 'common' else name])
        theirs = [oracle.learned_mask(own, hidden[:, token]) for token in range(40)]
        np.testing.assert_allclose(mask, theirs, rtol=1e-11, atol=1e-13)
        assert 0 < np.count_nonzero(mask) < 40
    assert np.array_equal(ours['reward'], ours['kl']) == (masks == 'common')


def test_sparse_po_begins_near_tdpo1_whatever_the_hidden_states():
    with jax.enable_x64(False):
        params = init_params(jax.random.key(0), layers=6, width=256, masks='independent')
        spread = jnp.asarray([1e-3, 1.0, 50.0, 1e3, 5.0, 0.0])[:, None, None]
        hidden = (jax.random.normal(jax.random.key(1), (6, 500, 256)) * spread).astype(jnp.bfloat16)
        for mask in token_masks(params, hidden).values():
            assert mask.dtype == jnp.float32 and mask.shape == (500,)
            assert (mask > 0.7).all() and (mask < 1.3).all() and mask.std() > 0.01


def masked_loss(params, hidden, sides, **options):
    def masked(side, states):
        masks = token_masks(params, states)
        return side.replace(masks={name: mask.reshape(side.weights.shape) for name, mask in masks.items()})

    return losses.find('sparse_po')(*(masked(side, states) for side, states in zip(sides, hidden)), **options)[0].sum()


@pytest.mark.parametrize('masks', ['common', 'independent'])
@pytest.mark.parametrize('term', ['reward', 'kl', 'sparsity'])
def test_sparse_po_trains_its_masks_through_each_term_and_not_the_reference(masks, term):
    params = jax.tree.map(
        lambda x: x.astype(jnp.float64), init_params(jax.random.key(3), layers=3, width=5, masks=masks)
    )
    hidden = jax.random.normal(jax.random.key(4), (2, 3, contract.PAIRS * contract.TOKENS, 5), jnp.float64)
    sides, options = pair(), {}
    if term != 'kl':
        sides = [side.replace(forward_kl=jnp.zeros_like(side.weights)) for side in sides]
    if term != 'reward':
        sides = [side.replace(reference_logps=side.policy_logps[None]) for side in sides]
    if term == 'sparsity':
        options = {'reward_sparsity': 0.1, 'kl_sparsity': 0.2}
    to_params, to_hidden = jax.grad(masked_loss, argnums=(0, 1))(params, hidden, sides, masks=masks, **options)
    assert not to_hidden.any()
    for name, gradient in to_params.items():
        trained = name == 'common' or term == 'sparsity' or name == term
        assert all(bool(leaf.any()) == trained for leaf in jax.tree.leaves(gradient)), name
    if term == 'sparsity':  # descent makes the masks smaller
        assert all((gradient['mixing'] > 0).all() for gradient in to_params.values())


def test_sparse_po_counts_the_norm_of_a_common_mask_once():
    sides = pair('sparse_po', masks='common')
    plain, _ = losses.find('sparse_po')(*sides)
    sparse, _ = losses.find('sparse_po')(*sides, reward_sparsity=0.3, kl_sparsity=0.1)
    norm = sum((side.weights * side.masks['kl']).sum(axis=-1) for side in sides)
    np.testing.assert_allclose(sparse - plain, 0.2 * norm, rtol=1e-12)
