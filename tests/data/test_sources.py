import gzip
import json

import pytest

from jaxpo.data.sources import example_of, prompt_of, read_rows
from jaxpo.errors import InputError

USER, ANSWER, OTHER = (
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Yes'},
    {'role': 'assistant', 'content': 'No'},
)
GOOD = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}


def reason(fields):
    with pytest.raises(InputError) as caught:
        example_of(fields)
    return caught.value.reason


def test_broken_lines_are_named_by_file_and_line(tmp_path):
    path = tmp_path / 'pairs.jsonl'
    good = json.dumps(GOOD).encode()
    lines = [
        b'\xef\xbb\xbf' + good,
        b'{"prompt": "a\xff", "chosen": "b", "rejected": "c"}',
        b'',
        b'{"prompt": "a"',
        b'[1, 2]',
        b'{"prompt": "\\ud800", "chosen": "b", "rejected": "c"}',
        b'{"prompt": "\\ud83d\\ude00", "chosen": "b", "rejected": "c"}',
        b'[' * 200_000,
        '{"prompt": "one\u2028line", "chosen": "b", "rejected": "c"}'.encode(),
        b'{"prompt": "a", "chos',
    ]
    path.write_bytes(b'\n'.join(lines))
    rows = read_rows(str(path))
    assert [row.origin for row in rows] == [f'{path}:{number}' for number in (1, 2, 4, 5, 6, 7, 8, 9, 10)]
    assert [row.fault for row in rows] == [
        None, 'not UTF-8', 'not JSON', 'wrong shape', 'not UTF-8', None, 'not JSON', None, 'not JSON'
    ]  # fmt: skip
    assert rows[0].fields == GOOD and rows[5].fields['prompt'] == '😀'
    assert rows[7].fields['prompt'] == 'one\u2028line'
    assert all((row.fields is None) == (row.fault is not None) for row in rows)


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    import datasets

    message_row = {'prompt': [USER], 'chosen': [ANSWER], 'rejected': [OTHER]}
    fields = [message_row, {**message_row, 'rejected': [{'role': 'assistant', 'content': 'ünï'}]}]
    text = '\n'.join(json.dumps(row) for row in fields)
    (tmp_path / 'a.jsonl').write_text(text)
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(text.encode()))
    datasets.Dataset.from_list(fields).to_parquet(tmp_path / 'a.parquet')
    for name in ('a.jsonl', 'a.jsonl.gz', 'a.parquet'):
        rows = read_rows(str(tmp_path / name))
        assert [row.fields for row in rows] == fields, name
        assert [row.origin for row in rows] == [f'{tmp_path / name}:{number}' for number in (1, 2)]


def test_broken_text_in_parquet_is_one_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    broken = pyarrow.array([b'fine', b'\xff\xfe', b'fine']).cast(pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({'prompt': broken, 'chosen': ['b'] * 3, 'rejected': ['c'] * 3})
    pyarrow.parquet.write_table(table, tmp_path / 'a.parquet')
    rows = read_rows(str(tmp_path / 'a.parquet'))
    assert [row.fault for row in rows] == [None, 'not UTF-8', None]
    assert rows[1].origin.endswith('a.parquet:2')


def test_missing_empty_and_strange_files_are_refused(tmp_path):
    (tmp_path / 'train.jsonl').write_text('')
    (tmp_path / 'train.csv').write_text('a,b')
    (tmp_path / 'cut.jsonl.gz').write_bytes(gzip.compress(b'{}' * 1000)[:-9])
    (tmp_path / 'not.jsonl.gz').write_text('{}')
    (tmp_path / 'bad.parquet').write_text('PAR1 no')
    for name, words in {
        'trian.jsonl': 'Did you mean.*train.jsonl',
        'train.jsonl': 'is empty',
        'train.csv': 'Unknown kind of data file.*Known: .*parquet',
        'cut.jsonl.gz': 'not a whole gzip file',
        'not.jsonl.gz': 'not a whole gzip file',
        'bad.parquet': 'not a readable parquet file',
        'nowhere/train.jsonl': 'no directory',
        '.': 'is a directory',
    }.items():
        with pytest.raises(InputError, match=words):
            read_rows(f'{tmp_path}/{name}')
    with pytest.raises(InputError, match='No data source'):
        read_rows('')


def test_a_hub_data_set_is_read_through_datasets(monkeypatch):
    import datasets

    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        return datasets.Dataset.from_list([GOOD, GOOD])

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    rows = read_rows('someone/pairs', split='test', revision='abc')
    assert calls == [('someone/pairs', {'split': 'test', 'revision': 'abc'})]
    assert [row.origin for row in rows] == ['someone/pairs[test]:1', 'someone/pairs[test]:2']
    assert rows[0].fields == GOOD


def test_a_hub_data_set_that_cannot_be_had_is_refused():
    with pytest.raises(InputError, match="No local file 'nobody/none', and the hub data set"):
        read_rows('nobody/none')


def test_text_and_messages_and_the_mixed_form():
    text = example_of(GOOD)
    assert (text.prompt, text.chosen, text.rejected) == ('a', 'b', 'c')
    messages = example_of({'prompt': [USER], 'chosen': [ANSWER], 'rejected': [OTHER]})
    mixed = example_of({'prompt': [USER], 'chosen': 'Yes', 'rejected': 'No'})
    assert messages == mixed
    assert (messages.prompt, messages.chosen, messages.rejected) == ([USER], ANSWER, OTHER)


def test_fields_that_columnar_files_add_are_dropped():
    padded = {**USER, 'tool_calls': None}
    assert example_of({'prompt': [padded], 'chosen': 'b', 'rejected': 'c'}).prompt == [USER]


def test_the_implicit_prompt_is_the_common_turns():
    more = {'role': 'user', 'content': 'And?'}
    implicit = example_of({'chosen': [USER, OTHER, more, ANSWER], 'rejected': [USER, OTHER, more, OTHER]})
    assert (implicit.prompt, implicit.chosen, implicit.rejected) == ([USER, OTHER, more], ANSWER, OTHER)
    # 'No' and 'Not' share their first tokens, but a turn is common whole or not at all
    near = {'role': 'assistant', 'content': 'Not'}
    assert example_of({'chosen': [USER, near], 'rejected': [USER, OTHER]}).chosen == near
    # a column with the prompt's text, as in widely used sets, says nothing new
    assert example_of({'prompt': ' Hi', 'chosen': [USER, near], 'rejected': [USER, OTHER]}).prompt == [USER]


@pytest.mark.parametrize(
    'fields, expected',
    [
        ({'chosen': [USER, ANSWER], 'rejected': [USER, ANSWER]}, 'identical'),
        ({'chosen': [USER], 'rejected': [USER, ANSWER]}, 'empty chosen'),
        ({'chosen': [USER, ANSWER], 'rejected': [USER]}, 'empty rejected'),
        ({'chosen': [ANSWER], 'rejected': [OTHER]}, 'no common prompt'),
        ({'prompt': 'x', 'chosen': [USER, ANSWER], 'rejected': [USER, OTHER]}, 'wrong shape'),
        ({'chosen': [USER, ANSWER, USER], 'rejected': [USER, OTHER]}, 'completion is not one assistant turn'),
        ({'prompt': [USER], 'chosen': [USER], 'rejected': [ANSWER]}, 'completion is not one assistant turn'),
        ({'prompt': [USER, ANSWER], 'chosen': 'a', 'rejected': 'b'}, 'prompt ends with an assistant turn'),
        ({'prompt': [], 'chosen': 'a', 'rejected': 'b'}, 'empty prompt'),
        ({'prompt': None, 'chosen': 'a', 'rejected': 'b'}, 'empty prompt'),
        ({'prompt': 7, 'chosen': 'a', 'rejected': 'b'}, 'wrong shape'),
        ({'prompt': ['Hi'], 'chosen': 'a', 'rejected': 'b'}, 'wrong shape'),
        ({'prompt': [{'role': 'user'}], 'chosen': 'a', 'rejected': 'b'}, 'wrong shape'),
        ({'prompt': [{'role': 'user', 'content': ['x']}], 'chosen': 'a', 'rejected': 'b'}, 'wrong shape'),
        ({'prompt': 'a', 'chosen': 'b', 'rejected': [OTHER]}, 'wrong shape'),
        ({'prompt': 'a', 'chosen': 1, 'rejected': 2}, 'wrong shape'),
        ({'prompt': 'a', 'chosen': ' \n', 'rejected': 'b'}, 'empty chosen'),
        ({'prompt': 'a', 'chosen': 'b'}, 'empty rejected'),
        ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, 'identical'),
        ({'prompt': [USER], 'chosen': [{**ANSWER, 'content': ' '}], 'rejected': [OTHER]}, 'empty chosen'),
    ],
)
def test_rows_that_state_no_preference(fields, expected):
    assert reason(fields) == expected


def test_a_prompt_for_generation_is_checked_too():
    assert prompt_of('text') == 'text' and prompt_of([USER]) == [USER]
    with pytest.raises(InputError, match='wrong shape'):
        prompt_of([{'role': 'user'}])
