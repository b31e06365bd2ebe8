"""`jaxpo report STUDY`: a study's files to one page and its tables. Nothing is trained and no device is asked for."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from jaxpo import storage
from jaxpo.console import table
from jaxpo.study import exports, figures, latex, page
from jaxpo.study.analysis import analyse
from jaxpo.study.findings import Findings, LeaderboardRow
from jaxpo.study.wording import figure, share, signed

DESCRIPTION = """\
Write the report of a study into its directory: report/report.html, which needs nothing beside it, and the same numbers
as findings.json, CSV tables, LaTeX (tables.tex) and figures (SVG). A study that is not finished is reported as far as
it has come. The same files make the same report, to the byte.
"""


def report(arguments: Sequence[str]) -> int:
    """Writes a study's report and prints its leaderboard. InputError where the directory holds no study."""
    parser = argparse.ArgumentParser(
        prog='jaxpo report',
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument('study', metavar='STUDY', help="the study's directory, local or gs://BUCKET/DIRECTORY")
    if {'-h', '--help'} & {*arguments}:
        parser.print_help()
        return 0
    root = storage.path(parser.parse_args(arguments).study)
    with storage.said_plainly(root):
        found = analyse(root)
    directory = root / 'report'
    files = files_of(found)
    with storage.said_plainly(directory, 'cannot be written'):
        for name, text in files.items():
            storage.write_text(directory / name, text)
    _print(found)
    out = Console(highlight=False, soft_wrap=True)
    out.print(f'report     {escape(str(directory / "report.html"))}')
    tables, drawings = (sum(name.endswith(kind) for name in files) for kind in ('.csv', '.svg'))
    out.print(f'and        findings.json, tables.tex, {tables} CSV tables, {drawings} figures')
    return 0


def files_of(found: Findings) -> dict[str, str]:
    """All files of a report by name."""
    tables = {f'{name}.csv': exports.to_csv(table) for name, table in exports.tables(found).items()}
    return {
        'report.html': page.render(found),
        'findings.json': exports.to_json(found),
        'tables.tex': latex.to_latex(found),
        **tables,
        **{f'figures/{name}.svg': drawing for name, drawing in figures.alone(found).items()},
    }


def _print(found: Findings) -> None:
    design = found.design
    header = (
        'method',
        'setting',
        escape(design.metric),
        f'difference {escape(f"[{share(design.confidence)}]")}',
        'p (Holm)',
        'verdict',
    )
    rows = [_row(row) for row in (*found.leaderboard.rows, found.against_itself.row)]
    # Not the console of runs: it asks JAX for its devices, which this process leaves alone.
    out = Console(highlight=False, soft_wrap=True)
    out.print(table(f'{escape(design.name)} against {escape(design.baseline)}', header, rows))
    out.print(escape(found.progress.caption))
    out.print(escape(found.leaderboard.headline))
    out.print(escape(found.against_itself.caption))


def _row(row: LeaderboardRow) -> tuple[str, ...]:
    found = row.against_baseline
    start = (escape(row.method), escape(row.setting), figure(row.mean, 4))
    if found is None:
        return (*start, '', '', 'baseline')
    interval = '' if found.low is None else escape(f' [{signed(found.low)}, {signed(found.high)}]')
    return (*start, f'{signed(found.difference)}{interval}', figure(found.adjusted_p), found.verdict)
