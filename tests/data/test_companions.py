import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpo import config
from jaxpo.data import companions
from jaxpo.data.audit import audit
from jaxpo.data.columns import Wanted
from jaxpo.data.rows import fill_rows
from jaxpo.data.sources import Row
from jaxpo.errors import InputError
from jaxpo.types import Pair

ROWS = config.Rows(lengths=(64, 128))
LENIENT = config.Data(max_drop_rate=1.0, max_prompt_tokens=60, max_completion_tokens=20)
MISMATCHED = Wanted(companions=('mismatched',))
CORRUPTED = Wanted(companions=('corrupted',))
BOTH = Wanted(companions=('corrupted', 'mismatched'))


def user(content):
    return [{'role': 'user', 'content': content}]


def rows_of(*fields):
    return [
        Row(f'f:{number}', {'prompt': 'x', 'chosen': 'yes', 'rejected': 'no', **f}) for number, f in enumerate(fields)
    ]


def ids(*values):
    return np.array(values, np.int32)


def expected_donor(pairs, place):
    """Slowly, by the words of the definition."""
    for step in range(1, len(pairs) + 1):
        donor = pairs[(place + step) % len(pairs)]
        if donor.prompt.tolist() != pairs[place].prompt.tolist():
            first, second = (donor.chosen, donor.rejected) if place % 2 == 0 else (donor.rejected, donor.chosen)
            return first if first.size else second
    raise AssertionError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=9))
def test_mismatched_completions_are_the_next_of_another_prompt(kinds):
    pairs = []
    for index, (prompt, side) in enumerate(kinds):
        chosen, rejected = ids(10 + index), ids(20 + index, 20)
        sides = [(chosen, rejected), (chosen, ids()), (ids(), rejected)][side]
        pairs.append(Pair(ids(prompt, 7), *sides, index))
    if len({prompt for prompt, _ in kinds}) == 1:
        with pytest.raises(InputError, match=f'all {len(kinds)} usable rows have one prompt'):
            companions.mismatched(pairs)
        return
    for place, (pair, other) in enumerate(zip(pairs, companions.mismatched(pairs), strict=True)):
        assert other.prompt is pair.prompt
        assert other.completion.tolist() == expected_donor(pairs, place).tolist()


def test_every_pair_is_given_its_mismatched_completion(chatml):
    rows = rows_of(
        {'prompt': 'a'}, {'prompt': 'a', 'chosen': 'the fox'}, {'prompt': 'b', 'chosen': 'maybe'}, {'prompt': ''}
    )
    pairs, report = audit(rows, chatml, LENIENT, ROWS, wanted=MISMATCHED)
    assert [chatml.decode(pair.companions['mismatched'].completion) for pair in pairs] == [
        'maybe<|im_end|>', 'no<|im_end|>', 'yes<|im_end|>'
    ]  # fmt: skip
    assert [pair.index for pair in pairs] == [0, 1, 2]
    assert report['tokens']['mismatched']['max'] == pairs[0].companions['mismatched'].completion.size
    assert report['tokens']['mismatched_prompt'] == report['tokens']['prompt']


def test_one_prompt_cannot_be_mismatched(chatml):
    with pytest.raises(InputError, match='all 2 usable rows have one prompt'):
        audit(rows_of({}, {'chosen': 'maybe'}), chatml, LENIENT, ROWS, wanted=MISMATCHED)
    # what is wrong with the rows comes first
    with pytest.raises(InputError, match='no row can be used'):
        audit(rows_of({'chosen': ''}, {'rejected': ''}), chatml, LENIENT, ROWS, wanted=MISMATCHED)
    with pytest.raises(InputError, match='would be dropped'):
        audit(rows_of({}, {'rejected': ''}), chatml, config.Data(), ROWS, wanted=MISMATCHED)


def test_pairs_longer_than_a_row_with_their_companions_are_counted(chatml):
    rows = rows_of(
        {'prompt': 'a', 'chosen': 'maybe'}, {'prompt': 'b', 'chosen': 'the quick brown fox'}, {'prompt': 'c'}
    )
    pairs, _ = audit(rows, chatml, LENIENT, ROWS, wanted=MISMATCHED)
    need = max(
        2 * pair.prompt.size + pair.chosen.size + pair.rejected.size + pair.companions['mismatched'].completion.size
        for pair in pairs
    )
    assert len(audit(rows, chatml, LENIENT, config.Rows(lengths=(need,)), wanted=MISMATCHED)[0]) == 3
    pairs, report = audit(rows, chatml, LENIENT, config.Rows(lengths=(need - 1,)), wanted=MISMATCHED)
    assert report['rejected']['longer than a row'] == {
        'count': 1, 'rows': ['f:0 (with its mismatched completion)']
    }  # fmt: skip
    assert [pair.index for pair in pairs] == [0, 1] and report['kept'] == 2
    fill_rows(pairs, config.Rows(lengths=(need - 1,)))


def test_the_corrupted_prompt_precedes_the_chosen_tokens(chatml):
    rows = rows_of(
        {'corrupted_prompt': 'the dog'},
        {'prompt': user('x'), 'corrupted_prompt': user('y')},
    )
    pairs, report = audit(rows, chatml, LENIENT, ROWS, wanted=CORRUPTED)
    for pair, text in zip(pairs, ('the dog', '<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\n'), strict=True):
        assert chatml.decode(pair.companions['corrupted'].prompt) == text
        assert pair.companions['corrupted'].completion is pair.chosen
        assert list(pair.companions) == ['corrupted']
    assert report['tokens']['corrupted_prompt']['max'] == pairs[1].companions['corrupted'].prompt.size


def test_corrupted_prompts_may_have_another_name(chatml):
    data = config.Data(columns={'corrupted_prompt': 'blurred'})
    pairs, _ = audit(rows_of({'blurred': 'y'}), chatml, data, ROWS, wanted=CORRUPTED)
    assert chatml.decode(pairs[0].companions['corrupted'].prompt) == 'y'
    with pytest.raises(InputError, match="no column 'corrupted_prompt'"):
        audit(rows_of({'blurred': 'y'}), chatml, config.Data(), ROWS, wanted=CORRUPTED)


@pytest.mark.parametrize(
    'value, reason, detail',
    [
        (None, 'missing column', 'corrupted_prompt'),
        ('x', 'corrupted prompt is the prompt', ''),
        (user('x'), 'corrupted prompt refused', "it is not of the prompt's kind, text or messages"),
        ('', 'corrupted prompt refused', 'empty prompt'),
        (7, 'corrupted prompt refused', "it is not of the prompt's kind, text or messages"),
        ('the fox ' * 99 + 'x', None, ''),
    ],
)
def test_corrupted_prompts_that_are_none_are_counted(chatml, value, reason, detail):
    rows = rows_of({'prompt': 'a', 'corrupted_prompt': 'b'}, {'corrupted_prompt': value})
    _, report = audit(rows, chatml, LENIENT, config.Rows(lengths=(256,)), wanted=CORRUPTED)
    found = {reason: entry['rows'] for reason, entry in report['rejected'].items() if entry['count']}
    assert found == ({reason: [f'f:1 ({detail})' if detail else 'f:1']} if reason else {})


def test_a_corruption_that_trimming_cuts_off_is_none(chatml):
    data = config.Data(max_prompt_tokens=2, max_drop_rate=1.0)
    rows = rows_of(
        {'prompt': 'the dog jumps over', 'corrupted_prompt': 'the cat jumps over'}, {'corrupted_prompt': 'y'}
    )
    pairs, _ = audit(rows, chatml, LENIENT, ROWS, wanted=CORRUPTED)
    assert len(pairs) == 2
    _, report = audit(rows, chatml, data, ROWS, wanted=CORRUPTED)
    assert report['rejected']['corrupted prompt is the prompt']['rows'] == ['f:0']


def test_rows_equal_but_for_their_corrupted_prompts_are_not_duplicates(chatml):
    rows = rows_of(*({'corrupted_prompt': text} for text in ('b', 'c', 'c')))
    pairs, report = audit(rows, chatml, LENIENT, ROWS, wanted=CORRUPTED)
    assert len(pairs) == 2 and report['rejected']['duplicate']['rows'] == ['f:2']


def test_companions_come_in_the_order_wanted_and_fill_a_batch(chatml):
    rows = rows_of({'prompt': 'a', 'corrupted_prompt': 'b'}, {'corrupted_prompt': 'c'})
    for wanted in (BOTH, Wanted(companions=BOTH.companions[::-1])):
        pairs, _ = audit(rows, chatml, LENIENT, ROWS, wanted=wanted)
        assert all(tuple(pair.companions) == wanted.companions for pair in pairs)
        batch = fill_rows(pairs, ROWS)
        assert set(batch.companions) == {'corrupted', 'mismatched'}
        scored = sum(pair.companions['mismatched'].completion.size for pair in pairs)
        assert batch.companions['mismatched'].weights.sum() == scored


def test_undesirable_rows_have_nothing_to_put_behind_a_corrupted_prompt(chatml):
    row = {'chosen': None, 'rejected': None, 'completion': 'no', 'label': False, 'corrupted_prompt': 'y'}
    wanted = Wanted(companions=('corrupted',), unpaired=True)
    pairs, _ = audit(rows_of(row, {'corrupted_prompt': 'z'}), chatml, LENIENT, ROWS, wanted=wanted)
    weights = fill_rows(pairs, ROWS).companions['corrupted'].weights.sum(axis=-1).ravel()
    assert (
        sorted(weights[weights > 0]) == [pairs[1].chosen.size] and not pairs[0].companions['corrupted'].completion.size
    )
