"""A study's report as one HTML file that needs nothing beside it: no script, no font, no picture, no network."""

import functools
from collections.abc import Iterable

import jinja2

from jaxpo.study import figures, svg
from jaxpo.study.findings import Comparison, Findings, Spread
from jaxpo.study.palette import style_sheet


def render(findings: Findings) -> str:
    """The whole report: the same bytes for the same findings, on every machine. All text of it is escaped."""
    drawings, styles = figures.figures(findings), figures.styles(findings)
    metric, difference = _decimals_of_metric(findings)
    reward, reward_difference = _decimals_of_reward(findings)
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
        reward=functools.partial(svg.number, decimals=reward),
        reward_difference=functools.partial(svg.number, decimals=reward_difference, sign=True),
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
        'plain': svg.plain,
        'signed': functools.partial(svg.number, sign=True),
        'thousands': '{:,}'.format,
        'percent': percent,
        'p_value': p_value,
        'written': written,
        'duration': duration,
        'words': figures.short,
    }
    return environment.get_template('page.html.jinja')


def _decimals_of_metric(findings: Findings) -> tuple[int, int]:
    """Decimals of the metric and of differences in it: three and two digits of what is usual in this study."""
    rows = findings.leaderboard.rows
    return svg.decimals_for(row.mean for row in rows), _decimals_of_differences(row.against_baseline for row in rows)


def _decimals_of_reward(findings: Findings) -> tuple[int, int]:
    """The same of rewards at matched KL."""
    rows = [row for matched in findings.frontier.matched for row in matched.rows] if findings.frontier else []
    return svg.decimals_for(row.reward for row in rows), _decimals_of_differences(row.against_baseline for row in rows)


def _decimals_of_differences(comparisons: Iterable[Comparison | None]) -> int:
    compared = [one for one in comparisons if one is not None]
    return svg.decimals_for((end for one in compared for end in (one.difference, one.low, one.high)), digits=2)


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


def written(numbers: Spread | None, sign: bool = False) -> tuple[str, str]:
    """A mean over seeds, and from the lowest to the highest of them, empty where it says no more than the mean."""
    if numbers is None or not svg.finite(numbers.mean):
        return '–', ''
    decimals = svg.decimals_for((numbers.mean, numbers.lowest, numbers.highest))
    mean, low, high = (
        svg.number(number, decimals, sign=sign) for number in (numbers.mean, numbers.lowest, numbers.highest)
    )
    return mean, '' if numbers.n < 2 or low == high else f'{low} to {high}'


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for size, unit in ((3600, 'h'), (60, 'min')):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds:.1f} s'
