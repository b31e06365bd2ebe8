"""`jaxpo losses` and `jaxpo check`, as a researcher meets them."""

import pathlib

import numpy as np
import pytest

from jaxpo import catalogue, cli, losses

README = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()
OWN = next(block.split('```')[0] for block in README.split('```python\n') if '@loss(' in block)


@pytest.fixture
def own(tmp_path, registry_as_it_was):
    """The README's loss, in a file."""
    path = tmp_path / 'mine.py'
    path.write_text(OWN)
    return path


def printed(arguments, capsys, code=0):
    assert cli.main([str(word) for word in arguments]) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_all_losses_are_listed_with_formula_source_and_needs(capsys):
    text = ' '.join(printed(['losses'], capsys).split())
    for entry in losses.LOSSES.values():
        assert f'{entry.name} {entry.summary}' in text
        assert ' '.join(entry.source.split()) in text and entry.formula in text
    assert 'token column segment' in text and 'running state' in text and 'trained parts' in text


def test_one_loss_is_shown_with_its_curve(capsys):
    text = printed(['losses', 'ipo', '--reduction', 'sum', '--tau', '0.5'], capsys)
    assert 'Differs:' in text and 'tau 0.5, reduction sum' in text
    assert '(loss)' in text and '(slope)' in text and 'margin of log-ratios, nats' in text
    assert 'At the reference the loss is 1 and its slope -2 a nat.' in text


def test_a_loss_with_parts_shows_each_with_its_hyperparameters(capsys):
    text = printed(['losses', 'mi', '--prior', 'r_dpo', '--length-penalty', '0.02'], capsys)
    assert 'length_penalty 0.02' in text and 'prior h_dpo, entropy_weight 0.9: The reference, tempered.' in text


def test_the_curve_is_the_loss_and_its_slope():
    margins, values, slopes = catalogue.curve(losses.find('dpo'), {'beta': 0.3})
    margins = np.asarray(margins)
    assert margins[0] == -15 and margins[-1] == 15 and margins[len(margins) // 2] == 0
    np.testing.assert_allclose(values, np.log1p(np.exp(-0.3 * margins)), rtol=1e-12)
    np.testing.assert_allclose(slopes, -0.3 / (1 + np.exp(0.3 * margins)), rtol=1e-12)


@pytest.mark.parametrize('name', sorted(losses.LOSSES))
def test_every_loss_has_a_finite_curve(name):
    assert np.isfinite(catalogue.curve(losses.find(name), {})).all()


def test_a_check_says_what_holds_in_words_to_quote(capsys):
    text = printed(['check', 'tdpo2'], capsys)
    assert text.count('holds  ') == len(catalogue.checks.CHECKS) and 'BROKEN' not in text
    assert 'The loss tdpo2 passes all' in text and 'float64 on the CPU' in text


def test_a_loss_of_ones_own_is_checked_from_its_file(own, capsys):
    text = printed(['check', f'{own}:squared_hinge'], capsys)
    assert 'The loss squared_hinge passes all' in text
    assert 'Squared hinge' in printed(['losses', f'{own}:squared_hinge', '--beta', '0.5'], capsys)


BROKEN = {
    'finite_differences': ('** 2, rewards', '** 2 + bent(rewards.chosen), rewards'),
    'padding_has_no_say': ('** 2, rewards', '** 2 + 0.1 * chosen.policy_logps.sum(axis=-1), rewards'),
    'pairs_are_coupled_as_it_says': ('** 2, rewards', '** 2 + 0.1 * rewards.chosen.mean(), rewards'),
    'an_empty_slot_has_no_say': ('** 2, rewards', '** 2 + 0.1 / chosen.weights.sum(axis=-1), rewards'),
    'it_can_leave_the_reference': ('1.0 - (rewards.chosen - rewards.rejected)', '(rewards.rejected - rewards.chosen)'),
    'every_option_changes_something': ('beta: float = 0.1', 'beta: float = 0.1, gamma: float = 1.0'),
    'shapes_are_as_agreed': ('** 2, rewards', '** 2 + jnp.zeros((2, 1)), rewards'),
    'it_is_documented': ('log-ratios.\n', 'log-ratios\n'),
    'extremes_stay_finite': ('** 2, rewards', '** 2 + jnp.exp(-rewards.chosen), rewards'),
    'hyperparameters_are_traced': ('** 2, rewards', '** 2 + float(beta), rewards'),
    'references_are_read_as_it_says': ("at 1)'", "at 1)', reads_reference=False"),
    'what_it_needs_is_read': ("at 1)'", "at 1)', needs=Needs(statistics=('entropy',))"),
}


# A function with the derivative of another.
BENT = """import jax
import jax.numpy as jnp


@jax.custom_jvp
def bent(x):
    return x


bent.defjvps(lambda tangent, answer, x: 2.0 * tangent)
"""


@pytest.mark.parametrize('check', BROKEN)
def test_a_broken_loss_is_caught(check, own, capsys):
    """Each check is the one, or one of those, that finds the fault it is for."""
    before, after = BROKEN[check]
    assert before in OWN
    text = OWN.replace(before, after).replace('import loss,', 'import Needs, loss,')
    own.write_text(text.replace('import jax.numpy as jnp', BENT) if 'bent(' in text else text)
    found = printed(['check', f'{own}:squared_hinge'], capsys, code=1)
    statement = getattr(catalogue.checks, check).__doc__
    lines = found.splitlines()
    assert any(line.startswith('BROKEN') and statement in line for line in lines), found
    assert 'The loss squared_hinge fails' in found


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['losses', 'dpoo'], "Did you mean 'dpo'"),
        (['losses', 'dpo', '--bta', '1'], "Did you mean 'beta'"),
        (['losses', 'dpo', '--beta'], 'are given as --NAME VALUE'),
        (['losses', 'dpo', '--beta', '-1'], 'is above 0, not -1'),
        (['check', 'nowhere.py:mine'], 'nowhere.py'),
    ],
)
def test_bad_input_is_one_clear_line(arguments, message, capsys):
    assert message in printed(arguments, capsys, code=2)


def test_a_file_without_the_loss_names_those_it_has(own, capsys):
    assert 'Known: squared_hinge' in printed(['check', f'{own}:hinge'], capsys, code=2)
