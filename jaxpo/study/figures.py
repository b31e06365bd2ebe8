"""The charts of a report, from its findings: name -> drawing. A chart without data is a sentence that says so."""

from collections.abc import Callable, Mapping, Sequence

from jaxpo.study import charts, curves, marks, svg
from jaxpo.study.findings import Findings, HealthRow, RobustnessRow, Spread
from jaxpo.study.matched import means_over_seeds
from jaxpo.study.palette import COLOURS, Style, style_sheet, styles_of
from jaxpo.study.svg import Scale

HIGHLIGHTED = 8  # methods with a colour where there are more than COLOURS
SHARE = (0.0, 1.0)


def styles(findings: Findings) -> dict[str, Style]:
    """How each method looks throughout the report: colours go to the best, the A/A arm is the baseline dashed."""
    design = findings.design
    ranked = [row.method for row in findings.leaderboard.rows]
    most = COLOURS if len({*ranked, design.baseline}) <= COLOURS else HIGHLIGHTED
    return {**styles_of(ranked, design.baseline, most), design.again: Style('c0', '2 3', 'square')}


def figures(findings: Findings) -> dict[str, str]:
    """All charts of the report by name, those of heat maps and losses with the place of their method in the report."""
    style = styles(findings)
    return {
        'leaderboard': _leaderboard(findings, style),
        'against-itself': _against_itself(findings, style),
        **(_frontier(findings, style) if findings.frontier else {}),
        **_robustness(findings, style),
        **(_length(findings, style) if findings.length else {}),
        **(_health(findings, style) if findings.health else {}),
        **(_learning(findings, style) if findings.learning else {}),
        'compute': _compute(findings, style),
    }


def alone(findings: Findings) -> dict[str, str]:
    """The charts that are drawn, each as a file of its own; heat maps and losses, one a method, stay in the page."""
    drawn = {name: drawing for name, drawing in figures(findings).items() if drawing.startswith('<svg')}
    return {name: standalone(drawing) for name, drawing in drawn.items() if not name.startswith(('grid-', 'loss-'))}


def standalone(drawing: str) -> str:
    """A drawing with its colours, to be kept as a file of its own; a sentence in a chart's place stays as it is."""
    sheet = svg.element('style', style_sheet() + 'svg{background:var(--paper)}')
    return drawing.replace('>', f'>{sheet}', 1) if drawing.startswith('<svg') else drawing


def swatch(style: Style) -> str:
    """A method's line and marker, to stand before its name in a table."""
    dash = {'stroke_dasharray': style.dash} if style.dash else {}
    line = svg.element('path', d='M0 6h22', class_='line', **dash)
    sample = svg.element('g', line, marks.marker(style.marker, 11, 6, 3.5, 'filled'), class_=style.colour)
    return svg.element('svg', sample, viewBox='0 0 22 12', class_='chart swatch', aria_hidden='true')


def _leaderboard(findings: Findings, style: Mapping[str, Style]) -> str:
    rows = [row for row in findings.leaderboard.rows if row.against_baseline is not None]
    intervals = [charts.Interval(row.method, *_interval(row.against_baseline)) for row in rows]
    return charts.forest(
        intervals,
        name='leaderboard',
        title=f'Difference from {findings.design.baseline}',
        label=f'{findings.design.metric}, difference from {findings.design.baseline}',
        styles=style,
        higher_is_better=findings.design.higher_is_better,
    )


def _interval(comparison) -> tuple:
    return comparison.difference, comparison.low, comparison.high, comparison.verdict


def _against_itself(findings: Findings, style: Mapping[str, Style]) -> str:
    row, design = findings.against_itself.row, findings.design
    found = [] if row.against_baseline is None else [charts.Interval(row.method, *_interval(row.against_baseline))]
    return charts.forest(
        found,
        name='against-itself',
        title=f'{design.baseline} against itself',
        label=f'{design.metric}, difference between two arms of {design.baseline}',
        styles=style,
        higher_is_better=design.higher_is_better,
    )


def _frontier(findings: Findings, style: Mapping[str, Style]) -> dict[str, str]:
    series = [
        curves.Series(
            one.method,
            line=tuple((point.kl, point.reward) for point in one.front),
            points=() if style[one.method].muted else tuple(means_over_seeds(one.points)),
        )
        for one in findings.frontier.methods
    ]
    drawn = curves.curves(
        series,
        name='frontier',
        title='Reward against KL',
        x=Scale('KL(policy || reference), nats of a completion', include=(0.0,)),
        y=Scale('reward of samples'),
        styles=style,
        guides=[(one.kl, f'KL {svg.plain(one.kl)}') for one in findings.frontier.matched],
    )
    return {'frontier': drawn}


def _robustness(findings: Findings, style: Mapping[str, Style]) -> dict[str, str]:
    rows, metric = findings.robustness.rows, findings.design.metric
    better = 'above' if findings.design.higher_is_better else 'below'
    profiles = [
        curves.Series(
            row.method,
            tuple((point.threshold, point.share) for point in row.profile),
            tuple((point.threshold, point.low, point.high) for point in row.profile),
        )
        for row in rows
    ]
    budgets = [curves.Series(row.method, tuple(enumerate(row.best_of, start=1))) for row in rows]
    return {
        'profile': curves.curves(
            profiles,
            name='profile',
            title='Performance profile',
            x=Scale(f'threshold of {metric}'),
            y=Scale(f'share of runs {better} the threshold', bounds=SHARE),
            styles=style,
            steps=True,
        ),
        'best-of': curves.curves(
            budgets,
            name='best-of',
            title='Expected best of k settings',
            x=Scale('settings tried, k', whole=True),
            y=Scale(f'expected {metric} of the one chosen'),
            styles=style,
        ),
        **_heat_maps(rows, findings.design.higher_is_better),
    }


def _heat_maps(rows: Sequence[RobustnessRow], higher_is_better: bool) -> dict[str, str]:
    values = [cell.report_mean for row in rows for cell in row.grid if svg.finite(cell.report_mean)]
    worst, best = sorted((min(values, default=0.0), max(values, default=0.0)), reverse=not higher_is_better)
    return {
        f'grid-{place}': charts.heat_map(_grid(row), name=f'grid-{place}', title=row.method, worst=worst, best=best)
        for place, row in enumerate(rows)
    }


def _grid(row: RobustnessRow) -> charts.Grid:
    """A method's settings by its last field across and all others down."""
    across = tuple(dict.fromkeys(cell.values[-1] if cell.values else '' for cell in row.grid))
    down = tuple(dict.fromkeys(', '.join(cell.values[:-1]) for cell in row.grid))
    at = {(', '.join(cell.values[:-1]), cell.values[-1] if cell.values else ''): cell for cell in row.grid}
    chosen = next((place for place, cell in at.items() if cell.chosen), None)
    names = [short(field) for field in row.fields]
    return charts.Grid(
        down,
        across,
        tuple(tuple(at[d, a].report_mean if (d, a) in at else None for a in across) for d in down),
        None if chosen is None else (down.index(chosen[0]), across.index(chosen[1])),
        ', '.join(names[:-1]),
        names[-1] if names else '',
    )


def short(field: str) -> str:
    """The last part of a dotted name, as words."""
    return field.rsplit('.', 1)[-1].replace('_', ' ')


def _length(findings: Findings, style: Mapping[str, Style]) -> dict[str, str]:
    rows = [
        charts.Change(row.method, (_mean(row.accuracy), _mean(row.controlled_accuracy))) for row in findings.length.rows
    ]
    drawn = charts.changes(
        rows,
        name='length',
        title='Accuracy with and without what length explains',
        scale=Scale('held-out accuracy of the method’s own reward, share of pairs'),
        ends=('raw', 'length-controlled'),
        styles=style,
    )
    return {'length': drawn}


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _health(findings: Findings, style: Mapping[str, Style]) -> dict[str, str]:
    rows = findings.health.rows

    def dots(
        name: str, title: str, scale: Scale, ends: Sequence[str], *of: Callable[[HealthRow], Spread | None]
    ) -> str:
        numbers = [charts.Change(row.method, tuple(_mean(get(row)) for get in of)) for row in rows]
        return charts.changes(numbers, name=name, title=title, scale=scale, ends=ends, styles=style)

    return {
        'log-probabilities': dots(
            'log-probabilities',
            'Change of log-probabilities',
            Scale('change of the log-probability of a completion from the start, nats', include=(0.0,)),
            ('chosen', 'rejected'),
            lambda row: row.chosen_change,
            lambda row: row.rejected_change,
        ),
        'accuracies': dots(
            'accuracies',
            'Accuracy on training and on held-out pairs',
            Scale('accuracy, share of pairs'),
            ('training', 'held out'),
            lambda row: row.accuracy_train,
            lambda row: row.accuracy_report,
        ),
        'calibration': curves.curves(
            [
                curves.Series(row.method, tuple((one.confidence, one.correct) for one in row.calibration))
                for row in rows
            ],
            name='calibration',
            title='Calibration',
            x=Scale('stated confidence', bounds=(0.5, 1.0)),
            y=Scale('share of pairs correct', include=(0.5, 1.0)),
            styles=style,
            diagonal=True,
        ),
    }


def _learning(findings: Findings, style: Mapping[str, Style]) -> dict[str, str]:
    lines = [
        curves.Series(
            one.method,
            tuple((point.step, point.mean) for point in one.metric),
            tuple((point.step, point.lowest, point.highest) for point in one.metric),
        )
        for one in findings.learning.curves
    ]
    learning = curves.curves(
        lines,
        name='learning',
        title='Learning curves',
        x=Scale('step', whole=True),
        y=Scale(f'{findings.design.metric}, report split'),
        styles=style,
    )
    losses = {
        f'loss-{place}': curves.small(
            [(point.step, point.mean) for point in one.loss], name=f'loss-{place}', title=one.method, label='loss'
        )
        for place, one in enumerate(findings.learning.curves)
        if one.loss
    }
    return {'learning': learning, **losses}


def _compute(findings: Findings, style: Mapping[str, Style]) -> str:
    rows = [charts.Change(row.method, (row.device_seconds / max(row.cells, 1),)) for row in findings.compute.rows]
    return charts.changes(
        rows,
        name='compute',
        title='Compute per cell',
        scale=Scale('device-seconds of a cell', include=(0.0,)),
        ends=('mean over cells',),
        styles=style,
    )


def of_kind(drawings: Mapping[str, str], kind: str) -> list[str]:
    """The drawings of a chart that there is one of for each method."""
    return [drawing for name, drawing in drawings.items() if name.startswith(f'{kind}-')]
