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


def test_a_loss_without_a_docstring_is_refused():
    with pytest.raises(InputError, match='docstring'):

        @losses.loss('nowhere')
        def nameless(chosen, rejected):
            return None

    assert 'nameless' not in losses.LOSSES
