"""The same rows by two tokenizers. The oracle is transformers' own tokenisation of a conversation or text."""

import dataclasses

import numpy as np
import pytest

from jaxpo import config
from jaxpo.data.audit import audit
from jaxpo.data.columns import Wanted
from jaxpo.data.retokenize import retokenized
from jaxpo.data.sources import Row, read_rows
from jaxpo.errors import InputError

ROWS = config.Rows(lengths=(2048,))
DATA = config.Data(max_drop_rate=1.0, max_prompt_tokens=1000, max_completion_tokens=1000)
UNPAIRED = Wanted(unpaired=True)


def user(content):
    return [{'role': 'user', 'content': content}]


def rows_of(*fields):
    return [Row(f'f:{number}', one) for number, one in enumerate(fields)]


def row(prompt, chosen='yes, the fox', rejected='no', **extra):
    return {'prompt': user(prompt), 'chosen': chosen, 'rejected': rejected, **extra}


def both(rows, policy, other, data=DATA, wanted=UNPAIRED):
    """Pairs by the policy's tokenizer and by another."""
    pairs, _ = audit(rows, policy, data, ROWS, wanted=wanted)
    return pairs, retokenized(rows, pairs, other, data, policy_tokenizer=policy, reference='big')


def conversation_ids(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)


def assert_as_the_template_writes(found, fields, tokenizer, behind):
    """`behind`: what the template writes after the end token."""
    prompt = fields['prompt']
    assert found.prompt.tolist() == conversation_ids(tokenizer, prompt, add_generation_prompt=True)
    for side in ('chosen', 'rejected'):
        whole = conversation_ids(tokenizer, [*prompt, {'role': 'assistant', 'content': fields[side]}])
        ids = getattr(found, side).tolist()
        assert [*found.prompt.tolist(), *ids, *tokenizer.encode(behind, add_special_tokens=False)] == whole
        end = tokenizer.convert_ids_to_tokens(ids[-1])
        assert end in ('<|im_end|>', '<|eot|>') and ids.count(ids[-1]) == 1
        assert tokenizer.decode(ids) == fields[side] + end


@pytest.mark.parametrize('policy, other, behind', [('chatml', 'llama3', ''), ('llama3', 'chatml', '\n')])
def test_ids_are_those_of_the_other_tokenizer_and_template(policy, other, behind, request):
    policy, other = (request.getfixturevalue(name) for name in (policy, other))
    # Multi-turn; a first word that would merge with LLAMA3's line breaks would be tokenised apart, and has none here.
    turns = [*user('is the fox lazy?'), {'role': 'assistant', 'content': 'maybe'}, *user('yes or no')]
    rows = rows_of(row('the dog'), {**row(''), 'prompt': turns}, row('x', 'the answer is yes', 'a lazy dog'))
    pairs, found = both(rows, policy, other)
    assert [one.index for one in found] == [one.row for one in found] == [0, 1, 2]
    for pair, one, raw in zip(pairs, found, rows, strict=True):
        assert_as_the_template_writes(one, raw.fields, other, behind)
        assert pair.chosen.tolist() != one.chosen.tolist()
        assert one.prompt.dtype == one.chosen.dtype == one.rejected.dtype == np.int32


@pytest.mark.parametrize('name', ['gsm8k_solutions', 'hh_helpful', 'truthfulqa'])
def test_real_rows_by_a_real_tokenizer(name, shared_data, chatml, smollm2):
    rows = read_rows(str(shared_data / f'ci/{name}.eval.jsonl'))[:100]
    data = dataclasses.replace(DATA, max_prompt_tokens=4000, max_completion_tokens=4000)
    pairs, _ = audit(rows, chatml, data, config.Rows(lengths=(8000,)))
    found = retokenized(rows, pairs, smollm2, data, policy_tokenizer=chatml, reference='big')
    kept = [(one, rows[one.row].fields) for one in found]
    assert len(kept) == len(pairs) > 50
    checked = 0
    for one, fields in kept:
        if isinstance(fields['prompt'], list) and isinstance(fields['chosen'], str):
            assert_as_the_template_writes(one, fields, smollm2, '\n')
            checked += 1
    assert checked > 50
    # The same rows audited with that tokenizer as the policy's: one definition of both.
    own, _ = audit(rows, smollm2, data, config.Rows(lengths=(8000,)))
    by_row = {pair.row: pair for pair in own}
    for one in found:
        for side in ('prompt', 'chosen', 'rejected'):
            assert np.array_equal(getattr(one, side), getattr(by_row[one.row], side))


def test_plain_text_gets_the_other_ones_own_bos_and_eos(chatml, stories):
    texts = {'prompt': 'Once upon a time', 'chosen': ' there was a fox.', 'rejected': ' Tom ran.'}
    _, (found,) = both(rows_of(texts), chatml, stories)
    assert found.prompt.tolist() == stories.encode('Once upon a time')
    assert found.prompt[0] == stories.bos_token_id
    for side in ('chosen', 'rejected'):
        ids = getattr(found, side).tolist()
        assert ids[-1] == stories.eos_token_id and stories.bos_token_id not in ids
        assert [*found.prompt.tolist(), *ids[:-1]] == stories.encode(texts['prompt'] + texts[side])
        assert stories.decode([*found.prompt, *ids], skip_special_tokens=True) == texts['prompt'] + texts[side]


def test_order_and_index_are_those_of_the_pairs_behind_dropped_rows(chatml, llama3):
    rows = rows_of(row('a'), row('b', chosen=''), row('c', 'maybe'), Row, row('d', 'lazy'))
    rows[3] = Row('f:3', None, 'not JSON')
    pairs, found = both(rows, chatml, llama3)
    assert [(pair.index, pair.row) for pair in pairs] == [(0, 0), (1, 2), (2, 4)]
    assert [(one.index, one.row) for one in found] == [(0, 0), (1, 2), (2, 4)]
    assert [llama3.decode(one.chosen) for one in found] == ['yes, the fox<|eot|>', 'maybe<|eot|>', 'lazy<|eot|>']
    backwards = retokenized(rows, pairs[::-1], llama3, DATA, policy_tokenizer=chatml, reference='big')
    assert [one.index for one in backwards] == [2, 1, 0]
    assert backwards[0].chosen.tolist() == found[2].chosen.tolist()


def test_what_belongs_to_the_policys_tokens_is_left_behind(chatml, llama3):
    rows = rows_of(row('a', margin=2.0), row('b', margin=1.0))
    wanted = Wanted(numbers=('margin',), companions=('mismatched',))
    pairs, found = both(rows, chatml, llama3, wanted=wanted)
    assert all(pair.columns and pair.companions for pair in pairs)
    assert not any(one.columns or one.companions or one.table for one in found)
    assert [one.row for one in found] == [pair.row for pair in pairs] == [0, 1]


def test_a_completion_that_is_not_there_is_empty(chatml, llama3):
    rows = rows_of(*({'prompt': user('x'), 'completion': f'the {label}', 'label': label} for label in (True, False)))
    _, (desirable, undesirable) = both(rows, chatml, llama3)
    assert llama3.decode(desirable.chosen) == 'the True<|eot|>' and desirable.rejected.size == 0
    assert llama3.decode(undesirable.rejected) == 'the False<|eot|>' and undesirable.chosen.size == 0


@pytest.mark.parametrize('side', ['prompt', 'chosen', 'rejected'])
def test_rows_that_were_shortened_for_the_policy_are_refused(side, chatml, llama3):
    long = ' the answer is maybe' * 9
    rows = rows_of(row('short'), *(row(**{'prompt': f'p{i}', side: f'{i}' + long + ' z' * i}) for i in range(7)))
    whole = audit(rows, chatml, DATA, ROWS)[0]
    longest = max(getattr(pair, side).size for pair in whole)
    setting = 'max_prompt_tokens' if side == 'prompt' else 'max_completion_tokens'
    assert [one.row for one in both(rows, chatml, llama3, dataclasses.replace(DATA, **{setting: longest}))[1]]
    with pytest.raises(InputError) as caught:
        both(rows, chatml, llama3, dataclasses.replace(DATA, **{setting: longest - 1}))
    assert 'references.big has another tokenizer' in str(caught.value)
    assert f'data.{setting} {longest - 1} shortens 1 row(s): f:7. Raise data.{setting} to {longest} ' in str(
        caught.value
    )
    with pytest.raises(InputError) as caught:
        both(rows, chatml, llama3, dataclasses.replace(DATA, **{setting: 25}))
    assert 'shortens 7 row(s): f:1, f:2, f:3, f:4, f:5, ....' in str(caught.value)
    assert f'Raise data.{setting} to {longest} at least' in str(caught.value)


def test_the_limits_are_the_policys_alone(chatml, llama3, stories):
    """Nothing is cut where the other tokenizer needs more tokens than the policy may."""
    texts = {'prompt': 'the quick brown fox', 'chosen': ' jumps over the lazy dog', 'rejected': ' is lazy'}
    pairs, _ = audit(rows_of(texts), chatml, DATA, ROWS)
    tight = dataclasses.replace(
        DATA, max_prompt_tokens=pairs[0].prompt.size, max_completion_tokens=pairs[0].chosen.size
    )
    _, (found,) = both(rows_of(texts), chatml, stories, tight)
    assert found.chosen.size > tight.max_completion_tokens
    assert stories.decode([*found.prompt, *found.chosen], skip_special_tokens=True) == texts['prompt'] + texts['chosen']


def test_rows_the_other_template_refuses_are_named(chatml, llama3):
    system = [{'role': 'system', 'content': 'be'}, *user('x')]
    rows = rows_of(row('y'), {**row(''), 'prompt': system}, row('z', 'a<|eot|>b', 'c'))
    with pytest.raises(InputError) as caught:
        both(rows, chatml, llama3)
    assert (
        'references.big: its tokenizer refuses 2 row(s): f:1 (refused by the chat template: No system role), '
        in str(caught.value)
    )
    assert 'f:2 (end token inside completion)' in str(caught.value)


def test_a_tokenizer_that_cannot_write_the_rows_is_refused(chatml, llama2):
    with pytest.raises(InputError, match='references.big: .*no chat template.*reference'):
        both(rows_of(row('x')), chatml, llama2)
    llama2.eos_token = None
    with pytest.raises(InputError, match='references.big: .*no EOS token'):
        both(rows_of({'prompt': 'x', 'chosen': ' yes', 'rejected': ' no'}), chatml, llama2)


def test_pairs_of_no_row_are_refused(chatml, llama3):
    rows = rows_of(row('x'), row('y'))
    pairs, _ = audit(rows, chatml, DATA, ROWS)
    for wrong in (-1, 2):
        pairs[1] = dataclasses.replace(pairs[1], row=wrong)
        with pytest.raises(InputError, match=f'Pair 1 is of row {wrong}, but there are the rows 0 to 1'):
            retokenized(rows, pairs, llama3, DATA, policy_tokenizer=chatml, reference='big')
