"""The report's page: the same bytes for the same findings, nothing from elsewhere, every text escaped."""

import dataclasses
import html.parser
import math
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from jaxpo.study import figures, findings, page, svg

HOSTILE = '<script>alert("&")</script>'


def spread(mean, width=0.1):
    return findings.Spread(mean, mean - width, mean + width, 3)


def comparison(difference, width=0.02, verdict='no claim'):
    ends = (difference - width, difference + width)
    return findings.Comparison(3, difference, *ends, 0.04, 0.08, 0.93, 0.05, verdict)


def board_row(place, name, baseline):
    verdict = ('no claim', 'better', 'worse')[place % 3]
    against = None if name == baseline else comparison(0.03 - 0.01 * place, verdict=verdict)
    mean = 0.7 - 0.01 * place
    return findings.LeaderboardRow(
        rank=place + 1,
        method=name,
        is_baseline=name == baseline,
        setting='beta 0.1, learning rate 1e-5',
        n=3,
        mean=mean,
        sd=0.012,
        values=(mean, mean + 0.01, None),
        selection_mean=mean + 0.02,
        against_baseline=against,
        by_prompt=None if against is None else findings.ByPrompt(3, 120, 0.03, -0.01, None),
        failed=place % 2,
        cells=('0123456789ab', 'ba9876543210'),
        note='' if place else 'a seed has no number',
    )


def design(names, again):
    grid = (
        findings.GridField('objective.dpo.beta', ('0.05', '0.1')),
        findings.GridField('optimizer.learning_rate', ('1e-5', '3e-5')),
    )
    return findings.Design(
        name='a study',
        question='Which is better?',
        methods=tuple(findings.MethodDesign(name, '{"dpo": {}}', grid, (('train.steps', '9'),), 4) for name in names),
        seeds=(0, 1, 2),
        seeds_again=(3, 4, 5),
        trials=4,
        cells=12 * (len(names) + 1),
        baseline=names[0],
        again=again,
        metric='rewards/accuracies',
        higher_is_better=True,
        selection_share=0.5,
        confidence=0.95,
        rules=(('Selection', 'best mean over seeds on the selection split'),),
        base=(('model.source', 'random:tiny.json'),),
        extensions=(findings.Extension(12, (names[-1],), 24),),
    )


def progress(names):
    counts = tuple(findings.Counts(name, 12, 10, 1, 1, 0, 0) for name in names)
    whole = findings.Counts('', *(12 * len(names), 10 * len(names), len(names), len(names), 0, 0))
    return findings.Progress(whole, counts, True, 'Failed cells count as the worst.')


def frontier(names, again):
    methods = tuple(
        findings.MethodFrontier(
            name,
            tuple(
                findings.FrontierPoint('beta 0.1', 0, step, 2.0 * step, math.sqrt(step) - 0.1 * place, '0123456789ab')
                for step in range(6)
            ),
            tuple(findings.FrontPoint(2.0 * step, math.sqrt(step) - 0.1 * place) for step in range(6)),
            1.5,
            None if place == 0 else comparison(0.1),
        )
        for place, name in enumerate((*names, again))
    )
    rows = tuple(
        findings.MatchedRow(name, 3, 1.2, None if place == 0 else comparison(0.2, verdict='better'), '')
        for place, name in enumerate(names)
    )
    missed = findings.MatchedRow(again, 0, None, None, 'not reached')
    return findings.Frontier(
        methods, (findings.MatchedKL(4.0, 'half of what all reached', (*rows, missed)),), 0.0, 8.0, 'Compare at one KL.'
    )


def robustness(names):
    def cells(place):
        for beta in ('0.05', '0.1'):
            for rate in ('1e-5', '3e-5'):
                chosen = (beta, rate) == ('0.1', '1e-5')
                value = None if (beta, rate) == ('0.05', '3e-5') else 0.6 + 0.01 * place + 0.5 * float(beta)
                yield findings.HeatCell(f'{beta} {rate}', (beta, rate), value, value, 3, 0, chosen)

    rows = tuple(
        findings.RobustnessRow(
            method=name,
            runs=12,
            failed=1,
            interquartile_mean=0.66,
            worst_quartile=None,
            share_above_start=0.99999,
            share_above_baseline=0.25,
            profile=tuple(
                findings.ProfilePoint(t / 10, 1 - t / 10, 0.95 * (1 - t / 10), None if t == 5 else 1 - 0.9 * t / 10)
                for t in range(11)
            ),
            best_of=(None, 0.66, 0.68, 0.69 - 0.01 * place),
            fields=('objective.dpo.beta', 'optimizer.learning_rate'),
            grid=tuple(cells(place)),
        )
        for place, name in enumerate(names)
    )
    return findings.Robustness(rows, 0.5, 'Few settings matter.')


def length(names):
    rows = tuple(
        findings.LengthRow(name, spread(0.3), spread(0.7), spread(0.65), spread(0.2), None, None) for name in names
    )
    return findings.Length(rows, 200, 31.0, 24.5, 0.6, 'Length explains little.')


def health(names):
    bins = tuple(findings.CalibrationBin(0.55 + 0.1 * b, 0.5 + 0.09 * b, 20) for b in range(5))
    rows = tuple(
        findings.HealthRow(
            name, spread(-3.0), spread(-9.0), spread(-0.1), spread(-0.3), spread(0.7), spread(6.0), spread(0.9),
            spread(0.7), spread(0.2), spread(0.08), bins, spread(1.1), spread(4.0), 0.9,
        )
        for name in names
    )  # fmt: skip
    return findings.Health(rows, 'Chosen completions fall.')


def learning(names):
    def points(place):
        return tuple(
            findings.CurvePoint(float(step), 0.5 + 0.02 * step - 0.01 * place, 0.45 + 0.02 * step, 0.6, 3)
            for step in range(6)
        )

    return findings.Learning(
        tuple(findings.Curve(name, points(place), points(place)) for place, name in enumerate(names)), 'All learn.'
    )


def compute(names):
    rows = tuple(findings.ComputeRow(name, 12, 1200, 480_000, 400.0, 800.0, 1200.0, 4) for name in names)
    total = findings.ComputeRow('', 36, 3600, 1_440_000, 1200.0, 9000.0, 1200.0, 4)
    return findings.Compute(rows, total, 'All cost the same.')


def provenance(names):
    lines = tuple(
        findings.CellLine(f'{place:012d}', name, 'beta 0.1', 0, 0, state, error, 0.6, None)
        for place, (name, state, error) in enumerate(
            (name, *end) for name in names for end in (('finished', ''), ('error', 'out of <memory>'))
        )
    )
    versions = (findings.Version('jax', '0.10.2', 20), findings.Version('commit', 'abcdef', 20))
    return findings.Provenance(
        versions, ('jax',), lines, 60, 'a' * 64, 'b' * 64, 'jaxpo report runs/study', 'Every number is from these.'
    )


def sample(*names, baseline='dpo'):
    """Findings of a study of the baseline and these methods, with every section."""
    names = (baseline, *names)
    again = f'{baseline} (A/A)'
    rows = tuple(board_row(place, name, baseline) for place, name in enumerate(names))
    own = dataclasses.replace(board_row(0, again, ''), rank=None)
    return findings.Findings(
        design(names, again),
        progress((*names, again)),
        findings.Leaderboard(rows, 'report', 'Nothing can be claimed.', 'No method beats the baseline.'),
        findings.AgainstItself(own, 4, 0, 0.2, 'As it should be, nothing is found.'),
        frontier(names, again),
        robustness(names),
        length(names),
        health(names),
        learning(names),
        compute((*names, again)),
        provenance(names),
        findings.Conclusions(('ipo is better.',), ('Nothing about other models.',)),
    )


def without(found, *sections):
    return dataclasses.replace(found, **dict.fromkeys(sections))


@pytest.fixture(scope='module')
def full():
    return page.render(sample('ipo', HOSTILE))


def drawings(text):
    """Those of the page that are read as XML: with a namespace."""
    found = re.findall(r'<svg.*?</svg>', text, re.DOTALL)
    return [one for one in found if svg.NAMESPACE in one]


class Outline(html.parser.HTMLParser):
    """Which elements stand open where another begins: HTML that closes what it opens has none left."""

    VOID = {'meta', 'link', 'br', 'hr', 'img', 'input'}

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def outline(text):
    found = Outline()
    found.feed(text)
    found.close()
    assert not found.open
    return found.seen


def test_the_same_findings_make_the_same_bytes_in_any_process(full):
    program = (
        'import sys; sys.path.insert(0, sys.argv[1]); from study import test_page; from jaxpo.study import page; '
        'sys.stdout.buffer.write(page.render(test_page.sample("ipo", test_page.HOSTILE)).encode())'
    )
    tests = str(pathlib.Path(__file__).parent.parent)
    for seed in ('1', '2'):
        environment = {**os.environ, 'PYTHONHASHSEED': seed, 'LC_ALL': 'C'}
        found = subprocess.run([sys.executable, '-c', program, tests], capture_output=True, env=environment, check=True)
        assert found.stdout == full.encode()


def test_the_page_needs_nothing_beside_it(full):
    assert full.startswith('<!doctype html>\n<html lang="en">')
    assert not re.search(r'http|src=|@import|url\(|<script|<link|<iframe', full.replace(svg.NAMESPACE, ''))
    assert {attributes['href'][0] for _, attributes in outline(full) if 'href' in attributes} == {'#'}


def test_all_elements_are_closed_and_all_names_are_one_of_a_kind(full):
    names = [attributes['id'] for _, attributes in outline(full) if 'id' in attributes]
    assert len(names) == len({*names})
    links = {attributes['href'][1:] for _, attributes in outline(full) if 'href' in attributes}
    assert len(links) == 11 and links <= {*names}
    for drawing in drawings(full):
        ElementTree.fromstring(drawing)
    assert len(drawings(full)) == 17


def test_texts_are_escaped_wherever_they_stand():
    found = sample(HOSTILE, baseline=f'{HOSTILE}"base')
    hostile = dataclasses.replace(
        found,
        design=dataclasses.replace(found.design, name=HOSTILE, question=HOSTILE, metric=HOSTILE),
        leaderboard=dataclasses.replace(found.leaderboard, headline=HOSTILE, caption=HOSTILE),
        conclusions=findings.Conclusions((HOSTILE,), (HOSTILE,)),
    )
    text = page.render(hostile)
    assert '<script' not in text and '&lt;script&gt;alert(' in text
    assert {tag for tag, _ in outline(text)} == {tag for tag, _ in outline(page.render(sample('ipo')))}


def test_tables_say_what_their_headers_are_for(full):
    headers = [attributes for tag, attributes in outline(full) if tag == 'th']
    assert len(headers) > 100 and {attributes['scope'] for attributes in headers} == {'col', 'row'}
    tags = [tag for tag, _ in outline(full)]
    assert tags.count('table') == tags.count('caption') == tags.count('thead')


def test_rows_have_as_many_cells_as_there_are_headers(full):
    for table in re.findall(r'<table>.*?</table>', full, re.DOTALL):
        rows = re.findall(r'<tr.*?</tr>', table, re.DOTALL)
        widths = [sum(int(span or 1) for span in re.findall(r'<t[hd]\b(?:[^>]*colspan="(\d+)")?', row)) for row in rows]
        assert len({*widths}) == 1, rows[widths.index(min(widths))]


def test_every_colour_used_is_defined_for_both_grounds_and_for_paper(full):
    blocks = [{*re.findall(r'--(\w+):', block)} for block in re.findall(r':root\{([^}]*)\}', full)]
    used = {*re.findall(r'var\(--(\w+)\)', full)}
    assert len(blocks) == 3 and all(used <= block for block in blocks)
    assert not re.findall(r'(?:color|fill|stroke|background):#', full.split('</style>')[0])


def test_sections_stand_in_order_with_their_numbers(full):
    order = 'Design Leaderboard A/A Reward Robustness Length Health Learning Compute Provenance What'
    assert ' '.join(title.split()[0] for title in re.findall(r'<h2>(.*?)</h2>', full)) == order
    text = re.sub(r'<[^>]*>', ' ', re.sub(r'<svg.*?</svg>|<style.*?</style>', '', full, flags=re.DOTALL))
    text = re.sub(r'\s+', ' ', text)
    for said in (
        'Nothing can be claimed.',
        '48 cells planned : 40 finished, 8 failed (4 diverged, 4 with an error), 0 missing.',
        'The design was added to after it was first written.',
        '0.690 0.012 +0.020 [0.000, +0.040] 0.080 ▲ better 93.0 % 0.050 3 1',
        'Reward at KL 4',
        'not reached',
        '&gt;99.9 %',
        'out of &lt;memory&gt;',
        'jaxpo report runs/study',
        '13.3 min',
        'Nothing about other models.',
    ):
        assert said in text, said


def test_a_method_looks_the_same_in_all_charts(full):
    looks = {}
    for drawing in drawings(full):
        for group in ElementTree.fromstring(drawing).iter(f'{{{svg.NAMESPACE}}}g'):
            title = group.find(f'{{{svg.NAMESPACE}}}title')
            if title is not None:
                looks.setdefault(re.split(': |$', title.text)[0], set()).add(group.get('class').split()[1])
    assert {name: len(colours) for name, colours in looks.items()} == dict.fromkeys(looks, 1)
    assert len(looks) == 4 and looks['dpo'] == looks['dpo (A/A)'] != looks['ipo'] != looks[HOSTILE]


def test_sections_without_data_say_so_in_a_sentence():
    found = without(sample('ipo'), 'frontier', 'length', 'health', 'learning')
    text = page.render(found)
    outline(text)
    assert text.count('<p class="nothing">') == 4
    for sentence in ('there is no frontier.', 'nothing is known of lengths.', 'of its health.', 'there are no curves.'):
        assert sentence in text


def test_a_study_that_has_just_begun_has_a_page():
    found = sample('ipo')
    row = dataclasses.replace(
        board_row(1, 'ipo', 'dpo'), rank=None, mean=None, sd=None, selection_mean=None, against_baseline=None,
        by_prompt=None, n=0, values=(None, None, None), cells=(),
    )  # fmt: skip
    begun = dataclasses.replace(
        without(found, 'frontier', 'length', 'health', 'learning'),
        leaderboard=dataclasses.replace(found.leaderboard, rows=(row,)),
        against_itself=findings.AgainstItself(row, 0, 0, 0.0, ''),
        robustness=findings.Robustness((), None, ''),
        progress=dataclasses.replace(found.progress, complete=False),
        conclusions=findings.Conclusions((), ('Anything.',)),
    )
    text = page.render(begun)
    outline(text)
    assert 'The study is not complete.' in text and 'no number' in text and not re.search(r'\bnan\b', text.lower())


def test_a_study_of_many_methods_colours_the_best():
    found = sample(*(f'method{place}' for place in range(44)))
    style = figures.styles(found)
    assert sum(not one.muted for one in style.values()) == figures.HIGHLIGHTED + 1  # and the A/A arm
    assert not style['method6'].muted and style['method7'].muted
    outline(page.render(found))


def test_lower_is_better_turns_the_chart_and_the_words():
    found = sample('ipo')
    text = page.render(dataclasses.replace(found, design=dataclasses.replace(found.design, higher_is_better=False)))
    assert '← better' in text and 'lower is better' in text and 'Further left is better' in text
    assert 'share of runs below the threshold' in text and '→ better' not in text


@pytest.mark.parametrize(
    'share, said',
    [(0.25, '25.0 %'), (0.0, '0.0 %'), (1.0, '100.0 %'), (0.99999, '>99.9 %'), (1e-9, '<0.1 %'), (None, '–')],
)
def test_a_share_is_not_rounded_to_certainty(share, said):
    assert page.percent(share) == said


def test_a_mean_is_written_with_its_seeds():
    assert page.written(findings.Spread(0.7, 0.6, 0.8, 3)) == ('0.700', '0.600 to 0.800')
    assert page.written(findings.Spread(0.7, 0.7, 0.7, 1)) == ('0.700', '')
    assert page.written(findings.Spread(-0.1, -0.3, 0.2, 3), True) == ('−0.100', '−0.300 to +0.200')
    assert page.written(None) == page.written(findings.Spread(None, None, None, 0)) == ('–', '')
    assert [page.p_value(p) for p in (0.0004, 0.05, None)] == ['<0.001', '0.050', '–']
    assert [page.duration(seconds) for seconds in (59.0, 400.0, 9000.0)] == ['59.0 s', '6.7 min', '2.5 h']
