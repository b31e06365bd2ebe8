"""Each chart of a report shows the findings it says it shows."""

import dataclasses

import pytest
from study.sample_findings import sample

from jaxpo.study import charts, curves, figures, matched
from jaxpo.study.findings import FrontierPoint

KINDS = ((charts, 'forest'), (charts, 'changes'), (charts, 'heat_map'), (curves, 'curves'), (curves, 'small'))


@pytest.fixture
def drawn(monkeypatch):
    """Chart name -> (its data, everything else that it was asked for), as charts are drawn."""
    seen = {}

    def spy(module, kind):
        draw = getattr(module, kind)

        def watched(data, **settings):
            seen[settings['name']] = data, settings
            return draw(data, **settings)

        monkeypatch.setattr(module, kind, watched)

    for module, kind in KINDS:
        spy(module, kind)
    return seen


def test_charts_show_the_findings(drawn):
    found = sample('ipo')
    figures.figures(found)
    board = found.leaderboard.rows[1].against_baseline
    assert drawn['leaderboard'][0] == [charts.Interval('ipo', board.difference, board.low, board.high, 'better')]
    assert drawn['against-itself'][0][0].name == 'dpo (A/A)'
    first = {name: data[0] for name, (data, _) in drawn.items() if isinstance(data, list) and data}
    assert first['frontier'].line[1] == (2.0, 1.0) and first['frontier'].points[4] == (8.0, 2.0)
    assert drawn['frontier'][1]['guides'] == [(4.0, 'KL 4')]
    point = found.robustness.rows[0].profile[4]
    assert first['profile'].line[4] == (point.threshold, point.share)
    assert first['profile'].band[4] == (point.threshold, point.low, point.high) and point.low < point.high
    assert first['best-of'].line == ((1, None), (2, 0.66), (3, 0.68), (4, 0.69))
    assert first['length'] == charts.Change('dpo', (0.7, 0.65))
    assert first['log-probabilities'] == charts.Change('dpo', (-3.0, -9.0))
    assert first['accuracies'] == charts.Change('dpo', (0.9, 0.7))
    assert first['calibration'].line[1] == (0.65, 0.59)
    curve = found.learning.curves[0].metric[2]
    assert first['learning'].line[2] == (curve.step, curve.mean)
    assert first['learning'].band[2] == (curve.step, curve.lowest, curve.highest)
    assert drawn['loss-0'][0][2] == (curve.step, curve.mean)
    assert first['compute'] == charts.Change('dpo', (800.0 / 12,))


def test_points_of_a_frontier_are_means_over_seeds():
    at = [('a', 0, 4, 1.0, 0.5), ('a', 1, 4, 3.0, 0.7), ('a', 0, 8, 5.0, 1.0), ('b', 0, 4, 2.0, 0.1)]
    points = [FrontierPoint(*point, cell='0123456789ab') for point in at]
    assert matched.means_over_seeds(points) == [pytest.approx(mean) for mean in ((2.0, 0.6), (5.0, 1.0), (2.0, 0.1))]


def test_ends_are_named_in_the_order_of_their_numbers(drawn):
    figures.figures(sample('ipo'))
    ends = {name: tuple(settings['ends']) for name, (_, settings) in drawn.items() if 'ends' in settings}
    assert ends['log-probabilities'] == ('chosen', 'rejected') and ends['accuracies'] == ('training', 'held out')
    assert ends['length'] == ('raw', 'length-controlled')


def test_a_grid_has_its_last_field_across(drawn):
    found = sample('ipo')
    figures.figures(found)
    grid, settings = drawn['grid-0']
    assert (grid.rows, grid.columns) == (('0.05', '0.1'), ('1e-5', '3e-5'))
    assert (grid.row_axis, grid.column_axis) == ('beta', 'learning rate')
    assert grid.values == ((0.625, None), (0.65, 0.65)) and grid.chosen == (1, 0)
    assert (settings['worst'], settings['best']) == (0.625, pytest.approx(0.66))
    figures.figures(dataclasses.replace(found, design=dataclasses.replace(found.design, higher_is_better=False)))
    assert (drawn['grid-0'][1]['worst'], drawn['grid-0'][1]['best']) == (pytest.approx(0.66), 0.625)


@pytest.mark.parametrize(
    'fields, cells, rows, columns',
    [((), [()], ('',), ('',)), (('a.b_c',), [('1',), ('2',)], ('',), ('1', '2'))],
)
def test_a_grid_of_fewer_fields_is_one_row(drawn, fields, cells, rows, columns):
    found = sample('ipo')
    row = found.robustness.rows[0]
    made = tuple(dataclasses.replace(row.grid[2], values=values) for values in cells)
    row = dataclasses.replace(row, fields=fields, grid=made)
    figures.figures(dataclasses.replace(found, robustness=dataclasses.replace(found.robustness, rows=(row,))))
    grid = drawn['grid-0'][0]
    assert (grid.rows, grid.columns, grid.row_axis) == (rows, columns, '') and grid.chosen == (0, 0)
    assert grid.column_axis == ('b c' if fields else '')
