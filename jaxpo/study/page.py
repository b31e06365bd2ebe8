"""A study's report as one HTML file that needs nothing beside it: no script, no font, no picture, no network."""

import functools
import statistics
from collections.abc import Iterable

import jinja2

from jaxpo.study import figures, svg
from jaxpo.study.findings import Findings, Spread
from jaxpo.study.palette import style_sheet


def render(findings: Findings) -> str:
    """The whole report: the same bytes for the same findings, on every machine. All text of it is escaped."""
    drawings, styles = figures.figures(findings), figures.styles(findings)
    metric, difference = _decimals(findings)
    return _template().render(
        findings=findings,
        design=findings.design,
        drawings=drawings,
        style_sheet=style_sheet(),
        swatches={method: figures.swatch(style) for method, style in styles.items()},
        grids=figures.of_kind(drawings, 'grid'),
        losses=figures.of_kind(drawings, 'loss'),
        metric=functools.partial(svg.number, decimals=metric),
        difference=functools.partial(svg.number, decimals=difference, sign=True),
        size=functools.partial(svg.number, decimals=difference),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader('jaxpo.study', '.'),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        'number': svg.number,
        'signed': functools.partial(svg.number, sign=True),
        'percent': percent,
        'p_value': p_value,
        'spread': spread,
        'duration': duration,
        'words': figures.short,
    }
    return environment.get_template('page.html.jinja')


def _decimals(findings: Findings) -> tuple[int, int]:
    """Decimals of the metric and of differences in it: three digits of what is usual in this study."""
    rows = findings.leaderboard.rows
    compared = [row.against_baseline for row in rows if row.against_baseline is not None]
    means = [row.mean for row in rows]
    differences = [end for one in compared for end in (one.difference, one.low, one.high)]
    return decimals_for(means), decimals_for(differences or means)


def decimals_for(numbers: Iterable[float | None]) -> int:
    """Decimals that show three digits of the middle of these numbers by size: 0 to 6, and 2 where there are none."""
    sizes = [abs(number) for number in numbers if svg.finite(number) and number]
    return min(6, max(0, 2 - svg.magnitude(statistics.median(sizes)))) if sizes else 2


def percent(share: float | None) -> str:
    """A share of 0 to 1; shares near the ends are not rounded to them."""
    if not svg.finite(share):
        return '–'
    if 0 < share < 0.001:
        return '<0.1 %'
    if 0.999 < share < 1:
        return '>99.9 %'
    return f'{100 * share:.1f} %'


def p_value(p: float | None) -> str:
    if not svg.finite(p):
        return '–'
    return '<0.001' if p < 0.001 else f'{p:.3f}'


def spread(numbers: Spread | None, sign: bool = False) -> str:
    """The mean over seeds, and where there are several, from the lowest to the highest."""
    if numbers is None or not svg.finite(numbers.mean):
        return '–'
    mean = svg.number(numbers.mean, sign=sign)
    if numbers.n < 2 or numbers.lowest == numbers.highest:
        return mean
    return f'{mean} ({svg.number(numbers.lowest, sign=sign)} to {svg.number(numbers.highest, sign=sign)})'


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for size, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.1f} s'
