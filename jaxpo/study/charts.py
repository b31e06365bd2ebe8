"""Charts with a row for each method: intervals, changes of health numbers, and values over a grid of settings."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from jaxpo.study import marks, svg
from jaxpo.study.palette import LEVELS, MUTED, Style
from jaxpo.study.statistics import BETTER, NO_CLAIM, WORSE
from jaxpo.study.svg import Scale

WIDTH = 880
ROW = 24
SHAPE_OF = {BETTER: 'triangle', WORSE: 'inverted', NO_CLAIM: 'circle'}


@dataclasses.dataclass(frozen=True)
class Interval:
    """A method's difference to the baseline. Numbers may be missing (None or NaN)."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    verdict: str  # of `statistics.VERDICTS`


@dataclasses.dataclass(frozen=True)
class Change:
    """Numbers of a method in the same unit, one for each end that the chart names. Each may be missing."""

    name: str
    values: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True)
class Grid:
    """A metric at each setting of a method: `values[row][column]`, None or NaN where there is none."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    chosen: tuple[int, int] | None = None  # row and column
    row_axis: str = ''
    column_axis: str = ''


def forest(
    intervals: Sequence[Interval],
    *,
    name: str,
    title: str,
    label: str,
    styles: Mapping[str, Style],
    higher_is_better: bool = True,
) -> str:
    """Interval plot: a row for each method, with its difference, interval and verdict, about a line at 0.

    A claim is filled and points up (better) or down (worse), no claim is a hollow circle; the verdict is written, too.
    An interval much wider than the differences are far apart is cut off with an arrow.
    """
    axis = svg.axis_of(Scale(label, include=(0.0,)), _shown(intervals))
    if axis is None:
        return svg.nothing('No differences to show: no method has a finished pair with the baseline.')
    decimals = svg.decimals_for((number for one in intervals for number in (one.value, one.low, one.high)), digits=2)
    left, right, top = _name_width(one.name for one in intervals), WIDTH - 250, 34
    bottom = top + ROW * len(intervals)
    zero = svg.place(axis, 0.0, left, right)
    sides = ('← worse', 'better →') if higher_is_better else ('← better', 'worse →')
    parts = [
        *marks.columns(axis, left, right, top, bottom),
        svg.line(zero, top - 6, zero, bottom, 'zero'),
        svg.text(zero - 8, top - 12, sides[0], anchor='end', kind='note'),
        svg.text(zero + 8, top - 12, sides[1], kind='note'),
    ]
    for place, one in enumerate(intervals):
        y, style = top + ROW * (place + 0.5), styles.get(one.name, MUTED)
        parts.append(_interval(one, axis, left, right, y, style, decimals))
    said = ', '.join(
        f'{sum(one.verdict == verdict for one in intervals)} {verdict}' for verdict in (BETTER, WORSE, NO_CLAIM)
    )
    description = f'Interval plot of {len(intervals)} methods: {label}. {said}. The numbers stand in the table.'
    return svg.document(name, title, description, WIDTH, bottom + 50, parts)


def _shown(intervals: Sequence[Interval]) -> list[float]:
    """What the axis covers: all values, and of intervals what is within twice the furthest, or thrice the usual end."""
    values = [one.value for one in intervals if svg.finite(one.value)]
    ends = [end for one in intervals for end in (one.low, one.high) if svg.finite(end)]
    if not ends:
        return values
    reach = max(3 * statistics.median(map(abs, ends)), *(2 * abs(value) for value in values))
    return values + [max(-reach, min(reach, end)) for end in ends]


def _interval(one: Interval, axis: svg.Axis, left: float, right: float, y: float, style: Style, decimals: int) -> str:
    parts = [svg.text(left - 14, y + 4, svg.shortened(one.name, left - 20), anchor='end')]
    if svg.finite(one.low) and svg.finite(one.high):
        ends = [
            svg.place(axis, min(max(end, axis.ticks[0]), axis.ticks[-1]), left, right) for end in (one.low, one.high)
        ]
        parts.append(svg.line(ends[0], y, ends[1], y, 'extent'))
        cut = (one.low < axis.ticks[0], one.high > axis.ticks[-1])
        for end, is_cut, outwards in zip(ends, cut, (-1, 1)):
            parts.append(_arrow(end, y, outwards) if is_cut else svg.line(end, y - 4, end, y + 4, 'extent'))
    x = svg.place(axis, one.value, left, right)
    if x is not None:
        shape = SHAPE_OF[one.verdict]
        parts.append(marks.marker(shape, x, y, 5, 'hollow' if one.verdict == NO_CLAIM else 'filled'))
    low, value, high = (svg.number(number, decimals, sign=True) for number in (one.low, one.value, one.high))
    parts.append(svg.text(right + 66, y + 4, value, anchor='end', kind='strong'))
    parts.append(svg.text(right + 74, y + 4, f'[{low}, {high}]' if svg.finite(one.low) else '', kind='note'))
    parts.append(
        svg.text(WIDTH, y + 4, one.verdict, anchor='end', kind='note' if one.verdict == NO_CLAIM else 'strong')
    )
    title = svg.element('title', svg.escape(f'{one.name}: {value} [{low}, {high}], {one.verdict}'))
    kind = 'series ' + style.colour + (' no-claim' if one.verdict == NO_CLAIM else '')
    return svg.element('g', title, *parts, class_=kind)


def _arrow(x: float, y: float, outwards: int) -> str:
    tip, back = svg.coordinate(x), svg.coordinate(x - outwards * 6)
    corners = f'{tip},{svg.coordinate(y)} {back},{svg.coordinate(y - 4)} {back},{svg.coordinate(y + 4)}'
    return svg.element('polygon', points=corners, class_='filled')


def _name_width(names) -> float:
    return min(200.0, max((svg.text_width(name) for name in names), default=0.0)) + 24


def changes(
    rows: Sequence[Change],
    *,
    name: str,
    title: str,
    scale: Scale,
    ends: Sequence[str],
    styles: Mapping[str, Style],
) -> str:
    """Dot plot with a row for each method; with two `ends` (chosen and rejected) a line joins its two dots.

    The first end is a filled circle, the second a hollow square.
    """
    axis = svg.axis_of(scale, [value for row in rows for value in row.values])
    if axis is None:
        return svg.nothing(f'No values to show: no method has {scale.label}.')
    left, right, top = _name_width(row.name for row in rows), WIDTH - 150, 34
    bottom = top + ROW * len(rows)
    zero = svg.place(axis, 0.0, left, right)
    parts = [*marks.columns(axis, left, right, top, bottom), *_legend(ends, left)]
    if zero is not None:
        parts.append(svg.line(zero, top - 6, zero, bottom, 'zero'))
    for place, row in enumerate(rows):
        parts.append(_change(row, axis, left, right, top + ROW * (place + 0.5), styles.get(row.name, MUTED)))
    description = f'Dot plot of {len(rows)} methods: {scale.label}; {", ".join(ends)}.'
    return svg.document(name, title, description, WIDTH, bottom + 50, parts)


END_MARKS = (('circle', 'filled'), ('square', 'hollow'))


def _legend(ends: Sequence[str], left: float) -> list[str]:
    parts, x = [], left + 6
    for end, (shape, kind) in zip(ends, END_MARKS):
        parts += [marks.marker(shape, x, 14, 4.5, kind), svg.text(x + 10, 18, end, kind='note')]
        x += 34 + svg.text_width(end)
    return [svg.element('g', *parts, class_='c0')]


def _change(row: Change, axis: svg.Axis, left: float, right: float, y: float, style: Style) -> str:
    places = [svg.place(axis, value, left, right) for value in row.values]
    there = [x for x in places if x is not None]
    parts = [svg.text(left - 14, y + 4, svg.shortened(row.name, left - 20), anchor='end')]
    if len(there) > 1:
        parts.append(svg.line(min(there), y, max(there), y, 'extent'))
    for x, (shape, kind) in zip(places, END_MARKS):
        if x is not None:
            parts.append(marks.marker(shape, x, y, 4.5, kind))
    written = ' / '.join(svg.number(value, sign=value is not None and axis.ticks[0] < 0) for value in row.values)
    parts.append(svg.text(WIDTH, y + 4, written, anchor='end', kind='note'))
    return svg.element('g', svg.element('title', svg.escape(f'{row.name}: {written}')), *parts, class_=_kind(style))


def _kind(style: Style) -> str:
    return f'series {style.colour}'


CELL = (64, 26)


def heat_map(grid: Grid, *, name: str, title: str, worst: float, best: float) -> str:
    """A metric at each setting, written and shaded from `worst` to `best`, which all methods of a report share.

    The chosen setting has a frame; a setting without a value has a dash.
    """
    if not any(svg.finite(value) for row in grid.values for value in row):
        return svg.nothing(f'{title}: no setting has a value.')
    width, height = CELL
    left = max(svg.text_width(label) for label in (*grid.rows, grid.row_axis)) + 12
    top, full = 56, left + width * max(2, len(grid.columns)) + 2
    parts = [
        svg.text(0, 12, svg.shortened(title, full), kind='strong'),
        svg.text(left - 8, top - 6, grid.row_axis, anchor='end', kind='note'),
        svg.text(left + 4, 33, svg.shortened(grid.column_axis, full - left), kind='note'),
    ]
    for column, label in enumerate(grid.columns):
        parts.append(svg.text(left + width * (column + 0.5), top - 6, label, anchor='middle', kind='tick'))
    for row, label in enumerate(grid.rows):
        y = top + height * row
        parts.append(svg.text(left - 8, y + height / 2 + 4, label, anchor='end', kind='tick'))
        for column, value in enumerate(grid.values[row]):
            parts += _cell(value, left + width * column, y, worst, best)
    if grid.chosen is not None:
        row, column = grid.chosen
        x, y = left + width * column + 1, top + height * row + 1
        parts.append(svg.element('rect', x=x, y=y, width=width - 2, height=height - 2, rx=2, class_='chosen'))
    description = f'{title}: the metric over {grid.row_axis} by {grid.column_axis}, chosen setting framed.'
    return svg.document(name, title, description, full, top + height * len(grid.rows) + 2, parts)


def _cell(value: float | None, x: float, y: float, worst: float, best: float) -> list[str]:
    width, height = CELL
    if not svg.finite(value):
        box = svg.element('rect', x=x + 1, y=y + 1, width=width - 2, height=height - 2, rx=2, class_='empty-cell')
        return [box, svg.text(x + width / 2, y + height / 2 + 4, '–', anchor='middle', kind='note')]
    share = (value - worst) / (best - worst) if best != worst else 0.5
    level = min(LEVELS - 1, max(0, int(share * LEVELS)))
    box = svg.element('rect', x=x + 1, y=y + 1, width=width - 2, height=height - 2, rx=2, class_=f'h{level}')
    return [box, svg.text(x + width / 2, y + height / 2 + 4, svg.number(value), anchor='middle')]
