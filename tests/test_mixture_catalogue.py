"""`jaxpo mixtures`, as a researcher meets it."""

import ast

import pytest

from jaxpo import cli, mixture_catalogue
from jaxpo.references import mixture
from jaxpo.references.mixing import MIXES
from jaxpo.references.weighting import WEIGHTINGS


def printed(arguments, capsys, code=0):
    assert cli.main(arguments) == code
    captured = capsys.readouterr()
    return captured.out + captured.err


def words(text):
    return ' '.join(text.split())


def test_all_weightings_and_mixes_are_listed(capsys):
    text = words(printed(['mixtures'], capsys))
    for name, entry in WEIGHTINGS.items():
        assert f'{name} {words(entry.summary)}' in text and entry.formula in text and words(entry.source) in text
    for name, mix in MIXES.items():
        assert f'{name} {words(mix.__doc__.splitlines()[0])}' in text
    assert f'{len(WEIGHTINGS)} weightings, {len(MIXES)} mixes' in text


def test_the_listing_says_what_each_learns_from(capsys):
    text = words(printed(['mixtures'], capsys))
    assert 'confidence sum; learns from nothing fixed' in text
    assert 'no hyperparameters; learns from validation pairs, before training vdw' in text
    assert 'window 1; learns from the pairs of the steps before swcw_one_hot' in text
    assert 'prior 5.0; learns from a reward for each step, by validation pairs; reads which reference is the' in text


@pytest.mark.parametrize('name', [*WEIGHTINGS, *MIXES])
def test_one_is_shown_whole_with_an_objective_that_is_valid(name, capsys):
    text = printed(['mixtures', name], capsys)
    function = WEIGHTINGS[name].weights if name in WEIGHTINGS else MIXES[name]
    assert words(function.__doc__) in words(text)
    objective = ast.literal_eval(text.rsplit('objective=', 1)[1].strip())
    made, _ = mixture.make(objective['mixture'], ('one', 'other'))
    assert name in (made.weights if name in WEIGHTINGS else made.mix)


def rows(table):
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()[2:]]


def test_the_markdown_tables_hold_every_weighting_and_mix(capsys):
    text = mixture_catalogue.markdown_tables()
    assert printed(['mixtures', '--markdown'], capsys) == f'{text}\n'
    weightings, mixes = (rows(table) for table in text.split('\n\n'))
    assert [row[0].strip('`') for row in weightings] == sorted(WEIGHTINGS)
    for name, summary, learns, defaults, source in weightings:
        entry = WEIGHTINGS[name.strip('`')]
        assert (summary, source) == (entry.summary, entry.source)
        assert learns == mixture_catalogue.LEARNS_FROM[entry.observes]
        assert defaults == ', '.join(f'{key} {value}' for key, value in entry.defaults.items())
    assert [row[0].strip('`') for row in mixes] == list(MIXES)
    assert all(len(row) == 3 and row[2].startswith('`log p = ') for row in mixes)


@pytest.mark.parametrize('name, nearest', [('arwk', 'arwc'), ('geometrik', 'geometric')])
def test_an_unknown_name_is_one_clear_line(name, nearest, capsys):
    assert f'Did you mean {nearest!r}' in printed(['mixtures', name], capsys, code=2)


def test_help_names_it(capsys):
    assert 'mixtures [NAME]  list how references are mixed and weighed, or show one' in printed([], capsys)
