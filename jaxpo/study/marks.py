"""The shapes that charts draw values with, and the frames that say what the values are."""

import math

from jaxpo.study import svg
from jaxpo.study.palette import Style
from jaxpo.study.svg import Axis

# Corners about the middle, for a radius of 1; of about equal area.
SHAPES = {
    'square': ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    'triangle': ((0, -1.2), (1.1, 0.8), (-1.1, 0.8)),
    'inverted': ((0, 1.2), (-1.1, -0.8), (1.1, -0.8)),
    'diamond': ((0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)),
    'cross': tuple(
        (x * c - y * s, x * s + y * c)
        for c, s in ((math.cos(k * math.pi / 2), math.sin(k * math.pi / 2)) for k in range(4))
        for x, y in ((0.4, -1.15), (0.4, -0.4), (1.15, -0.4))
    ),
}


def marker(shape: str, x: float, y: float, radius: float, kind: str) -> str:
    """A shape of the style sheet's `kind` (filled, hollow or raw) with its middle at (x, y)."""
    if shape == 'circle':
        return svg.element('circle', cx=x, cy=y, r=radius, class_=kind)
    corners = ' '.join(f'{svg.coordinate(x + radius * a)},{svg.coordinate(y + radius * b)}' for a, b in SHAPES[shape])
    return svg.element('polygon', points=corners, class_=kind)


def path(points: list[tuple[float, float] | None], style: Style, *, steps: bool = False) -> str:
    """A line through points, broken where one is missing; as steps, each holds to the next."""
    written, before = [], None
    for point in points:
        if point is not None:
            x, y = map(svg.coordinate, point)
            written.append(f'M{x} {y}' if before is None else f'H{x}V{y}' if steps else f'L{x} {y}')
        before = point
    dash = {'stroke_dasharray': style.dash} if style.dash else {}
    return svg.element('path', d=''.join(written), class_='line', **dash) if written else ''


def stretches(points: list[tuple | None]) -> list[list[tuple]]:
    """Points between gaps."""
    found = [[]]
    for point in points:
        if point is None:
            found.append([])
        else:
            found[-1].append(point)
    return [stretch for stretch in found if stretch]


def columns(axis: Axis, left: float, right: float, top: float, bottom: float) -> list[str]:
    """Vertical lines at the ticks of a horizontal axis, their labels, and what the axis is."""
    parts = []
    for tick, label in zip(axis.ticks, axis.labels):
        x = svg.place(axis, tick, left, right)
        parts.append(svg.line(x, top, x, bottom, 'grid'))
        parts.append(svg.text(x, bottom + 17, label, anchor='middle', kind='tick'))
    parts.append(svg.text((left + right) / 2, bottom + 38, axis.label, anchor='middle'))
    return parts


def rows(axis: Axis, left: float, right: float, top: float, bottom: float) -> list[str]:
    """Horizontal lines at the ticks of a vertical axis, their labels, and above them what the axis is."""
    parts = []
    for tick, label in zip(axis.ticks, axis.labels):
        y = svg.place(axis, tick, bottom, top)
        parts.append(svg.line(left, y, right, y, 'grid'))
        parts.append(svg.text(left - 8, y + 4, label, anchor='end', kind='tick'))
    parts.append(svg.text(left, top - 12, axis.label))
    return parts


def spread(wanted: list[float], gap: float, top: float, bottom: float) -> list[float]:
    """Heights near the wanted ones, in their order, at least `gap` apart, within bounds where there is room."""
    order = sorted(range(len(wanted)), key=lambda place: (wanted[place], place))
    heights, least = [0.0] * len(wanted), top
    for place in order:
        heights[place] = max(wanted[place], least)
        least = heights[place] + gap
    most = bottom
    for place in reversed(order):
        heights[place] = min(heights[place], most)
        most = heights[place] - gap
    return heights
