"""Vector graphics as text: escaped, with numbers written one way, and coloured by classes that a style sheet defines.

Lengths are in units of the drawing: one is a CSS pixel where it is shown at its full width.
"""

import dataclasses
import html
import math
import re
import statistics
from collections.abc import Iterable, Sequence

NAMESPACE = 'http://www.w3.org/2000/svg'
MINUS = '\N{MINUS SIGN}'
FORBIDDEN = re.compile('[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]')  # by XML 1.0, section 2.2
NARROW, WIDE = set("iljtfrI.,:;|!'()[] "), set('mwMW@%')


@dataclasses.dataclass(frozen=True)
class Scale:
    """What an axis says and how it runs, before there are data."""

    label: str  # with the unit
    log: bool = False
    bounds: tuple[float, float] | None = None  # where the range is known beforehand, as of shares
    include: tuple[float, ...] = ()  # values that the axis covers beside the data
    whole: bool = False  # whether values between whole numbers mean nothing, as of counts


@dataclasses.dataclass(frozen=True)
class Axis:
    """A scale over data: round ticks, of which the first and the last are its ends."""

    label: str
    ticks: tuple[float, ...]
    labels: tuple[str, ...]
    log: bool = False


def escape(text: str) -> str:
    """Text for markup: no character of it is read as markup, and what XML forbids is replaced."""
    return html.escape(FORBIDDEN.sub('\N{REPLACEMENT CHARACTER}', str(text)))


def coordinate(value: float) -> str:
    """A length with two decimals at most, and no negative zero."""
    written = f'{value:.2f}'.rstrip('0').rstrip('.')
    return '0' if written == '-0' else written


def element(tag: str, *children: str, **attributes: str | float) -> str:
    """One element. Children are markup already; attributes are escaped (`class_` is `class`, `_` a hyphen)."""
    written = ''.join(
        f' {name.rstrip("_").replace("_", "-")}="{coordinate(v) if isinstance(v, int | float) else escape(v)}"'
        for name, v in attributes.items()
    )
    return f'<{tag}{written}>{"".join(children)}</{tag}>' if children else f'<{tag}{written}/>'


def text(x: float, y: float, content: str, *, anchor: str = 'start', kind: str = 'label') -> str:
    return element('text', escape(content), x=x, y=y, text_anchor=anchor, class_=kind)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return element('line', x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def text_width(content: str, size: float = 12.0) -> float:
    """About as wide as the text is in a sans-serif of this size: no fonts are read, so that bytes stay the same."""
    widths = (0.32 if c in NARROW else 0.88 if c in WIDE else 1.0 if ord(c) > 0x2E80 else 0.6 for c in content)
    return size * sum(widths)


def shortened(content: str, width: float, size: float = 12.0) -> str:
    """The text, or its beginning and an ellipsis, no wider than `width`."""
    if text_width(content, size) <= width:
        return content
    while content and text_width(content + '…', size) > width:
        content = content[:-1]
    return content + '…'


def finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def number(value: float | None, decimals: int | None = None, *, sign: bool = False) -> str:
    """A number for people: 3 significant digits unless `decimals` are given; a dash where there is none."""
    if not finite(value):
        return '–'
    if decimals is None:
        size = abs(value)
        if size and not 1e-3 <= size < 1e6:
            return _scientific(value, sign)
        decimals = max(0, 2 - magnitude(size)) if size else 0
    written = f'{value:,.{decimals}f}'
    if float(written.replace(',', '')) == 0:
        return written.removeprefix('-')
    return (('+' if sign and value > 0 else '') + written).replace('-', MINUS)


def plain(value: float | None) -> str:
    """A number alone in a sentence: 3 significant digits at most, and no zeros at its end."""
    written = number(value)
    return written.rstrip('0').rstrip('.') if '.' in written and 'e' not in written else written


def decimals_for(numbers: Iterable[float | None], digits: int = 3) -> int:
    """Decimals that show so many digits of the middle of these numbers by size: 0 to 6, and 2 where there are none."""
    sizes = [abs(number) for number in numbers if finite(number) and number]
    return min(6, max(0, digits - 1 - magnitude(statistics.median(sizes)))) if sizes else 2


def magnitude(size: float) -> int:
    """The power of ten of a number's first digit, the number being above 0."""
    return math.floor(math.log10(size))


def _scientific(value: float, sign: bool = False) -> str:
    mantissa, exponent = f'{value:.2e}'.split('e')
    mantissa = mantissa.rstrip('0').rstrip('.')
    return f'{"+" if sign and value > 0 else ""}{mantissa}e{int(exponent)}'.replace('-', MINUS)


def ticks_between(low: float, high: float, *, whole: bool = False, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten (`whole`: of 1 at least), at most `most` steps of them, that enclose
    `low` to `high`."""
    if low == high:
        reach = 1.0 if whole else abs(low) / 10 or 1.0
        low, high = low - reach, high + reach
    exponent = magnitude((high - low) / most)
    exponent = max(exponent, 0) if whole else exponent
    for mantissa, power in ((1, 0), (2, 0), (5, 0), (1, 1), (2, 1)):
        exponent_here = exponent + power
        step = mantissa * 10.0**exponent_here
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first <= most:
            break
    # Each is the float nearest to its decimal numeral, which multiples of the step are not.
    return [float(f'{place * mantissa}e{exponent_here}') for place in range(first, last + 1)]


def log_ticks_between(low: float, high: float, most: int = 7) -> list[float]:
    """Powers of ten, or, over few decades, 1, 2 and 5 times powers of ten, that enclose `low` to `high`, both > 0."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    if last - first > 2:
        stride = math.ceil((last - first) / most)
        return [float(f'1e{power}') for power in range(first, last + stride, stride)]
    fine = [float(f'{mantissa}e{power}') for power in range(first, last + 1) for mantissa in (1, 2, 5)]
    start = max(place for place, tick in enumerate(fine) if tick <= low * (1 + 1e-9))
    end = min(place for place, tick in enumerate(fine) if tick >= high * (1 - 1e-9))
    return fine[start : max(end, start + 1) + 1]


def axis_of(scale: Scale, values: Iterable[float | None]) -> Axis | None:
    """The axis of a scale that covers all values that can be shown on it; None where there are none."""
    there = [v for v in values if finite(v) and (v > 0 or not scale.log)]
    if not there:
        return None
    there += scale.bounds or scale.include
    ends = scale.bounds or (min(there), max(there))
    ticks = log_ticks_between(*ends) if scale.log else ticks_between(*ends, whole=scale.whole)
    return Axis(scale.label, tuple(ticks), tuple(_tick_labels(ticks, scale.log)), scale.log)


def _tick_labels(ticks: Sequence[float], log: bool) -> list[str]:
    """With the decimals of the step between ticks, on a log axis each tick's own; all of them scientific or none."""
    grains = [abs(tick) if log else ticks[1] - ticks[0] for tick in ticks]
    if max(map(abs, ticks)) >= 1e5 or min(grains) < 1e-3:
        return [_scientific(tick) if tick else '0' for tick in ticks]
    return [number(tick, max(0, -math.floor(math.log10(grain) + 1e-9))) for tick, grain in zip(ticks, grains)]


def place(axis: Axis, value: float | None, start: float, end: float) -> float | None:
    """Where a value is, between `start` (the axis' first tick) and `end` (its last); None where it has no place."""
    if not finite(value) or (axis.log and value <= 0):
        return None
    along = math.log10 if axis.log else float
    low, high = along(axis.ticks[0]), along(axis.ticks[-1])
    share = (along(value) - low) / (high - low)
    return start + share * (end - start) if -1e-9 <= share <= 1 + 1e-9 else None


def document(name: str, title: str, description: str, width: float, height: float, parts: Sequence[str]) -> str:
    """A whole drawing. `name` is unique in its page: letters, digits and hyphens."""
    return element(
        'svg',
        element('title', escape(title), id=f'{name}-title'),
        element('desc', escape(description), id=f'{name}-description'),
        *parts,
        xmlns=NAMESPACE,
        viewBox=f'0 0 {coordinate(width)} {coordinate(height)}',
        width=width,
        height=height,
        role='img',
        class_='chart',
        aria_labelledby=f'{name}-title {name}-description',
    )


def nothing(sentence: str) -> str:
    """What stands in a chart's place where there is nothing to draw."""
    return element('p', escape(sentence), class_='nothing')
