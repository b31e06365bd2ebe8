"""Expected ids are put together by hand from pieces between control tokens, never by rendering a template."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxpo.data.chat import adds_bos, check_template, check_tokenizer, prompt_ids, tokenize
from jaxpo.data.sources import example_of, read_rows
from jaxpo.errors import InputError

USER = {'role': 'user', 'content': 'is the fox lazy?'}


def pieces(tokenizer, *parts):
    """Ids of parts: text, or the name of a control token."""
    ids = []
    for part in parts:
        token = tokenizer.convert_tokens_to_ids(part) if part[:1] == '<' else None
        ids += [token] if token is not None else tokenizer.encode(part, add_special_tokens=False)
    return ids


def tokenized(tokenizer, prompt, chosen, rejected, prompt_limit=100, completion_limit=100):
    fields = {'prompt': prompt, 'chosen': chosen, 'rejected': rejected}
    return tokenize(example_of(fields), tokenizer, prompt_limit, completion_limit)


def reason(tokenizer, *row):
    with pytest.raises(InputError) as caught:
        tokenized(tokenizer, *row)
    return caught.value.reason


def as_lists(result):
    return result.prompt.tolist(), result.chosen.tolist(), result.rejected.tolist()


def test_chatml_ends_with_one_end_of_turn_and_no_newline(chatml):
    result = tokenized(chatml, [USER], 'no', 'the fox is lazy')
    start, end = '<|im_start|>', '<|im_end|>'
    prompt = pieces(chatml, start, 'user\nis the fox lazy?', end, '\n', start, 'assistant\n')
    assert as_lists(result) == (
        prompt, pieces(chatml, 'no', end), pieces(chatml, 'the fox is lazy', end)
    )  # fmt: skip
    assert (result.prompt_trimmed, result.completions_cut, result.boundary_mismatches) == (False, 0, 0)
    assert result.prompt.dtype == result.chosen.dtype == 'int32'


def test_an_answer_that_looks_like_the_template_ends_where_it_ends(chatml):
    for answer in ('end', 'im', 'assistant', '\n', 'user\nno'):
        if answer.strip():
            assert tokenized(chatml, [USER], answer, 'x').chosen.tolist() == pieces(chatml, answer, '<|im_end|>')


def test_the_template_writes_the_only_bos(llama3):
    assert adds_bos(llama3)
    result = tokenized(llama3, [USER], ' no ', 'maybe')
    head, tail = '<|header|>', '<|/header|>'
    prompt = pieces(
        llama3, '<|begin|>', head, 'user', tail, '\n\nis the fox lazy?', '<|eot|>', head, 'assistant', tail, '\n\n'
    )
    assert as_lists(result)[0] == prompt
    # the template trims its contents; newlines before the answer belong to the prompt or to a merged token
    whole = as_lists(result)[0] + as_lists(result)[1]
    assert llama3.decode(whole) == llama3.decode(prompt) + 'no<|eot|>'
    assert whole.count(llama3.bos_token_id) == 1 and whole[-1] == pieces(llama3, '<|eot|>')[0]
    assert llama3.eos_token_id not in whole


def test_plain_text_gets_one_bos_and_one_eos(llama3, llama2, chatml):
    for tokenizer in (llama3, llama2):
        for prompt in ('the fox', tokenizer.bos_token + 'the fox'):
            result = tokenized(tokenizer, prompt, ' is lazy', ' jumps')
            assert result.prompt.tolist().count(tokenizer.bos_token_id) == 1
            assert result.prompt[0] == tokenizer.bos_token_id
            for completion, text in ((result.chosen, ' is lazy'), (result.rejected, ' jumps')):
                assert tokenizer.bos_token_id not in completion
                assert completion.tolist().count(tokenizer.eos_token_id) == 1
                assert completion[-1] == tokenizer.eos_token_id
                body = [*result.prompt[1:], *completion[:-1]]
                assert body == tokenizer.encode('the fox' + text, add_special_tokens=False)
    result = tokenized(chatml, 'the fox', ' is lazy', ' jumps')
    assert as_lists(result)[0] == pieces(chatml, 'the fox')
    assert as_lists(result)[1] == [*pieces(chatml, ' is lazy'), chatml.eos_token_id]


def test_no_space_is_added_between_prompt_and_completion(llama2, stories):
    # alone, these tokenizers would put a space in front of every completion
    for tokenizer in (llama2, stories):
        for prompt, chosen in (('the fox\n', 'is lazy'), ('the fox', 'es'), ('the fox ', 'is lazy'), ('the', ' fox')):
            result = tokenized(tokenizer, prompt, chosen, ' x')
            ids = [*result.prompt[1:], *result.chosen[:-1]]
            assert tokenizer.decode(ids).removeprefix(' ') == prompt + chosen
    assert tokenized(llama2, 'the fox ', 'is lazy', 'jumps').boundary_mismatches == 2


def test_an_eos_the_text_has_already_is_not_doubled(llama2):
    assert tokenized(llama2, 'the', ' fox</s>', ' dog').chosen.tolist() == [
        *pieces(llama2, 'fox'), llama2.eos_token_id
    ]  # fmt: skip
    assert reason(llama2, 'the', ' fox</s> jumps', ' dog') == 'end token inside completion'
    assert reason(llama2, 'the', ' dog', ' fox</s></s>') == 'end token inside completion'


def test_control_tokens_of_the_template_inside_an_answer_are_refused(chatml, llama3):
    assert reason(chatml, [USER], 'no<|im_end|>', 'yes') == 'end token inside completion'
    assert reason(llama3, [USER], 'yes', 'no<|eot|>maybe') == 'end token inside completion'
    assert reason(llama3, [USER], 'yes', 'no<|end|>maybe') == 'end token inside completion'


def test_a_merge_across_the_boundary_is_counted_and_the_prompt_stays_common(chatml):
    # ' lazy' is one piece, so a prompt that ends with the space is not a prefix of the whole
    result = tokenized(chatml, 'the fox is ', 'lazy', 'quick')
    assert result.boundary_mismatches == 2
    assert as_lists(result) == (
        pieces(chatml, 'the fox is '),
        [*pieces(chatml, 'lazy'), chatml.eos_token_id],
        [*pieces(chatml, 'quick'), chatml.eos_token_id],
    )


def test_long_completions_are_cut_without_an_end(chatml):
    whole = tokenized(chatml, [USER], 'the quick brown fox', 'no').chosen.tolist()
    assert len(whole) > 4
    for limit in range(1, len(whole)):
        result = tokenized(chatml, [USER], 'the quick brown fox', 'maybe', completion_limit=limit)
        assert result.chosen.tolist() == whole[:limit]
        assert chatml.eos_token_id not in result.chosen
    assert tokenized(chatml, [USER], 'the quick brown fox', 'no', completion_limit=len(whole)).completions_cut == 0
    assert result.completions_cut >= 1


def test_long_prompts_keep_their_tail_and_their_bos(chatml, llama3, llama2):
    whole = prompt_ids([USER], chatml, 100).tolist()
    result = tokenized(chatml, [USER], 'no', 'yes', prompt_limit=5)
    assert result.prompt_trimmed and result.prompt.tolist() == whole[-5:]
    # what is cut from the prompt does not change the completions
    assert result.chosen.tolist() == tokenized(chatml, [USER], 'no', 'yes').chosen.tolist()
    for tokenizer, prompt in ((llama3, [USER]), (llama3, 'the quick brown fox'), (llama2, 'the quick fox is')):
        whole = prompt_ids(prompt, tokenizer, 100).tolist()
        for limit in range(2, len(whole)):
            assert prompt_ids(prompt, tokenizer, limit).tolist() == [whole[0], *whole[len(whole) - limit + 1 :]]
        assert prompt_ids(prompt, tokenizer, 1).tolist() == whole[-1:]
        assert prompt_ids(prompt, tokenizer, len(whole)).tolist() == whole


def test_generation_and_training_share_their_prompts(chatml, llama3, llama2):
    for tokenizer, prompt in ((chatml, [USER]), (llama3, [USER]), (llama2, 'the fox'), (chatml, 'the fox')):
        trained = tokenized(tokenizer, prompt, ' yes', ' no', prompt_limit=6).prompt
        assert prompt_ids(prompt, tokenizer, 6).tolist() == trained.tolist()


def test_a_refusing_template_rejects_the_row_in_its_own_words(llama3):
    with pytest.raises(InputError, match='refused by the chat template: No system role'):
        prompt_ids([{'role': 'system', 'content': 'x'}, USER], llama3, 9)


def test_templates_without_an_end_token_get_eos(chatml):
    chatml.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        '{% if add_generation_prompt %}assistant: {% endif %}'
    )
    # 'assistant: ' + 'no' merges the space; the boundary is kept and counted
    result = tokenized(chatml, [USER], 'no', 'yes')
    assert as_lists(result)[1] == [*pieces(chatml, 'no'), chatml.eos_token_id]
    assert as_lists(result)[0] == pieces(chatml, 'user: is the fox lazy?\nassistant: ')


def test_templates_that_write_two_ends_train_the_first(chatml):
    chatml.chat_template += '<|endoftext|>'
    chatml.chat_template = chatml.chat_template.replace(
        '<|endoftext|>', '{% if not add_generation_prompt %}<|endoftext|>{% endif %}'
    )
    assert tokenized(chatml, [USER], 'no', 'yes').chosen.tolist() == pieces(chatml, 'no', '<|im_end|>')


def test_a_generation_prompt_that_the_whole_lacks_is_kept_and_counted(chatml):
    chatml.chat_template = chatml.chat_template.replace(
        '<|im_start|>assistant\n{% endif %}', '<|im_start|>assistant\n<think>\n{% endif %}'
    )
    result = tokenized(chatml, [USER], 'no', 'yes')
    assert chatml.decode(result.prompt).endswith('assistant\n<think>\n')
    assert result.chosen.tolist() == pieces(chatml, 'no', '<|im_end|>')
    assert result.boundary_mismatches == 2


def test_what_the_template_adds_before_an_answer_is_learned(chatml):
    chatml.chat_template = chatml.chat_template.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
    )
    result = tokenized(chatml, [USER], 'no', 'yes')
    assert chatml.decode(result.chosen) == '<think></think>no<|im_end|>'


def test_templates_that_hide_the_answer_reject_the_row(chatml):
    chatml.chat_template = "<|im_start|>{{ messages[0]['content'] }}"
    assert reason(chatml, [USER], 'no', 'yes') == 'hidden by the chat template'


def test_empty_prompts(chatml, llama2):
    assert reason(chatml, '', 'no', 'yes') == 'empty prompt'
    result = tokenized(llama2, '', 'no', 'yes')
    assert result.prompt.tolist() == [llama2.bos_token_id]
    assert result.chosen.tolist() == [*pieces(llama2, 'no'), llama2.eos_token_id]


def test_tokenizers_that_cannot_do_it_are_refused(chatml, llama2):
    check_template(chatml)
    check_tokenizer(chatml)
    with pytest.raises(InputError, match='no chat template'):
        check_template(llama2)
    with pytest.raises(InputError, match='no chat template'):
        prompt_ids([USER], llama2, 9)
    llama2.eos_token = None
    with pytest.raises(InputError, match='no EOS'):
        check_tokenizer(llama2)


def test_a_real_sentencepiece_tokenizer(stories):
    prompt, chosen, rejected = as_lists(tokenized(stories, 'Once upon a time', ' there was', ', a dog'))
    assert prompt[0] == 1 and prompt.count(1) == 1
    assert chosen[-1] == rejected[-1] == 2 and 2 not in chosen[:-1] and 1 not in chosen
    assert [*prompt, *chosen[:-1]] == stories.encode('Once upon a time there was')
    assert [*prompt, *rejected[:-1]] == stories.encode('Once upon a time, a dog')


def aligned(tokenizer, prompt, completion, limit=100):
    """Ids of a completion and its alignment."""
    row = {'prompt': prompt, 'completion': completion, 'label': False}
    result = tokenize(example_of(row), tokenizer, 100, limit, align=True)
    assert not result.chosen.size and set(result.alignments) == {'rejected'}
    return result.rejected.tolist(), result.alignments['rejected']


def expected_characters(tokenizer, ids, written, own_start, own):
    """Found by counting the bytes of byte-level tokens from the end of `written`, which the ids but EOS spell."""
    controls = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    data, places = written.encode(), []
    end = len(data)
    for token in reversed(tokenizer.convert_ids_to_tokens(ids)):
        start = end - (len(token.encode()) if token in controls else len(token))
        first = len(data[:start].decode(errors='ignore'))  # a token may begin or end within a character
        last = len(written) - len(data[end:].decode(errors='ignore'))
        spaces = [character.isspace() for character in written[first:last]]
        place = first + (spaces.index(False) if False in spaces else 0) - own_start
        places.append(-1 if place < 0 else place if place < len(own) else len(own.rstrip()) - 1)
        end = start
    return places[::-1]


WORDS = st.lists(st.sampled_from(['the fox', ' lazy', 'ick', ' ', '\n\n', 'é', '漢字', '😀', '.', '42']), min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(WORDS.map(''.join).filter(str.strip), st.sampled_from(['the fox', 'the fox is ', [USER]]))
def test_tokens_know_their_characters(chatml, trims_offsets, smollm2, text, prompt):
    for tokenizer in (chatml, trims_offsets, smollm2):
        ids, alignment = aligned(tokenizer, prompt, text, 1000)
        assert alignment.text == text and alignment.tokens == len(ids) == len(alignment.characters)
        written = text + tokenizer.eos_token
        assert alignment.characters.tolist() == expected_characters(tokenizer, ids, written, 0, text)


def test_sentencepiece_tokens_know_their_characters(llama2, stories):
    for tokenizer in (llama2, stories):
        for prompt in ('the fox', 'the fox ', 'the\n'):
            ids, alignment = aligned(tokenizer, prompt, ' lazy the dog')
            pieces = tokenizer.convert_ids_to_tokens(ids)
            for piece, place in zip(pieces[:-1], alignment.characters):
                if piece != '▁':
                    assert ' lazy the dog'[place:].startswith(piece.strip('▁')), (piece, place)
            places = alignment.characters.tolist()
            assert places[-1] == len(' lazy the dog') - 1 and places == sorted(places)


def test_what_the_template_adds_and_trims_is_known(llama3, chatml):
    # trimmed contents keep their own places; the end of the turn is at the last character there is
    ids, alignment = aligned(llama3, [USER], '  no \n')
    assert llama3.convert_ids_to_tokens(ids) == ['no', '<|eot|>'] and alignment.characters.tolist() == [2, 3]
    chatml.chat_template = chatml.chat_template.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}[a]{% endif %}{{ m['content'] }}\n\n"
    )
    ids, alignment = aligned(chatml, [USER], '  no')
    assert chatml.decode(ids) == '[a]  no\n\n<|im_end|>'
    assert alignment.characters.tolist() == expected_characters(chatml, ids, '[a]  no\n\n<|im_end|>', 3, '  no')
    assert alignment.characters.tolist()[:3] == [-1, -1, -1] and alignment.characters[-1] == 3
    # a template that changes the text leaves no alignment, but its tokens can be counted
    chatml.chat_template = chatml.chat_template.replace("m['content'] }}\n\n", "m['content'].replace('fox', 'dog') }}")
    ids, alignment = aligned(chatml, [USER], 'the fox')
    assert '[a]the dog' in chatml.decode(ids)
    assert alignment.characters is None and alignment.tokens == len(ids)


def test_a_template_that_drops_a_part_of_the_text_leaves_the_rest_in_place(chatml):
    chatml.chat_template = chatml.chat_template.replace("m['content'] }}", "m['content'].split('|')[-1] }}")
    ids, alignment = aligned(chatml, [USER], 'the fox|yes')
    assert chatml.decode(ids) == 'yes<|im_end|>' and alignment.characters.tolist() == [8, 10]
    # which of the two it kept cannot be known
    assert aligned(chatml, [USER], 'yes|yes')[1].characters is None


def test_an_alignment_is_of_the_whole_completion_and_only_where_asked_for(chatml):
    whole, alignment = aligned(chatml, [USER], 'the quick brown fox')
    cut, same = aligned(chatml, [USER], 'the quick brown fox', limit=3)
    assert cut == whole[:3] and same.tokens == len(whole)
    assert same.characters.tolist() == alignment.characters.tolist()
    result = tokenized(chatml, [USER], 'no', 'yes')
    assert {side: one.characters for side, one in result.alignments.items()} == {'chosen': None, 'rejected': None}
    assert result.alignments['chosen'].tokens == result.chosen.size


def test_token_counts_of_smollm2_are_those_of_the_golden_file(smollm2, shared_data):
    golden = json.loads((shared_data / 'golden_logps_smollm2.json').read_text())['rows']
    files = {name: read_rows(str(shared_data / f'ci/{name}.jsonl')) for name in {row['file'] for row in golden}}
    for expected in golden:
        counts = []
        for row in files[expected['file']]:
            if row.fields['id'] == expected['id']:  # ids repeat across sources of one file
                result = tokenize(example_of(row.fields), smollm2, 10**6, 10**6)
                assert result.chosen[-1] == smollm2.eos_token_id == smollm2.pad_token_id
                assert result.boundary_mismatches == 0
                counts.append((result.prompt.size, result.chosen.size, result.rejected.size))
        assert (expected['n_prompt'], expected['n_chosen'], expected['n_rejected']) in counts
