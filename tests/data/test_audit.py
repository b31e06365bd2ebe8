import collections
import json

import numpy as np
import pytest

from jaxpo import config
from jaxpo.data.audit import NOTES, REJECTIONS, audit, overlaps, table, write_report
from jaxpo.data.columns import Wanted
from jaxpo.data.sources import read_rows
from jaxpo.errors import InputError

ROWS = config.Rows(lengths=(64, 128))
LENIENT = config.Data(max_drop_rate=1.0, max_prompt_tokens=60, max_completion_tokens=12)


def user(content):
    return [{'role': 'user', 'content': content}]


def assistant(content):
    return {'role': 'assistant', 'content': content}


def pair(prompt, chosen='yes', rejected='no', **extra):
    return {'prompt': user(prompt), 'chosen': chosen, 'rejected': rejected, **extra}


def unpaired(prompt, completion, label):
    return {'prompt': user(prompt), 'completion': completion, 'label': label}


def write(path, rows):
    """Rows as JSON lines; bytes are written as they are."""
    path.write_bytes(b'\n'.join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return read_rows(str(path))


def counts(report, part):
    return {reason: entry['count'] for reason, entry in report[part].items() if entry['count']}


BAD = [
    (b'{"prompt": "\xc3\x28"}', 'not UTF-8'),
    (b'{"prompt": "\\udfff"}', 'not UTF-8'),
    (b'{"prompt": ', 'not JSON'),
    (b'NaN is no row', 'not JSON'),
    (b'"a string"', 'wrong shape'),
    ({'prompt': 3, 'chosen': 'yes', 'rejected': 'no'}, 'wrong shape'),
    ({'prompt': user('x'), 'chosen': 'yes', 'rejected': [assistant('no')]}, 'wrong shape'),
    ({'prompt': [{'role': 'user', 'text': 'x'}], 'chosen': 'yes', 'rejected': 'no'}, 'wrong shape'),
    ({'prompt': [], 'chosen': 'yes', 'rejected': 'no'}, 'empty prompt'),
    ({'prompt': '', 'chosen': 'yes', 'rejected': 'no'}, 'empty prompt'),
    (pair('x', chosen=''), 'empty chosen'),
    (pair('x', chosen=None), 'empty chosen'),
    (pair('x', rejected=' \n\t'), 'empty rejected'),
    (pair('x', rejected=[]), 'empty rejected'),
    (pair('x', 'same', 'same'), 'identical'),
    ({'chosen': [assistant('yes')], 'rejected': [assistant('no')]}, 'no common prompt'),
    ({'prompt': [*user('x'), assistant('y')], 'chosen': 'a', 'rejected': 'b'}, 'prompt ends with an assistant turn'),
    (pair('x', [assistant('a'), *user('b')], [assistant('c')]), 'completion is not one assistant turn'),
    (pair('x', 'a<|im_end|>b', 'no'), 'end token inside completion'),
    (pair('x', 'a' + ' the answer' * 20, 'a' + ' the answer' * 20 + ' is no'), 'identical after truncation'),
    (pair('the fox'), None),
    (pair('the fox'), 'duplicate'),
    (pair('the dog', 'yes', 'no', margin=1), None),
]


def test_every_bad_row_is_counted_once_with_its_line(tmp_path, chatml):
    path = tmp_path / 'bad.jsonl'
    rows = write(path, [row for row, _ in BAD])
    pairs, report = audit(rows, chatml, LENIENT, ROWS)
    expected = {}
    for number, (_, reason) in enumerate(BAD, start=1):
        if reason:
            expected.setdefault(reason, []).append(f'{path}:{number}')
    assert {reason: entry['rows'] for reason, entry in report['rejected'].items() if entry['count']} == expected
    assert list(report['rejected']) == list(REJECTIONS) and list(report['noted']) == list(NOTES)
    assert (report['rows'], report['kept'], report['dropped']) == (len(BAD), 2, len(BAD) - 2)
    assert sum(counts(report, 'rejected').values()) == report['dropped']
    assert [pair.index for pair in pairs] == [0, 1]
    assert [BAD[pair.row][1] for pair in pairs] == [None, None] and pairs[0].row == 20
    assert chatml.decode(pairs[0].chosen) == 'yes<|im_end|>' and chatml.decode(pairs[0].rejected) == 'no<|im_end|>'


def test_templates_and_rows_have_their_reasons_too(tmp_path, llama3, llama2, chatml):
    system = [{'role': 'system', 'content': 'be'}, *user('x')]
    rows = write(tmp_path / 'a.jsonl', [{**pair('x'), 'prompt': system}, pair('x')])
    _, report = audit(rows, llama3, LENIENT, ROWS)
    assert report['rejected']['refused by the chat template'] == {
        'count': 1, 'rows': [f'{tmp_path}/a.jsonl:1 (No system role)']
    }  # fmt: skip
    with pytest.raises(InputError, match='no chat template'):
        audit(rows, llama2, LENIENT, ROWS)
    chatml.chat_template += "{{ 'x' if messages[-1]['content'] == 'yes' }}"
    _, report = audit(write(tmp_path / 'b.jsonl', [pair('x'), pair('x', 'a', 'b')]), chatml, LENIENT, ROWS)
    assert counts(report, 'rejected') == {'hidden by the chat template': 1}


def test_a_completion_without_tokens_is_rejected(tmp_path, stories):
    from tokenizers import normalizers

    sequence = normalizers.Sequence([normalizers.Strip(), normalizers.Replace('~', '')])
    stories.backend_tokenizer.normalizer = sequence
    text = [{'prompt': 'a', 'chosen': '~', 'rejected': 'b'}, {'prompt': 'a', 'chosen': 'c', 'rejected': 'b'}]
    _, report = audit(write(tmp_path / 'a.jsonl', text), stories, LENIENT, ROWS)
    assert counts(report, 'rejected') == {'no completion token left': 1}


def test_pairs_longer_than_a_row_are_rejected(tmp_path, chatml):
    rows = write(tmp_path / 'a.jsonl', [pair('x'), pair('the fox', 'the quick brown fox', 'no')])
    layout = {'layout': 'shared'}
    pairs, report = audit(rows, chatml, LENIENT, config.Rows(lengths=(64,), **layout))
    need = pairs[1].prompt.size + pairs[1].chosen.size + pairs[1].rejected.size
    assert report['dropped'] == 0
    _, report = audit(rows, chatml, LENIENT, config.Rows(lengths=(need,), **layout))
    assert report['dropped'] == 0
    _, report = audit(rows, chatml, LENIENT, config.Rows(lengths=(need - 1,), **layout))
    assert report['rejected']['longer than a row'] == {'count': 1, 'rows': [f'{tmp_path}/a.jsonl:2']}


def test_kept_rows_are_noted(tmp_path, chatml):
    long = ' the answer' * 30
    path = tmp_path / 'a.jsonl'
    rows = write(
        path,
        [
            pair(long),
            pair('x', 'a' + long, 'b' + long),
            pair('y', 'a', 'b'),
            pair('y', 'b', 'a'),
            pair('y', 'a', 'c'),
            {'prompt': 'the fox is ', 'chosen': 'lazy', 'rejected': 'quick'},
        ],
    )
    _, report = audit(rows, chatml, LENIENT, config.Rows(lengths=(512,)))
    named = {note: entry['rows'] for note, entry in report['noted'].items() if entry['count']}
    assert named == {
        'prompt trimmed': [f'{path}:1'],
        'completion cut': [f'{path}:2'],
        'duplicate prompt': [f'{path}:4', f'{path}:5'],
        'contradiction': [f'{path}:4'],
        'boundary mismatch': [f'{path}:6'],
    }
    assert report['kept'] == 6


def test_what_held_out_rows_share_with_training_is_named(tmp_path, chatml):
    training, _ = audit(write(tmp_path / 'a.jsonl', [pair('x'), pair('y')]), chatml, LENIENT, ROWS)
    rows = write(tmp_path / 'b.jsonl', [pair('z'), pair('y'), pair('x', 'a', 'b')])
    pairs, report = audit(rows, chatml, LENIENT, ROWS, training=training)
    assert len(pairs) == 3
    assert report['noted']['prompt also in training']['rows'] == [f'{tmp_path}/b.jsonl:{n}' for n in (2, 3)]
    assert report['noted']['pair also in training']['rows'] == [f'{tmp_path}/b.jsonl:2']


def test_what_held_out_rows_share_with_validation_is_named(tmp_path, chatml):
    training, _ = audit(write(tmp_path / 'a.jsonl', [pair('x')]), chatml, LENIENT, ROWS)
    validation, _ = audit(write(tmp_path / 'b.jsonl', [pair('y'), pair('v')]), chatml, LENIENT, ROWS)
    rows = write(tmp_path / 'c.jsonl', [pair('x'), pair('y'), pair('v', 'a', 'b'), pair('z')])
    _, report = audit(rows, chatml, LENIENT, ROWS, training=training, validation=validation)
    named = {note: entry['rows'] for note, entry in report['noted'].items() if entry['count']}
    assert named == {
        'prompt also in training': [f'{tmp_path}/c.jsonl:1'],
        'pair also in training': [f'{tmp_path}/c.jsonl:1'],
        'prompt also in validation': [f'{tmp_path}/c.jsonl:2', f'{tmp_path}/c.jsonl:3'],
        'pair also in validation': [f'{tmp_path}/c.jsonl:2'],
    }
    assert overlaps(report) == (
        'prompt also in training (1), pair also in training (1), '
        'prompt also in validation (2), pair also in validation (1)'
    )
    assert overlaps(audit(rows, chatml, LENIENT, ROWS)[1]) == ''


def test_rows_equal_but_for_an_extra_column_are_not_duplicates(tmp_path, chatml):
    rows = write(tmp_path / 'a.jsonl', [pair('x', margin=1), pair('x', margin=2), pair('x', margin=2)])
    pairs, report = audit(rows, chatml, LENIENT, ROWS, wanted=Wanted(numbers=('margin',)))
    assert [pair.columns for pair in pairs] == [{'margin': 1.0}, {'margin': 2.0}]
    assert counts(report, 'rejected') == {'duplicate': 1}
    _, report = audit(rows, chatml, LENIENT, ROWS)
    assert counts(report, 'rejected') == {'duplicate': 2}


def test_unpaired_rows_have_one_completion(tmp_path, chatml):
    rows = write(
        tmp_path / 'a.jsonl',
        [
            unpaired('x', 'yes', True),
            unpaired('x', [assistant('no')], False),
            pair('y', 'a', 'b'),
            {'prompt': 'the fox', 'completion': ' jumps', 'label': False},
        ],
    )
    pairs, report = audit(rows, chatml, LENIENT, ROWS, wanted=Wanted(unpaired=True))
    texts = [(chatml.decode(pair.chosen), chatml.decode(pair.rejected)) for pair in pairs]
    end = '<|im_end|>'
    assert texts == [('yes' + end, ''), ('', 'no' + end), ('a' + end, 'b' + end), ('', ' jumps' + end)]
    assert all(side.dtype == np.int32 for pair in pairs for side in (pair.prompt, pair.chosen, pair.rejected))
    assert pairs[0].prompt.tolist() == pairs[1].prompt.tolist()
    assert report['unpaired'] == {'chosen': 1, 'rejected': 2}
    assert report['tokens']['chosen']['min'] == 2 and report['tokens']['rejected']['min'] == 2
    assert (report['chosen_longer_rate'], report['equal_length_rate']) == (0.0, 1.0)  # of the one pair


def test_unpaired_rows_are_audited_like_pairs(tmp_path, chatml):
    long = 'a' + ' the answer' * 20
    cases = [
        (unpaired('x', 'yes', True), None),
        (unpaired('x', 'yes', True), 'duplicate'),
        (unpaired('x', 'yes', False), None),  # a contradiction
        (unpaired('x', '', True), 'empty completion'),
        (unpaired('x', None, True), 'empty completion'),
        (unpaired('x', 'yes', None), 'label is not true or false'),
        (unpaired('x', 'yes', 1), 'label is not true or false'),
        (unpaired('x', [assistant('a'), *user('b')], True), 'completion is not one assistant turn'),
        ({'prompt': 'x', 'completion': [assistant('a')], 'label': True}, 'wrong shape'),
        ({'completion': [assistant('a')], 'label': True}, 'empty prompt'),
        (unpaired('x', 'a<|im_end|>b', True), 'end token inside completion'),
        (unpaired('y', long, True), None),
        ({**pair('z', None, None), 'completion': 'yes', 'label': True}, None),  # columnar files fill up
        ({**pair('z', 'a', 'b'), 'completion': None, 'label': None}, None),
        ({**pair('z', None, 'b'), 'completion': 'yes', 'label': True}, 'empty chosen'),
    ]
    rows = write(tmp_path / 'a.jsonl', [row for row, _ in cases])
    pairs, report = audit(rows, chatml, LENIENT, ROWS, wanted=Wanted(unpaired=True))
    expected = collections.Counter(reason for _, reason in cases if reason)
    assert counts(report, 'rejected') == expected and len(pairs) == len(cases) - expected.total()
    assert report['noted']['contradiction']['rows'] == [f'{tmp_path}/a.jsonl:3']
    assert report['noted']['completion cut']['rows'] == [f'{tmp_path}/a.jsonl:12']
    assert report['noted']['duplicate prompt']['count'] == 2


def test_losses_that_need_pairs_refuse_unpaired_rows(tmp_path, chatml):
    rows = write(tmp_path / 'a.jsonl', [pair('x'), unpaired('y', 'yes', True)])
    pairs, report = audit(rows, chatml, LENIENT, ROWS)
    assert len(pairs) == 1
    assert report['rejected']['unpaired, but the losses need pairs']['rows'] == [f'{tmp_path}/a.jsonl:2']
    rows = write(tmp_path / 'b.jsonl', [unpaired('x', 'yes', True), unpaired('y', 'yes', True)])
    with pytest.raises(InputError, match='b.jsonl:1: all rows are unpaired .*the losses of the objective need pairs'):
        audit(rows, chatml, LENIENT, ROWS)


def test_an_unpaired_row_takes_one_prompt_of_its_row(tmp_path, chatml):
    rows = write(tmp_path / 'a.jsonl', [unpaired('x', 'the quick brown fox', True)])
    pairs, _ = audit(rows, chatml, LENIENT, ROWS, wanted=Wanted(unpaired=True))
    need = pairs[0].prompt.size + pairs[0].chosen.size
    for layout in ('packed', 'shared'):
        fitting, tight = (config.Rows(layout=layout, lengths=(length,)) for length in (need, need - 1))
        assert len(audit(rows, chatml, LENIENT, fitting, wanted=Wanted(unpaired=True))[0]) == 1
        with pytest.raises(InputError, match='longer than a row'):
            audit(rows, chatml, LENIENT, tight, wanted=Wanted(unpaired=True))


def test_policies(tmp_path, chatml):
    rows = write(tmp_path / 'a.jsonl', [pair('x'), pair('y'), pair('z'), b'{'])
    assert len(audit(rows, chatml, config.Data(max_drop_rate=0.25), ROWS)[0]) == 3
    with pytest.raises(InputError, match=r'25.0% of rows.*max_drop_rate 24.0%(.|\n)*1  not JSON.*a.jsonl:4'):
        audit(rows, chatml, config.Data(max_drop_rate=0.24), ROWS)
    with pytest.raises(InputError, match="bad_rows is 'error'"):
        audit(rows, chatml, config.Data(max_drop_rate=1.0, bad_rows='error'), ROWS)
    assert len(audit(rows[:3], chatml, config.Data(bad_rows='error'), ROWS)[0]) == 3
    with pytest.raises(InputError, match='no row can be used'):
        audit(rows[3:], chatml, LENIENT, ROWS)


@pytest.mark.parametrize('options', [{'max_prompt_tokens': 0}, {'max_completion_tokens': 0}, {'max_drop_rate': 1.5}])
def test_impossible_settings_are_refused(tmp_path, chatml, options):
    with pytest.raises(InputError, match=next(iter(options))):
        audit(write(tmp_path / 'a.jsonl', [pair('x')]), chatml, config.Data(**options), ROWS)


def test_length_statistics(tmp_path, chatml):
    answers = [('a', 'b b'), ('a', 'a a a'), ('a b c d', 'a'), ('a', 'b')]
    rows = write(tmp_path / 'a.jsonl', [pair('x', *answer) for answer in answers])
    pairs, report = audit(rows, chatml, LENIENT, ROWS)
    chosen = np.array([pair.chosen.size for pair in pairs])
    assert report['tokens']['chosen'] == {
        'min': 2.0,
        'median': 2.0,
        'mean': round(float(sum(chosen)) / 4, 3),
        'p95': round(float(np.percentile(chosen, 95)), 3),
        'max': float(max(chosen)),
    }
    assert report['chosen_longer_rate'] == 0.25 and report['equal_length_rate'] == 0.25
    assert report['tokens']['prompt']['min'] == report['tokens']['prompt']['max'] == pairs[0].prompt.size


def test_unknown_tokens_are_measured(tmp_path, llama2):
    rows = write(tmp_path / 'a.jsonl', [{'prompt': 'the', 'chosen': ' fox', 'rejected': ' 漢'}])
    pairs, report = audit(rows, llama2, LENIENT, ROWS)
    tokens = np.concatenate([pairs[0].prompt, pairs[0].chosen, pairs[0].rejected])
    assert report['unknown_token_rate'] == round(1 / tokens.size, 6)


def test_the_report_is_the_same_bytes_for_the_same_data(tmp_path, chatml):
    rows = write(tmp_path / 'a.jsonl', [row for row, _ in BAD])
    for name in ('one', 'two'):
        write_report(tmp_path / name / 'data_report.json', {'train': audit(rows, chatml, LENIENT, ROWS)[1]})
    one, two = ((tmp_path / name / 'data_report.json').read_bytes() for name in ('one', 'two'))
    assert one == two
    assert json.loads(one)['train'] == audit(rows, chatml, LENIENT, ROWS)[1]
    text = table(json.loads(one)['train'])
    assert f'{len(BAD)} rows: 2 kept' in text and f'{tmp_path}/a.jsonl:3' in text


@pytest.mark.parametrize('name', ['gsm8k_solutions', 'hh_helpful', 'persona', 'truthfulqa'])
def test_real_data_pass(name, shared_data, chatml, smollm2):
    data, rows = config.Data(max_drop_rate=0.0), config.Rows()
    train = read_rows(str(shared_data / f'ci/{name}.train.jsonl'))[:150]
    held_out = read_rows(str(shared_data / f'ci/{name}.eval.jsonl'))[:50]
    pairs, report = audit(train, smollm2, data, rows)
    assert len(pairs) == len(train) and not counts(report, 'rejected')
    assert report['noted']['boundary mismatch']['count'] == 0
    held_out_pairs, held_out_report = audit(held_out, smollm2, data, rows, training=pairs)
    assert held_out_report['noted']['prompt also in training']['count'] == 0
    end = smollm2.eos_token_id
    for pair_ in pairs + held_out_pairs:
        for completion in (pair_.chosen, pair_.rejected):
            assert completion.tolist().count(end) == (completion.size < 512 or completion[-1] == end)
