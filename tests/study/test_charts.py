"""Charts: numbers land where their axes say, and nothing is drawn where nothing is known."""

import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxpo.study import charts, curves, figures, marks, palette, svg
from jaxpo.study.svg import Scale

HOSTILE = '<script>alert("&\x00")</script>'
NAMES = ('dpo', 'ipo', HOSTILE)
STYLES = palette.styles_of(NAMES, 'dpo')
NAN = math.nan


def forest(*intervals, **changes):
    return charts.forest(intervals, name='f', title='T', label='difference', styles=STYLES, **changes)


def lines(*series, **changes):
    plain = {'x': Scale('step'), 'y': Scale('accuracy'), 'styles': STYLES, 'name': 'l', 'title': 'T'}
    return curves.curves(series, **{**plain, **changes})


def dots(*rows, **changes):
    plain = {'scale': Scale('nats'), 'ends': ('chosen', 'rejected'), 'styles': STYLES, 'name': 'd', 'title': 'T'}
    return charts.changes(rows, **{**plain, **changes})


def heat(values, chosen=None, worst=0.0, best=1.0):
    rows, columns = tuple(f'b{i}' for i in range(len(values))), tuple(f'r{i}' for i in range(len(values[0])))
    return charts.heat_map(
        charts.Grid(rows, columns, values, chosen, 'beta', 'rate'), name='h', title='dpo', worst=worst, best=best
    )


DRAWINGS = {
    'forest': forest(*(charts.Interval(name, 0.1, -0.1, 0.3, 'no claim') for name in NAMES)),
    'curves': lines(*(curves.Series(name, ((0, 0.5), (1, 0.6)), ((0, 0.4, 0.6), (1, 0.5, 0.7))) for name in NAMES)),
    'changes': dots(*(charts.Change(name, (-1.0, 2.0)) for name in NAMES)),
    'heat': heat(((0.1, 0.9), (None, 0.5)), (0, 1)),
    'small': curves.small([(0, 1.0), (1, 0.5)], name='s', title=HOSTILE, label='loss'),
    'swatch': figures.swatch(STYLES['ipo']),
}


def parsed(drawing):
    """The drawing as elements without their namespace."""
    root = ElementTree.fromstring(drawing)
    for one in root.iter():
        one.tag = one.tag.removeprefix(f'{{{svg.NAMESPACE}}}')
    return root


def of_class(root, kind):
    return [one for one in root.iter() if kind in one.get('class', '').split()]


def series(root, name):
    return next(one for one in of_class(root, 'series') if one.find('title').text.startswith(name))


def scale_of(root, along):
    """Value of a coordinate, read off the labels at the axis' ticks: independent of how values were placed."""
    anchor = {'x': 'middle', 'y': 'end'}[along]
    shift = {'x': 0.0, 'y': 4.0}[along]
    found = [one for one in of_class(root, 'tick') if one.get('text-anchor') == anchor]
    at = [float(one.get(along)) - shift for one in found]
    value = [float(one.text.replace(svg.MINUS, '-').replace(',', '')) for one in found]
    (slope, start), rest = np.polyfit(at, value, 1), np.ptp(value)
    np.testing.assert_allclose(np.polyval((slope, start), at), value, atol=1e-3 * rest)
    return lambda coordinate: slope * float(coordinate) + start


@pytest.mark.parametrize('drawing', DRAWINGS.values(), ids=DRAWINGS)
def test_drawings_are_xml_that_refers_to_nothing(drawing):
    root = parsed(drawing)
    assert root.tag == 'svg'
    assert not re.search(r'http|src=|@import|url\(|href|<script', drawing.replace(svg.NAMESPACE, ''))
    if root.get('role') == 'img':
        title, description = root.get('aria-labelledby').split()
        assert {one.tag: one.get('id') for one in root[:2]} == {'title': title, 'desc': description}
        assert all(one.text for one in root[:2])


def test_a_hostile_name_is_text():
    shown = ''.join(series(parsed(DRAWINGS['forest']), '<script>').itertext())
    assert '<script>alert("&\N{REPLACEMENT CHARACTER}")</script>' in shown
    assert svg.element('g', x='"><b a="') == '<g x="&quot;&gt;&lt;b a=&quot;"/>'


def test_intervals_land_where_the_axis_says():
    root = parsed(
        forest(
            charts.Interval('dpo', 0.031, 0.012, 0.05, 'better'),
            charts.Interval('ipo', -0.03, -0.044, -0.016, 'worse'),
        )
    )
    value = scale_of(root, 'x')
    for name, (low, high) in {'dpo': (0.012, 0.05), 'ipo': (-0.044, -0.016)}.items():
        bar = next(one for one in series(root, name).iter('line') if one.get('y1') == one.get('y2'))
        np.testing.assert_allclose([value(bar.get('x1')), value(bar.get('x2'))], (low, high), atol=1e-4)
    assert [one.text for one in series(root, 'dpo').findall('text')] == ['dpo', '+0.031', '[+0.012, +0.050]', 'better']
    zero = of_class(root, 'zero')[0]
    assert value(zero.get('x1')) == pytest.approx(0, abs=1e-4)


def test_verdicts_show_by_shape_and_word():
    def points_up(polygon):
        heights = sorted(float(corner.split(',')[1]) for corner in polygon.get('points').split())
        return heights[1] - heights[0] > heights[2] - heights[1]  # one corner above, two below

    verdicts = ('better', 'worse', 'no claim')
    root = parsed(forest(*(charts.Interval(n, 0.1, 0.0, 0.2, v) for n, v in zip(NAMES, verdicts))))
    better, worse, none = of_class(root, 'series')
    assert points_up(better.find('polygon')) and not points_up(worse.find('polygon'))
    assert none.find('circle').get('class') == 'hollow' and better.find('polygon').get('class') == 'filled'
    assert [one.findall('text')[-1].text for one in (better, worse, none)] == [*verdicts]
    sides = [
        one.text
        for one in of_class(parsed(forest(charts.Interval('dpo', 1, 0, 2, 'worse'), higher_is_better=False)), 'note')
    ]
    assert sides[:2] == ['← better', 'worse →']


def test_an_interval_far_beyond_the_others_is_cut_off_with_arrows():
    usual = [charts.Interval(str(i), 0.01 * i, 0.01 * i - 0.02, 0.01 * i + 0.02, 'no claim') for i in range(5)]
    root = parsed(forest(*usual, charts.Interval('wild', 0.0, -40.0, 40.0, 'no claim')))
    assert len(series(root, 'wild').findall('polygon')) == 2
    assert all(not series(root, str(i)).findall('polygon') for i in range(5))
    assert scale_of(root, 'x')(of_class(root, 'grid')[0].get('x1')) > -1
    assert '−40' in ''.join(series(root, 'wild').itertext())


def test_what_is_missing_leaves_its_row():
    root = parsed(
        forest(charts.Interval('dpo', 0.1, None, NAN, 'no claim'), charts.Interval('ipo', None, None, None, 'no claim'))
    )
    assert len(series(root, 'dpo').findall('circle')) == 1 and not series(root, 'dpo').findall('line')
    assert not series(root, 'ipo').findall('circle') and '–' in ''.join(series(root, 'ipo').itertext())
    row = series(parsed(dots(charts.Change('dpo', (-1.0, None)), charts.Change('ipo', (1.0, 2.0)))), 'dpo')
    assert len(row.findall('circle')) == 1 and not row.findall('rect') and not row.findall('line')


def test_lines_land_where_the_axes_say_and_break_at_gaps():
    points = ((0, 0.5), (10, 0.6), (20, NAN), (30, 0.8), (40, 0.75), (50, None), (60, 0.7))
    root = parsed(lines(curves.Series('dpo', points, tuple((x, y and y - 0.1, y and y + 0.1) for x, y in points))))
    x, y = scale_of(root, 'x'), scale_of(root, 'y')
    path = series(root, 'dpo').find('path').get('d')
    assert re.sub(r'[\d. ]', '', path) == 'MLMLM'
    found = [(x(a), y(b)) for a, b in re.findall(r'[ML]([\d.]+) ([\d.]+)', path)]
    np.testing.assert_allclose(found, [point for point in points if svg.finite(point[1])], atol=0.06)
    bands = [one for one in of_class(root, 'band') if len(one.get('points').split()) > 2]
    assert len(bands) == 2
    corners = [tuple(map(float, corner.split(','))) for corner in bands[0].get('points').split()]
    np.testing.assert_allclose(
        [(x(a), y(b)) for a, b in corners], [(0, 0.4), (10, 0.5), (10, 0.7), (0, 0.6)], atol=0.06
    )
    # A lone point has no line: its marker is what is seen.
    lone = [(x(one.get('cx')), y(one.get('cy'))) for one in series(root, 'dpo').iter('circle')]
    assert any(np.allclose(place, (60, 0.7), atol=0.06) for place in lone)


def test_long_lines_have_a_few_markers_the_last_point_among_them():
    root = parsed(lines(curves.Series('dpo', tuple((step, float(step)) for step in range(30)))))
    x, circles = scale_of(root, 'x'), series(root, 'dpo').findall('circle')
    np.testing.assert_allclose(sorted(x(one.get('cx')) for one in circles), [4, 9, 14, 19, 24, 29], atol=0.05)


def test_steps_keep_their_value_to_the_next_point():
    root = parsed(
        lines(curves.Series('dpo', ((0, 1.0), (1, 0.5), (2, 0.0))), steps=True, y=Scale('share', bounds=(0, 1)))
    )
    path = series(root, 'dpo').find('path').get('d')
    assert re.sub(r'[\d. ]', '', path) == 'MHVHV'
    y = scale_of(root, 'y')
    np.testing.assert_allclose([y(value) for value in re.findall(r'V([\d.]+)', path)], [0.5, 0.0], atol=0.01)


def test_points_a_guide_and_a_diagonal_land_where_the_axes_say():
    root = parsed(
        lines(
            curves.Series('ipo', points=((2.0, 0.25), (8.0, 0.75))),
            x=Scale('kl', bounds=(0, 10)),
            y=Scale('reward', bounds=(0, 1)),
            guides=((4.0, 'KL 4'), (99.0, 'beyond')),
            diagonal=True,
        )
    )
    x, y = scale_of(root, 'x'), scale_of(root, 'y')
    (guide,) = of_class(root, 'guide')
    assert x(guide.get('x1')) == pytest.approx(4, abs=0.01)
    (diagonal,) = of_class(root, 'diagonal')
    assert [x(diagonal.get('x2')), y(diagonal.get('y2'))] == pytest.approx([1, 1], abs=0.01)
    middles = [
        np.mean([tuple(map(float, corner.split(','))) for corner in one.get('points').split()], axis=0)
        for one in of_class(root, 'raw')
    ]
    np.testing.assert_allclose([(x(a), y(b)) for a, b in middles], [(2, 0.25), (8, 0.75)], atol=0.02)


def test_a_log_axis_places_by_ratio_and_drops_what_it_cannot_show():
    root = parsed(lines(curves.Series('dpo', ((1, 1.0), (0, 5.0), (10, 2.0), (100, 3.0))), x=Scale('kl', log=True)))
    path = series(root, 'dpo').find('path').get('d')
    assert re.sub(r'[\d. ]', '', path) == 'MML'
    first, middle, last = (float(a) for a in re.findall(r'[ML]([\d.]+)', path))
    assert middle - first == pytest.approx(last - middle, abs=0.02)


def test_changes_join_both_ends():
    root = parsed(
        dots(charts.Change('dpo', (-2.0, -9.0)), charts.Change('ipo', (1.0, -4.0)), scale=Scale('', include=(0,)))
    )
    x, row = scale_of(root, 'x'), series(root, 'dpo')
    assert x(row.find('circle').get('cx')) == pytest.approx(-2, abs=0.02)
    assert [x(row.find('line').get('x1')), x(row.find('line').get('x2'))] == pytest.approx([-9, -2], abs=0.02)
    assert x(of_class(root, 'zero')[0].get('x1')) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize(
    'worst, best, levels', [(0.0, 1.0, 'h0 h3 h6'), (1.0, 0.0, 'h6 h3 h0'), (0.5, 0.5, 'h3 h3 h3')]
)
def test_a_heat_map_shades_from_worst_to_best(worst, best, levels):
    root = parsed(heat(((0.0, 0.5, 1.0),), worst=worst, best=best))
    assert ' '.join(one.get('class') for one in root.iter('rect')) == levels


def test_a_heat_map_frames_the_chosen_and_dashes_the_missing():
    root = parsed(heat(((0.1, 0.2), (0.3, None)), chosen=(1, 0)))
    (frame,), cells = of_class(root, 'chosen'), [one for one in root.iter('rect') if one.get('class') != 'chosen']
    assert [frame.get('x'), frame.get('y')] == [cells[2].get('x'), cells[2].get('y')]
    assert [one.get('class') for one in cells].count('empty-cell') == 1
    assert [one.text for one in root.iter('text')].count('–') == 1


@pytest.mark.parametrize(
    'drawing',
    [
        forest(),
        forest(charts.Interval('dpo', NAN, None, None, 'no claim')),
        lines(),
        lines(curves.Series('dpo', ((0, None),))),
        dots(charts.Change('dpo', (None, None))),
        heat(((None,),)),
        curves.small([], name='s', title='dpo', label='loss'),
    ],
)
def test_nothing_to_draw_is_a_sentence(drawing):
    root = parsed(drawing)
    assert root.tag == 'p' and root.text.endswith('.') and len(root.text.split()) > 2


def test_of_many_methods_the_best_stand_out_and_the_others_are_counted():
    names = [f'method{place}' for place in range(45)]
    styles = palette.styles_of(names, 'method30', most=8)
    assert [name for name in names if not styles[name].muted] == [*names[:7], 'method30']
    assert styles['method30'].colour == 'c0' and len({styles[name].colour for name in names}) == 9
    made = [
        curves.Series(name, ((0, 0.0), (1, 45.0 - place)), ((0, 0, 1), (1, 0, 1))) for place, name in enumerate(names)
    ]
    root = parsed(lines(*made, styles=styles))
    said = [one.text for one in root.iter('text')]
    assert '37 others' in said and 'method6' in said and 'method7' not in said
    assert len(of_class(root, 'band')) == curves.BANDED
    assert series(root, 'method44').get('class') == 'series muted'
    muted = [one.get('class').endswith('muted') for one in of_class(root, 'series')]
    assert muted == sorted(muted, reverse=True)  # beneath the others


def test_names_beside_a_plot_keep_apart_and_in_order():
    heights = marks.spread([50.0, 51.0, 20.0, 99.0, 98.0], 10.0, 0.0, 100.0)
    ordered = [heights[place] for place in (2, 0, 1, 4, 3)]
    assert ordered == [20, 50, 60, 90, 100]


def test_a_drawing_alone_brings_its_colours():
    alone = figures.standalone(DRAWINGS['forest'])
    sheets = list(parsed(alone).iter('style'))
    assert len(sheets) == 1 and '--c1:' in sheets[0].text
    assert figures.standalone(forest()) == forest()
