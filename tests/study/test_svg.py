"""Axes and numbers of charts: round ticks that cover the data, places where arithmetic puts them."""

import math

import numpy as np
import pytest

from jaxpo.study import svg
from jaxpo.study.svg import Axis, Scale

NAN = math.nan


@pytest.mark.parametrize(
    'ends', [(0, 1), (0.3, 0.31), (-3.2, 7.9), (1e-6, 3e-6), (5, 5), (0, 0), (-0.013, 0.04), (7, 987654)]
)
def test_ticks_are_round_few_and_cover_the_data(ends):
    axis = svg.axis_of(Scale('x'), [*ends, None, NAN])
    assert axis.ticks[0] <= ends[0] and axis.ticks[-1] >= ends[1]
    assert 3 <= len(axis.ticks) <= 7 and len({*axis.labels}) == len(axis.ticks)
    step = axis.ticks[1] - axis.ticks[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - round_one) for round_one in (1, 2, 5)) < 1e-6
    np.testing.assert_allclose(np.array(axis.ticks) / step, np.round(np.array(axis.ticks) / step), atol=1e-6)
    said = [float(label.replace(svg.MINUS, '-').replace(',', '')) for label in axis.labels]
    np.testing.assert_allclose(said, axis.ticks, rtol=1e-12)


@pytest.mark.parametrize('ends', [(1e-6, 3e-5), (1e-7, 1), (3, 4), (2, 2), (0.1, 0.1), (1, 1e12)])
def test_log_ticks_are_one_two_or_five_times_powers_of_ten(ends):
    axis = svg.axis_of(Scale('x', log=True), [*ends, 0.0, -1.0])
    assert axis.ticks[0] <= ends[0] and axis.ticks[-1] >= ends[1] and 2 <= len(axis.ticks) <= 9
    assert {f'{tick:.0e}'[0] for tick in axis.ticks} <= {*'125'}
    assert all(tick == pytest.approx(float(f'{tick:.0e}'), rel=1e-12) for tick in axis.ticks)


def test_ticks_of_counts_are_whole():
    assert svg.axis_of(Scale('k', whole=True), (1, 3)).labels == ('1', '2', '3')
    assert svg.axis_of(Scale('k', whole=True), (2, 2)).labels == ('1', '2', '3')


def test_places_worked_by_hand():
    plain, log = Axis('', (0.0, 10.0), ('', '')), Axis('', (1.0, 100.0), ('', ''), log=True)
    assert svg.place(plain, 2.5, 100, 300) == 150
    assert svg.place(log, 10, 100, 300) == pytest.approx(200)
    assert [svg.place(plain, value, 0, 1) for value in (None, NAN, math.inf, 10.1)] == [None] * 4
    assert [svg.place(log, value, 0, 1) for value in (0, -1)] == [None] * 2


def test_numbers_for_people():
    assert [svg.number(v) for v in (0.12345, 1234.5, 1e-5, -0.0301, 0, None, NAN)] == [
        '0.123', '1,234', '1e−5', '−0.0301', '0', '–', '–',
    ]  # fmt: skip
    assert [svg.number(v, 2, sign=True) for v in (0.02, -0.02, 0.001, -0.001)] == ['+0.02', '−0.02', '0.00', '0.00']
    assert [svg.coordinate(v) for v in (1 / 3, -0.001, 2.0)] == ['0.33', '0', '2']
    assert svg.decimals_for((0.7, 0.71, None)) == 3 and svg.decimals_for((0.03, -0.05), digits=2) == 3
