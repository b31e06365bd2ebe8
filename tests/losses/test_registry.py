import pytest

from jaxpo import losses
from jaxpo.errors import InputError


def test_unknown_loss_names_the_nearest():
    with pytest.raises(InputError, match="'dpoo'. Did you mean 'dpo'"):
        losses.find('dpoo')


def test_a_name_is_registered_once():
    with pytest.raises(InputError, match='registered already'):

        @losses.loss('elsewhere')
        def dpo(chosen, rejected):
            """Another."""


@pytest.mark.parametrize(
    'flags, message',
    [
        ({'init_state': dict}, 'together'),
        ({'init_state': dict, 'update_state': dict}, 'together'),
        ({'token_masks': dict}, 'no init_params'),
        ({'many_references': True, 'reads_reference': False}, 'reads_reference is True'),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(flags, message):
    with pytest.raises(InputError, match=message):

        @losses.loss('nowhere', **flags)
        def unfit(chosen, rejected):
            """Unfit."""

    assert 'unfit' not in losses.LOSSES


def test_a_hyperparameter_called_weight_is_refused():
    with pytest.raises(InputError, match='weight'):

        @losses.loss('nowhere')
        def heavy(chosen, rejected, *, weight: float = 1.0):
            """Heavy."""


@pytest.mark.parametrize(
    'name, given, message',
    [
        ('dpo', {'beta': 0}, 'objective.dpo.beta is above 0, not 0'),
        ('cdpo', {'label_smoothing': 0.5}, 'is at least 0 and below 0.5, not 0.5'),
        ('exo', {'label_smoothing': 0}, 'is above 0 and below 0.5, not 0'),
        ('modpo', {'preference_weight': 1.5}, 'is above 0 and at most 1, not 1.5'),
        ('nca', {'alpha': 1}, "hyperparameter of nca 'alpha'"),
        ('nca', {'labels': 'scores', 'alpha': 0}, 'is above 0, not 0'),
    ],
)
def test_numbers_out_of_their_range_are_refused(name, given, message):
    with pytest.raises(InputError, match=message):
        losses.find(name).check(given)


def test_ranges_hold_their_ends():
    losses.find('cdpo').check({'label_smoothing': 0})
    losses.find('modpo').check({'preference_weight': 1})


def test_a_loss_without_a_docstring_is_refused():
    with pytest.raises(InputError, match='docstring'):

        @losses.loss('nowhere')
        def nameless(chosen, rejected):
            return None

    assert 'nameless' not in losses.LOSSES
