"""HTML, CSV, JSON and LaTeX print the same numbers, and whatever a method is called."""

import csv
import dataclasses
import html
import io
import json
import re

import pytest
from study import made_up

from jaxpo.study import exports, latex, page
from jaxpo.study.analysis import analyse
from jaxpo.study.wording import figure, signed

HOSTILE = 'a_50% & {x}\\$ #1 ^~ <b>"|'
NUMBER = re.compile(r'[-−+]?\d+(?:\.\d+)?(?:e[-+]\d+)?')
SPLITS = ('selection', 'report', 'train')


def scores(cell):
    level = {'dpo': 0.0, HOSTILE: 0.5}.get(cell.method, 0.01) + made_up.noise(cell.seed).normal()
    return {split: level + made_up.noise(cell.id, split).normal() / 50 for split in SPLITS}


def outcome(cell, found):
    """The last method diverges with one seed at both rates."""
    return (
        made_up.ended('diverged')(cell) if (cell.method, cell.repeat) == ('ipo', 0) else made_up.finished(cell, found)
    )


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    made = made_up.study(('dpo', HOSTILE, 'ipo'), seeds=(0, 1, 2))
    return analyse(made_up.write(tmp_path_factory.mktemp('exports') / 'study', made, scores, outcome=outcome))


def numbers_of(value):
    """All numbers of a JSON value, as they are written."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return {number for part in value for number in numbers_of(part)}
    return {repr(value)} if isinstance(value, int | float) and not isinstance(value, bool) else set()


def test_json_is_all_findings_and_strict(found):
    def refuse(word):
        raise AssertionError(word)

    text = exports.to_json(found)
    assert json.loads(text, parse_constant=refuse) == json.loads(json.dumps(dataclasses.asdict(found)))
    assert json.loads(text)['leaderboard']['rows'][0]['method'] == HOSTILE


def test_every_number_of_every_csv_is_in_the_json(found):
    known = numbers_of(json.loads(exports.to_json(found)))
    tables = exports.tables(found)
    assert {'leaderboard', 'cells', 'matched_kl', 'robustness', 'health', 'length', 'compute', 'grid'} < set(tables)
    for name, table in tables.items():
        header, *rows = csv.reader(io.StringIO(exports.to_csv(table)))
        assert rows and {len(row) for row in rows} == {len(header)} and len({*header}) == len(header), name
        of_words = {'setting', 'id', 'row.setting'} | ({'value'} if name == 'versions' else set())
        for row in rows:
            for column, value in zip(header, row):
                if NUMBER.fullmatch(value) and column not in of_words and column != 'k':
                    assert value in known, f'{name}: {column} {value}'


def test_the_leaderboard_of_the_csv_is_that_of_the_findings(found):
    rows = list(csv.DictReader(io.StringIO(exports.to_csv(exports.tables(found)['leaderboard']))))
    assert [row['method'] for row in rows] == [row.method for row in found.leaderboard.rows]
    for written, row in zip(rows, found.leaderboard.rows):
        assert float(written['mean']) == row.mean and written['setting'] == row.setting
        compared = row.against_baseline
        assert written['against_baseline.low'] == ('' if compared is None else repr(compared.low))
        assert written['against_baseline.verdict'] == ('' if compared is None else compared.verdict)


def test_what_there_is_one_of_is_a_table_too(found):
    facts = dict(exports.tables(found)['facts'].rows)
    assert facts['design.confidence'] == 0.95 and facts['robustness.start'] == found.robustness.start
    assert facts['length.chosen_tokens'] == found.length.chosen_tokens
    assert facts['frontier.area_up_to'] == found.frontier.area_up_to
    assert facts['provenance.cells_sha256'] == found.provenance.cells_sha256
    assert facts['against_itself.excluding_zero'] == found.against_itself.excluding_zero


def latex_rows(text, label):
    table = next(part for part in text.split('\\begin{table}') if f'tab:{label}' in part)
    body = table.split('\\midrule\n')[1].split('\n\\bottomrule')[0]
    return [line.removesuffix(' \\\\').split(' & ') for line in body.replace('\\&', 'AND').splitlines()]


def test_the_numbers_of_the_latex_are_those_of_the_findings(found):
    text = latex.to_latex(found)
    rows = latex_rows(text, 'leaderboard')
    board = (*found.leaderboard.rows, found.against_itself.row)
    assert len(rows) == len(board)
    for cells, row in zip(rows, board):
        assert [cells[5], cells[6]] == [figure(row.mean, 4), figure(row.sd, 4)]
        compared = row.against_baseline
        if compared is None:
            assert cells[2] == 'baseline' and cells[7] == '--'
            continue
        assert cells[2] == compared.verdict and cells[7] == signed(compared.difference, 4)
        assert cells[8] == f'[{signed(compared.low, 4)}, {signed(compared.high, 4)}]'
        adjusted = figure(compared.adjusted_p, 4).replace('–', '--')
        assert cells[9:] == [adjusted, figure(compared.probability_better, 4), figure(compared.detectable, 4)]
    for at, matched in enumerate(found.frontier.matched, 1):
        for cells, row in zip(latex_rows(text, f'matched-{at}'), matched.rows):
            assert cells[3] == (figure(row.reward, 4) if row.reward is not None else '--')
    for cells, row in zip(latex_rows(text, 'health'), found.health.rows):
        spreads = (row.chosen_change, row.rejected_change, row.chosen_falling, row.margin, row.accuracy_train)
        assert cells[1:6] == [figure(one.mean, 4) for one in spreads]
    for cells, row in zip(latex_rows(text, 'length'), found.length.rows):
        spreads = (row.correlation, row.accuracy, row.controlled_accuracy, row.sampled_before, row.sampled_after)
        assert cells[1:] == [figure(one.mean, 4) for one in spreads]
    for cells, row in zip(latex_rows(text, 'robustness'), found.robustness.rows):
        assert cells[1:3] == [str(row.runs), str(row.failed)]
        assert cells[3:5] == [
            figure(value, 4).replace('–', '--') for value in (row.interquartile_mean, row.worst_quartile)
        ]
    for cells, row in zip(latex_rows(text, 'compute'), found.compute.rows):
        assert cells[1:4] == [str(row.cells), f'{row.tokens:,}', figure(row.device_seconds, 4)]
    counts = {cells[0]: cells[1:] for cells in latex_rows(text, 'progress')}
    assert counts['ipo'] == ['6', '4', '2', '0', '0']


def test_latex_prints_any_name(found):
    text = latex.to_latex(found)
    escaped = (
        r'a\_50\% \& \{x\}\textbackslash{}\$ \#1 \textasciicircum{}\textasciitilde{} '
        r'\textless{}b\textgreater{}\textquotedbl{}\textbar{}'
    )
    assert escaped in text and HOSTILE not in text
    bare = re.sub(r'\\[{}]', '', text)
    assert bare.count('{') == bare.count('}')
    lines = [line for line in text.splitlines() if not line.startswith('%') and 'resizebox' not in line]
    assert not [line for line in lines if re.search(r'(?<!\\)[%#$_^~]', line.split('\\label')[0])]
    for row in latex_rows(text, 'leaderboard'):
        assert len(row) == 12
    comments = [line for line in text.splitlines() if line.startswith('%')]
    assert any('jaxpo report runs/made_up' in line for line in comments)


def as_number(text):
    return float(text.replace('−', '-'))


def places(text):
    return len(text.split('.')[1]) if '.' in text else 0


def test_the_numbers_of_the_page_are_those_of_the_json(found):
    """Mean, sd and difference with its interval, as rounded as the page has them."""
    section = page.render(found).split('<section id="leaderboard">')[1].split('</table>')[0]
    rows = {
        html.unescape(re.sub('<[^>]*>', '', re.search(r'<th scope="row">(.*?)</th>', part, re.DOTALL)[1])).strip(): part
        for part in re.findall(r'<tr[^>]*>.*?</tr>', section, re.DOTALL)
        if 'scope="row"' in part
    }
    known = {row['method']: row for row in json.loads(exports.to_json(found))['leaderboard']['rows']}
    assert list(rows) == list(known)
    for method, row in known.items():
        cells = re.sub(r'<th scope="row">.*?</th>', '', rows[method], flags=re.DOTALL)
        shown = NUMBER.findall(re.sub('<[^>]*>', ' ', cells))
        expected = [row['rank'], row['mean'], row['sd']]
        if row['against_baseline'] is not None:
            expected += [row['against_baseline'][name] for name in ('difference', 'low', 'high')]
        for text, value in zip(shown, expected):
            assert as_number(text) == pytest.approx(value, abs=0.5000001 * 10 ** -places(text)), (method, shown)
