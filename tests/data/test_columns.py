"""Numbers of the data on their way to a loss: by name, checked, and each beside its own token."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpo import config
from jaxpo.data.audit import audit
from jaxpo.data.columns import Wanted, check_columns, check_wanted
from jaxpo.data.rows import fill_rows
from jaxpo.data.sources import Row
from jaxpo.errors import InputError

USER = [{'role': 'user', 'content': 'is the fox lazy?'}]
GOOD = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}
CONVERSATION = [{'role': 'user', 'content': 'Hi'}]
ROWS = config.Rows(lengths=(64, 128))
MARGIN = Wanted(numbers=('margin',))
SEGMENTS = Wanted(tokens=('chosen_segment', 'rejected_segment'))
COLUMNS = {'chosen_segment': [], 'rejected_segment': []}


def audited(tokenizer, *fields, wanted, columns=None, limit=100):
    rows = [
        Row(f'f:{number}', {'prompt': USER, 'chosen': 'yes', 'rejected': 'no', **f}) for number, f in enumerate(fields)
    ]
    data = config.Data(max_drop_rate=1.0, max_completion_tokens=limit, columns=columns or {})
    return audit(rows, tokenizer, data, ROWS, wanted=wanted)


def rejected(tokenizer, wanted, **fields):
    """The reasons for which a row is rejected, which comes with a good one, and their origins."""
    good = {'prompt': 'the fox', 'margin': 1, **COLUMNS}
    _, report = audited(tokenizer, good, {**good, 'prompt': USER, **fields}, wanted=wanted)
    return {reason: entry['rows'] for reason, entry in report['rejected'].items() if entry['count']}


def test_missing_columns_are_named_with_the_nearest():
    with pytest.raises(InputError, match="f:1: no column 'rejected'. Did you mean 'rejectd'.*Found: .*Expected"):
        check_columns([Row('f:1', {'prompt': 'a', 'chosen': 'b', 'rejectd': 'c'})], Wanted(), {})
    with pytest.raises(InputError, match='chosen and rejected need a column prompt'):
        check_columns([Row('f:1', {'chosen': 'b', 'rejected': 'c'})], Wanted(), {})
    with pytest.raises(InputError, match="no column 'margin'. Did you mean 'margins'"):
        check_columns([Row('f:1', {**GOOD, 'margins': 1})], MARGIN, {})
    with pytest.raises(
        InputError, match=r"no column 'mrgn' \(data.columns says so for 'margin'\). Did you mean 'margin'"
    ):
        check_columns([Row('f:1', {**GOOD, 'margin': 1})], MARGIN, {'margin': 'mrgn'})
    with pytest.raises(InputError, match="no column 'corrupted_prompt'"):
        check_columns([Row('f:1', GOOD)], Wanted(companions=('corrupted',)), {})
    check_columns([Row('f:1', None, 'not JSON'), Row('f:2', {**GOOD, 'm': 1})], MARGIN, {'margin': 'm'})
    check_columns([Row('f:1', {'chosen': CONVERSATION, 'rejected': CONVERSATION})], Wanted(), {})


def test_missing_columns_of_unpaired_rows_are_named_too():
    row = {'prompt': 'a', 'completion': 'b', 'label': True}
    check_columns([Row('f:1', row)], Wanted(unpaired=True), {})
    check_columns([Row('f:1', GOOD), Row('f:2', row)], Wanted(), {})
    with pytest.raises(InputError, match="no column 'label'. Did you mean 'labels'"):
        check_columns([Row('f:1', {'prompt': 'a', 'completion': 'b', 'labels': True})], Wanted(unpaired=True), {})
    with pytest.raises(InputError, match='completion and label need a column prompt'):
        check_columns([Row('f:1', {'completion': 'b', 'label': True})], Wanted(unpaired=True), {})
    with pytest.raises(InputError, match='f:1: all rows are unpaired'):
        check_columns([Row('f:1', row)], Wanted(), {})


def test_names_nobody_reads_are_refused():
    scores = Wanted(numbers=('chosen_score', 'rejected_score'))
    check_wanted(scores, {'chosen_score': 'a', 'rejected_score': 'a'})
    check_wanted(Wanted(companions=('corrupted',)), {'corrupted_prompt': 'bad_prompt'})
    with pytest.raises(
        InputError, match="'chosen_scor', which no loss.*Did you mean 'chosen_score'.*: chosen_score, rej"
    ):
        check_wanted(scores, {'chosen_scor': 'a'})
    with pytest.raises(InputError, match="'margin', which no loss of the objective reads. They read: none"):
        check_wanted(Wanted(), {'margin': 'a'})
    with pytest.raises(InputError, match="Unknown companion 'corupted'. Did you mean 'corrupted'"):
        check_wanted(Wanted(companions=('corupted',)), {})
    with pytest.raises(InputError, match="'segment' must start with chosen_ or rejected_"):
        check_wanted(Wanted(tokens=('segment',)), {})


def test_numbers_arrive_under_the_name_the_loss_knows(chatml):
    wanted = Wanted(numbers=('margin', 'chosen_score'))
    row = {'margin': 2, 'score_chosen': 0.5, 'other': 'text'}
    pairs, _ = audited(chatml, row, wanted=wanted, columns={'chosen_score': 'score_chosen'})
    assert pairs[0].columns == {'margin': 2.0, 'chosen_score': 0.5}
    assert audited(chatml, row, wanted=Wanted())[0][0].columns == {}


@pytest.mark.parametrize('value', ['1.5', True, float('nan'), float('inf'), 1e39, 10**400, [1.0]])
def test_what_is_no_number_names_its_row(chatml, value):
    with pytest.raises(InputError, match="f:1: column 'margin' must be a finite number, not"):
        audited(chatml, {'prompt': 'x', 'margin': 1}, {'margin': value}, wanted=MARGIN)


def test_a_row_without_its_number_is_counted(chatml):
    assert rejected(chatml, MARGIN, margin=None) == {'missing column': ['f:1 (margin)']}
    assert rejected(chatml, SEGMENTS, chosen_segment=None) == {'missing column': ['f:1 (chosen_segment)']}


def test_an_unpaired_row_has_the_numbers_of_its_completion(chatml):
    names = ('margin', 'chosen_score', 'rejected_score')
    wanted = Wanted(numbers=names, tokens=SEGMENTS.tokens, unpaired=True)
    row = {'chosen': None, 'rejected': None, 'completion': 'no', 'label': False, 'margin': 3}
    own = {'rejected_score': 2, 'rejected_segment': [[0, 2, 7]]}
    pairs, _ = audited(
        chatml, {**row, **own, 'chosen_score': None}, {'margin': 1, 'chosen_score': 1, **own, **COLUMNS}, wanted=wanted
    )
    columns = pairs[0].columns
    assert list(columns) == list(pairs[1].columns) == [*names, *SEGMENTS.tokens]
    assert [columns[name] for name in names] == [3, 0, 2]
    assert columns['chosen_segment'].tolist() == [] and columns['rejected_segment'].tolist() == [7, 7]
    assert fill_rows(pairs, ROWS).columns['rejected_segment'].sum() == 14


def test_token_numbers_are_cut_with_their_completion(chatml):
    fields = {'chosen': 'the quick brown fox', 'rejected': 'no'}
    pairs, _ = audited(chatml, {**fields, **COLUMNS}, wanted=SEGMENTS)
    count = pairs[0].chosen.size
    assert pairs[0].columns['chosen_segment'].tolist() == [0] * count
    numbers = {'chosen_segment': list(range(count)), 'rejected_segment': [0.5, -1]}
    for limit in (3, count - 1, count):
        pairs, _ = audited(chatml, {**fields, **numbers}, wanted=SEGMENTS, limit=limit)
        assert pairs[0].columns['chosen_segment'].tolist() == list(range(limit))
        assert pairs[0].columns['rejected_segment'].tolist() == [0.5, -1]
        assert pairs[0].columns['chosen_segment'].dtype == np.float32
    for wrong in (count - 1, count + 1):
        found = rejected(chatml, SEGMENTS, **fields, **{**numbers, 'chosen_segment': [1] * wrong})
        words = f'f:1 (chosen_segment: {wrong} for {count} tokens, end token included)'
        assert found == {'token numbers of another length': [words]}


def test_a_token_has_the_value_of_the_span_of_its_first_character(chatml, llama2, trims_offsets):
    text = 'the fox is lazy  no'
    spans = [[17, 19, 3], [4, 7, 1], [11, 15, 2.5]]
    for tokenizer in (chatml, trims_offsets, llama2):
        fields = {'prompt': 'the', 'chosen': text, 'chosen_segment': spans, 'rejected_segment': []}
        pairs, _ = audited(tokenizer, fields, wanted=SEGMENTS)
        found = {}
        for token, value in zip(pairs[0].chosen, pairs[0].columns['chosen_segment']):
            found[value] = found.get(value, '') + tokenizer.convert_ids_to_tokens([int(token)])[0].strip('Ġ▁')
        end = tokenizer.eos_token
        # the last word begins with its letter, not its space, so its span may leave the space out
        assert found == {0: 'theis', 1: 'fox', 2.5: 'lazy', 3: 'no' + end}, found
        assert not pairs[0].columns['rejected_segment'].any()


TEXTS = st.text(st.sampled_from('abc xé漢😀\n.'), min_size=1, max_size=12).filter(str.strip)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS, st.lists(st.integers(0, 12), unique=True), st.sampled_from(['the', USER]))
def test_one_span_a_character_gives_each_token_its_character(chatml, text, left_out, prompt):
    spans = [[place, place + 1, place + 1] for place in range(len(text)) if place not in left_out]
    fields = {
        'prompt': prompt,
        'chosen': text,
        'rejected': 'other',
        'chosen_segment': spans[::-1],
        'rejected_segment': [],
    }
    pairs, _ = audited(chatml, fields, wanted=SEGMENTS)
    values = pairs[0].columns['chosen_segment'].tolist()
    last = len(text.rstrip())
    assert values[-1] == (0 if last - 1 in left_out else last)
    done = 0
    for number, value in enumerate(values[:-1], start=1):
        # what is decoded up to a token ends where the token ends
        start, done = done, len(chatml.decode(pairs[0].chosen[:number]).rstrip('\N{REPLACEMENT CHARACTER}'))
        covered = [place for place in range(start, max(done, start + 1)) if text[place].strip()] or [start]
        assert value == (0 if covered[0] in left_out else covered[0] + 1)


@pytest.mark.parametrize('spans', [[[0, 4, 1]], [[-1, 2, 1]], [[1, 1, 1]], [[2, 1, 1]], [[0, 2, 1], [1, 3, 1]]])
def test_spans_that_overlap_or_leave_the_text_are_counted(chatml, spans):
    found = rejected(chatml, SEGMENTS, chosen_segment=spans)
    assert list(found) == ['spans overlap or leave the text'], found
    assert found['spans overlap or leave the text'][0].startswith('f:1 (chosen_segment: [')
    assert found['spans overlap or leave the text'][0].endswith('of 3 characters)')


def test_spans_of_columnar_files_are_floats_and_may_touch(chatml):
    pairs, _ = audited(chatml, {**COLUMNS, 'rejected_segment': [[0.0, 1.0, 2.0], [1.0, 2.0, 3.0]]}, wanted=SEGMENTS)
    end = pairs[0].columns['rejected_segment'].tolist()[-1]
    assert pairs[0].columns['rejected_segment'].tolist()[0] == 2 and end == 3


@pytest.mark.parametrize(
    'value', ['x', 3, [1, 'x'], [1, None], [[0, 1]], [[0.5, 1, 1]], [[0, 1, float('nan')]], [1, [0, 1, 1]]]
)
def test_what_is_neither_numbers_nor_spans_names_its_row(chatml, value):
    with pytest.raises(InputError, match="f:0: column 'chosen_segment' must be a list of finite numbers"):
        audited(chatml, {**COLUMNS, 'chosen_segment': value}, wanted=SEGMENTS)


def test_spans_need_a_template_that_keeps_the_text(chatml):
    chatml.chat_template = chatml.chat_template.replace("m['content'] }}", "m['content'].replace('fox', 'dog') }}")
    found = rejected(chatml, SEGMENTS, chosen='the fox', chosen_segment=[[0, 3, 1]])
    assert found == {'text rewritten by the chat template': ['f:1 (chosen_segment)']}
    kept, _ = audited(
        chatml, {'chosen': 'the fox', 'chosen_segment': [1, 2, 3], 'rejected_segment': []}, wanted=SEGMENTS
    )
    assert kept[0].columns['chosen_segment'].tolist() == [1, 2, 3]


def test_rows_equal_but_for_token_numbers_are_not_duplicates(chatml):
    rows = [{**COLUMNS, 'chosen_segment': [[0, 3, value]]} for value in (1, 2, 2)]
    pairs, report = audited(chatml, *rows, wanted=SEGMENTS)
    assert len(pairs) == 2 and report['rejected']['duplicate']['rows'] == ['f:2']


def test_the_numbers_of_real_files_pass_through_json_and_parquet(tmp_path, chatml):
    import datasets

    from jaxpo.data.sources import read_rows

    rows = [
        {'prompt': 'the', 'chosen': ' fox', 'rejected': ' dog', 'margin': 1, **COLUMNS, 'chosen_segment': [[0, 4, 1]]},
        {'prompt': 'fox', 'chosen': ' a', 'rejected': ' b', 'margin': 2, **COLUMNS, 'rejected_segment': [[1, 2, 5]]},
    ]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / 'a.parquet')
    wanted = Wanted(numbers=('margin',), tokens=SEGMENTS.tokens)
    found = [
        audit(read_rows(str(tmp_path / name)), chatml, config.Data(), ROWS, wanted=wanted)[0]
        for name in ('a.jsonl', 'a.parquet')
    ]
    for one, other in zip(*found, strict=True):
        for name in ('margin', *SEGMENTS.tokens):
            np.testing.assert_array_equal(one.columns[name], other.columns[name])
    assert found[0][1].columns['rejected_segment'].max() == 5
