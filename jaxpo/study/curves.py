"""Charts over two axes: learning curves, frontiers, profiles, budgets and calibration."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jaxpo.study import marks, svg
from jaxpo.study.palette import MUTED, Style
from jaxpo.study.svg import Axis, Scale

WIDTH, HEIGHT = 880, 440
LEFT, TOP, BELOW = 62, 36, 52
LABELS = 150  # most width of names beside the plot
GAP = 17  # between names
MARKED = 6  # most markers on a line
CLEAR, BANDED = 5, 3  # most bands that can be told apart; how many are drawn of more: the baseline's and the best's
Point = tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Series:
    """What a method has in a chart: any of a line, a band about it and points. Missing numbers (None, NaN) are gaps."""

    name: str
    line: tuple[Point, ...] = ()
    band: tuple[tuple[float | None, float | None, float | None], ...] = ()  # (x, low, high)
    points: tuple[Point, ...] = ()


def curves(
    series: Sequence[Series],
    *,
    name: str,
    title: str,
    x: Scale,
    y: Scale,
    styles: Mapping[str, Style],
    steps: bool = False,
    guides: Sequence[tuple[float, str]] = (),
    diagonal: bool = False,
) -> str:
    """Lines, bands and points of methods over two axes.

    Methods whose style is muted are drawn in grey, under the others, and counted beside the plot; the others are named
    there, by the height at which their lines end. Where many are named, only the first few of `styles` keep bands.

    Args:
      steps: lines keep their value to the next point.
      guides: vertical lines at these x, with their labels.
      diagonal: a line where x = y, as for calibration.
    """
    x_axis = svg.axis_of(x, [px for one in series for px, py in _drawn(one) if _there(y, py)])
    y_axis = svg.axis_of(y, [py for one in series for px, py in _drawn(one) if _there(x, px)])
    if x_axis is None or y_axis is None:
        return svg.nothing(f'No values to show: no method has {y.label}.')
    shown = [one for one in series if not styles.get(one.name, MUTED).muted]
    names = [one.name for one in shown] + ['000 others']
    right = WIDTH - 40 - min(LABELS, max(map(svg.text_width, names)))
    bottom = TOP + max(HEIGHT - TOP - BELOW, GAP * len(names))
    box = Box(x_axis, y_axis, LEFT, right, TOP, bottom)
    parts = [*marks.columns(x_axis, LEFT, right, TOP, bottom), *marks.rows(y_axis, LEFT, right, TOP, bottom)]
    if diagonal:
        parts += _diagonal(box)
    for place, guide in enumerate(guides):
        parts += _guide(box, *guide, box.bottom - 8 - 15 * place)
    banded = {one.name for one in shown} if len(shown) <= CLEAR else {*list(styles)[:BANDED]}
    # Stable: what is muted comes first, so that it lies beneath.
    for one in sorted(series, key=lambda one: one in shown):
        band = one.band if one.name in banded else ()
        parts.append(_series(dataclasses.replace(one, band=band), box, styles.get(one.name, MUTED), steps))
    parts += _names(shown, len(series) - len(shown), box, styles)
    description = f'{len(series)} methods: {y.label} against {x.label}.'
    return svg.document(name, title, description, WIDTH, bottom + BELOW, parts)


@dataclasses.dataclass(frozen=True)
class Box:
    """The plot's area: two axes and where they run."""

    x: Axis
    y: Axis
    left: float
    right: float
    top: float
    bottom: float

    def at(self, x: float | None, *ys: float | None) -> tuple[float, ...] | None:
        """Where a point is, or the ends of a band; None where a number is missing or outside."""
        places = (
            svg.place(self.x, x, self.left, self.right),
            *(svg.place(self.y, y, self.bottom, self.top) for y in ys),
        )
        return None if None in places else places


def _drawn(one: Series) -> list[Point]:
    bands = [(x, end) for x, low, high in one.band for end in (low, high)]
    return [*one.line, *one.points, *bands]


def _there(scale: Scale, value: float | None) -> bool:
    return svg.finite(value) and (value > 0 or not scale.log)


def _series(one: Series, box: Box, style: Style, steps: bool) -> str:
    line = [box.at(*point) for point in one.line]
    parts = [svg.element('title', svg.escape(one.name))]
    parts += [_band(stretch, steps) for stretch in marks.stretches([box.at(*edge) for edge in one.band])]
    for point in filter(None, (box.at(*point) for point in one.points)):
        parts.append(marks.marker(style.marker, *point, 3, 'raw'))
    parts.append(marks.path(line, style, steps=steps))
    if not style.muted:
        parts += [marks.marker(style.marker, *point, 3.5, 'filled') for point in _marked(line)]
    # A point without neighbours has no line to be seen by.
    parts += [marks.marker(style.marker, *only[0], 3, 'filled') for only in marks.stretches(line) if len(only) == 1]
    return svg.element('g', *parts, class_=f'series {style.colour}')


def _marked(line: list[tuple[float, float] | None]) -> list[tuple[float, float]]:
    """The points of a line that get its marker, the last among them: few enough to see the line."""
    stride = math.ceil(len(line) / MARKED)
    return [point for place, point in enumerate(reversed(line)) if point and place % stride == 0]


def _band(edges: list[tuple[float, float, float]], steps: bool) -> str:
    """A filled band between (x, low, high) that are places already."""
    lower = [(x, low) for x, low, _ in edges]
    upper = [(x, high) for x, _, high in edges]
    if steps:
        lower, upper = _stairs(lower), _stairs(upper)
    corners = ' '.join(f'{svg.coordinate(x)},{svg.coordinate(y)}' for x, y in [*lower, *reversed(upper)])
    return svg.element('polygon', points=corners, class_='band')


def _stairs(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    corners = [(x, y) for (_, y), (x, _) in zip(points, points[1:])]
    return [p for pair in zip(points, corners) for p in pair] + points[-1:]


def _guide(box: Box, value: float, label: str, y: float) -> list[str]:
    x = svg.place(box.x, value, box.left, box.right)
    if x is None:
        return []
    before = x > (box.left + box.right) / 2
    text = svg.text(x - 6 if before else x + 6, y, label, anchor='end' if before else 'start', kind='note')
    return [svg.line(x, box.top, x, box.bottom, 'guide'), text]


def _diagonal(box: Box) -> list[str]:
    low = max(box.x.ticks[0], box.y.ticks[0])
    high = min(box.x.ticks[-1], box.y.ticks[-1])
    if low >= high:
        return []
    (x1, y1), (x2, y2) = box.at(low, low), box.at(high, high)
    return [svg.line(x1, y1, x2, y2, 'diagonal')]


def _names(shown: Sequence[Series], others: int, box: Box, styles: Mapping[str, Style]) -> list[str]:
    """The names of methods, each near the height at which its line ends and after a sample of its line."""
    shown = [one for one in shown if _end(one, box)]
    ends = [_end(one, box) for one in shown]
    wanted = [end[1] for end in ends]
    wanted += [max(wanted, default=box.top)] if others else []
    heights = marks.spread(wanted, GAP, box.top + 4, box.bottom)
    x = box.right + 8
    parts = []
    for one, end, y in zip(shown, ends, heights):
        style = styles[one.name]
        dash = {'stroke_dasharray': style.dash} if style.dash else {}
        sample = svg.element('path', d=f'M{svg.coordinate(x)} {svg.coordinate(y)}h20', class_='line', **dash)
        if box.right - end[0] < 3:
            parts.append(svg.line(end[0] + 5, end[1], x - 1, y, 'leader'))
        dot = marks.marker(style.marker, x + 10, y, 3.5, 'filled')
        name = svg.text(x + 26, y + 4, svg.shortened(one.name, LABELS))
        parts.append(svg.element('g', sample, dot, name, class_=style.colour))
    if others:
        y = heights[-1]
        sample = svg.element('path', d=f'M{svg.coordinate(x)} {svg.coordinate(y)}h20', class_='line')
        said = svg.text(x + 26, y + 4, f'{others} other{"s" if others > 1 else ""}', kind='note')
        parts.append(svg.element('g', sample, said, class_='muted'))
    return parts


def _end(one: Series, box: Box) -> tuple[float, float] | None:
    there = [place for place in (box.at(*point) for point in one.line or one.points) if place]
    return max(there) if there else None


SMALL = (176, 96)


def small(line: Sequence[Point], *, name: str, title: str, label: str) -> str:
    """One line without ticks, its ends written instead: for many side by side, each on a scale of its own."""
    width, height = SMALL
    there = [(x, y) for x, y in line if svg.finite(x) and svg.finite(y)]
    if not there:
        return svg.nothing(f'{title}: no {label}.')
    x_axis, y_axis = (svg.axis_of(Scale(''), [point[side] for point in there]) for side in (0, 1))
    box = Box(x_axis, y_axis, 2, width - 4, 24, height - 22)
    path = marks.path([box.at(*point) for point in line], Style('c0'))
    first, last = there[0][1], there[-1][1]
    parts = [
        svg.text(0, 12, svg.shortened(title, width), kind='strong'),
        svg.line(box.left, box.bottom + 3, box.right, box.bottom + 3, 'grid'),
        svg.element('g', path, marks.marker('circle', *box.at(*there[-1]), 2.5, 'filled'), class_='accent'),
        svg.text(0, height - 4, svg.number(first), kind='tick'),
        svg.text(width, height - 4, svg.number(last), anchor='end', kind='tick'),
    ]
    description = f'{label} of {title}, from {svg.number(first)} at first to {svg.number(last)} at last.'
    return svg.document(name, f'{label} of {title}', description, width, height, parts)
