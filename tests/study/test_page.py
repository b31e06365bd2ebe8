"""The report's page: the same bytes for the same findings, nothing from elsewhere, every text escaped."""

import dataclasses
import html.parser
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from study.sample_findings import board_row, sample

from jaxpo.study import figures, findings, page, svg

HOSTILE = '<script>alert("&")</script>'


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
        'import sys; sys.path.insert(0, sys.argv[1]); from study.sample_findings import sample; '
        'from jaxpo.study import page; sys.stdout.buffer.write(page.render(sample("ipo", sys.argv[2])).encode())'
    )
    tests = str(pathlib.Path(__file__).parent.parent)
    for seed in ('1', '2'):
        environment = {**os.environ, 'PYTHONHASHSEED': seed, 'LC_ALL': 'C'}
        found = subprocess.run(
            [sys.executable, '-c', program, tests, HOSTILE], capture_output=True, env=environment, check=True
        )
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
    assert text.count('<figure>') == 1  # of compute: sentences have no captions
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
