"""A study's main tables in LaTeX, for a paper: booktabs, rounded for print. The numbers are those of `Findings`."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxpo.study.findings import Comparison, Findings, Spread
from jaxpo.study.wording import figure, share, signed

DIGITS = 4
SPECIAL = {
    '\\': r'\textbackslash{}',
    '{': r'\{',
    '}': r'\}',
    '$': r'\$',
    '&': r'\&',
    '#': r'\#',
    '%': r'\%',
    '_': r'\_',
    '^': r'\textasciicircum{}',
    '~': r'\textasciitilde{}',
    '<': r'\textless{}',
    '>': r'\textgreater{}',
    '|': r'\textbar{}',
    '"': r'\textquotedbl{}',
    '–': '--',
    '\n': ' ',
}
Column = tuple[str, Callable[[Any], str]]  # header, and the text of a row's cell, both to be escaped


def to_latex(found: Findings) -> str:
    """All tables in one file, to be read by `\\input`."""
    written = [
        f'% {_one_line(found.design.name)}: regenerate with {_one_line(found.provenance.command)}\n'
        '% Needs \\usepackage{booktabs}, \\usepackage[T1]{fontenc} and \\usepackage{graphicx}.\n'
    ]
    board = (*found.leaderboard.rows, found.against_itself.row)
    written.append(_table('leaderboard', found.leaderboard.caption, _leaderboard(found), board))
    for at in () if found.frontier is None else found.frontier.matched:
        caption = f'Reward at KL {figure(at.kl, DIGITS)} nats, {at.why}.'
        written.append(_table(f'matched-{found.frontier.matched.index(at) + 1}', caption, _MATCHED, at.rows))
    written.append(_table('robustness', found.robustness.caption, _ROBUSTNESS, found.robustness.rows))
    if found.length is not None:
        written.append(_table('length', found.length.caption, _LENGTH, found.length.rows))
    if found.health is not None:
        written.append(_table('health', found.health.caption, _HEALTH, found.health.rows))
    written.append(_table('compute', found.compute.caption, _COMPUTE, found.compute.rows))
    written.append(_table('progress', found.progress.caption, _PROGRESS, found.progress.methods))
    return '\n'.join(written)


def escape(text: str) -> str:
    """The text as LaTeX prints it, whatever is in it."""
    return ''.join(SPECIAL.get(character, character) for character in text)


def _one_line(text: str) -> str:
    return ' '.join(text.split())


def _table(name: str, caption: str, columns: Sequence[Column], rows: Sequence[Any]) -> str:
    lines = [[escape(header) for header, _ in columns]]
    lines += [[escape(text(row)) for _, text in columns] for row in rows]
    first, *others = (' & '.join(cells) + r' \\' for cells in lines)
    body = '\n'.join(others)
    return (
        '\\begin{table}[ht]\n\\centering\n'
        f'\\caption{{{escape(caption)}}}\n\\label{{tab:{name}}}\n\\resizebox{{\\linewidth}}{{!}}{{%\n'
        f'\\begin{{tabular}}{{{"l" * _words(columns)}{"r" * (len(columns) - _words(columns))}}}\n\\toprule\n'
        f'{first}\n\\midrule\n{body}\n\\bottomrule\n\\end{{tabular}}}}\n\\end{{table}}\n'
    )


def _words(columns: Sequence[Column]) -> int:
    """How many columns at the left are words."""
    return sum(header in ('method', 'setting', 'verdict') for header, _ in columns)


def _number(value: float | None) -> str:
    return figure(value, DIGITS)


def _share(value: float | None) -> str:
    return '–' if value is None else share(value)


def _spread(value: Spread | None) -> str:
    return _number(None if value is None else value.mean)


def _of(comparison: Comparison | None, name: str, text: Callable[[float | None], str] = _number) -> str:
    return text(None if comparison is None else getattr(comparison, name))


def _interval(comparison: Comparison | None) -> str:
    if comparison is None or comparison.low is None:
        return '–'
    return f'[{signed(comparison.low, DIGITS)}, {signed(comparison.high, DIGITS)}]'


def _signed(value: float | None) -> str:
    return signed(value, DIGITS)


def _verdict(row: Any) -> str:
    return 'baseline' if row.against_baseline is None else row.against_baseline.verdict


def _leaderboard(found: Findings) -> list[Column]:
    return [
        ('method', lambda row: row.method),
        ('setting', lambda row: row.setting),
        ('verdict', _verdict),
        ('seeds', lambda row: str(row.n)),
        ('failed', lambda row: str(row.failed)),
        (found.design.metric, lambda row: _number(row.mean)),
        ('sd', lambda row: _number(row.sd)),
        ('difference', lambda row: _of(row.against_baseline, 'difference', _signed)),
        (f'interval at {share(found.design.confidence)}', lambda row: _interval(row.against_baseline)),
        ('p (Holm)', lambda row: _of(row.against_baseline, 'adjusted_p')),
        ('P(better)', lambda row: _of(row.against_baseline, 'probability_better')),
        ('detectable', lambda row: _of(row.against_baseline, 'detectable')),
    ]


_MATCHED: list[Column] = [
    ('method', lambda row: row.method),
    ('verdict', _verdict),
    ('seeds', lambda row: str(row.n)),
    ('reward', lambda row: _number(row.reward)),
    ('difference', lambda row: _of(row.against_baseline, 'difference', _signed)),
    ('interval', lambda row: _interval(row.against_baseline)),
    ('p (Holm)', lambda row: _of(row.against_baseline, 'adjusted_p')),
]
_ROBUSTNESS: list[Column] = [
    ('method', lambda row: row.method),
    ('runs', lambda row: str(row.runs)),
    ('failed', lambda row: str(row.failed)),
    ('IQM', lambda row: _number(row.interquartile_mean)),
    ('worst quarter', lambda row: _number(row.worst_quartile)),
    ('beyond start', lambda row: _share(row.share_above_start)),
    ('beyond baseline', lambda row: _share(row.share_above_baseline)),
]
_LENGTH: list[Column] = [
    ('method', lambda row: row.method),
    ('correlation', lambda row: _spread(row.correlation)),
    ('accuracy', lambda row: _spread(row.accuracy)),
    ('length-controlled', lambda row: _spread(row.controlled_accuracy)),
    ('tokens before', lambda row: _spread(row.sampled_before)),
    ('tokens after', lambda row: _spread(row.sampled_after)),
]
_HEALTH: list[Column] = [
    ('method', lambda row: row.method),
    ('chosen change (nats)', lambda row: _spread(row.chosen_change)),
    ('rejected change (nats)', lambda row: _spread(row.rejected_change)),
    ('chosen falling', lambda row: _spread(row.chosen_falling)),
    ('margin', lambda row: _spread(row.margin)),
    ('train accuracy', lambda row: _spread(row.accuracy_train)),
    ('held-out accuracy', lambda row: _spread(row.accuracy_report)),
    ('ECE', lambda row: _spread(row.calibration_error)),
    ('gradient norm', lambda row: _spread(row.gradient_norm_median)),
    ('finite', lambda row: _share(row.finite_share)),
]
_COMPUTE: list[Column] = [
    ('method', lambda row: row.method),
    ('cells', lambda row: str(row.cells)),
    ('tokens', lambda row: f'{row.tokens:,}'),
    ('device-seconds', lambda row: _number(row.device_seconds)),
    ('tokens per second', lambda row: _number(row.tokens_per_second)),
    ('cells at once', lambda row: str(row.cells_at_once)),
]
_PROGRESS: list[Column] = [
    ('method', lambda row: row.method),
    ('planned', lambda row: str(row.planned)),
    ('finished', lambda row: str(row.finished)),
    ('diverged', lambda row: str(row.diverged)),
    ('error', lambda row: str(row.error)),
    ('missing', lambda row: str(row.missing)),
]
