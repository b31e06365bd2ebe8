import jax.numpy as jnp
import numpy as np
import pytest

from jaxpo import objective
from jaxpo.errors import InputError
from jaxpo.types import Completion

CHOSEN = Completion(-jnp.array([[1.0, 2.0], [3.0, 0.5]]), -jnp.array([[[1.5, 1.0], [2.0, 0.5]]]), jnp.ones((2, 2)))
REJECTED = Completion(-jnp.array([[2.0, 2.0], [1.0, 0.5]]), -jnp.array([[[1.0, 1.0], [3.0, 0.5]]]), jnp.ones((2, 2)))
COUNTS = objective.counts_of(CHOSEN.weights, REJECTED.weights)
ONE = ('initial',)
ALL = jnp.ones(2)


def value(spec, weight=ALL, counts=COUNTS):
    made = objective.make(spec, references=('initial',))
    return objective.evaluate(made, made.hyperparameters, CHOSEN, REJECTED, weight, counts)


def test_terms_add_up_with_their_weights():
    both, metrics = value({'dpo': {'beta': 0.3}, 'sft': {'weight': 0.2}})
    dpo, sft = value({'dpo': {'beta': 0.3}})[0], value({'sft': {}})[0]
    np.testing.assert_allclose(both, dpo + 0.2 * sft, rtol=1e-6)
    np.testing.assert_allclose(sft, (3.0 + 3.5) / 4, rtol=1e-6)
    np.testing.assert_allclose([metrics['loss/dpo'], metrics['loss/sft']], [dpo, sft], rtol=1e-6)


def test_rewards_are_those_of_the_first_loss():
    first = value({'dpo': {'beta': 0.3}, 'sft': {}})[1]
    np.testing.assert_allclose(first['rewards/chosen'], 0.3 * (-0.5 - 1.0) / 2, rtol=1e-6)
    np.testing.assert_allclose(first['rewards/accuracies'], 0.5)


def test_parts_of_a_step_add_up_to_the_whole():
    whole, _ = value({'dpo': {}, 'sft': {}}, ALL)
    parts = [value({'dpo': {}, 'sft': {}}, jnp.eye(2)[i])[0] for i in range(2)]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


@pytest.mark.parametrize(
    'spec, references, message',
    [
        ({}, ONE, 'names no loss'),
        ({'simpoo': {}}, ONE, "Did you mean 'simpo'"),
        ({'dpo': {'bta': 0.1}}, ONE, "Did you mean 'beta'"),
        ({'dpo': {'beta': 'much'}}, ONE, 'is a finite number'),
        ({'dpo': {'beta': float('nan')}}, ONE, 'is a finite number'),
        ({'dpo': {'weight': 'much'}}, ONE, 'is a finite number'),
        ({'ipo': {'reduction': 'men'}}, ONE, "Did you mean 'mean'"),
        ({'dpo': {}}, (), 'reads a reference'),
        ({'dpo': {}}, ('initial', 'other'), 'drop all but one'),
        ({'mixture': {}, 'simpo': {}}, ('initial', 'other'), 'simpo reads none'),
        ({'mixture': {'mix': 'harmonic'}, 'multi_dpo': {}}, ('initial', 'other'), 'mix has no effect'),
    ],
)
def test_refuses_early_and_says_why(spec, references, message):
    with pytest.raises(InputError, match=message):
        objective.make(spec, references)


def test_spelled_out_names_every_hyperparameter():
    assert objective.spelled_out({'simpo': {'beta': 2.5}}, ()) == {'simpo': {'weight': 1.0, 'beta': 2.5, 'gamma': 0.5}}


def test_a_new_beta_is_the_same_function():
    one, other = objective.make({'dpo': {'beta': 0.1}}, ONE), objective.make({'dpo': {'beta': 0.2}}, ONE)
    assert one == other and hash(one) == hash(other)
    assert one.hyperparameters != other.hyperparameters
    assert objective.make({'ipo': {'reduction': 'sum'}}, ONE) != objective.make({'ipo': {}}, ONE)
