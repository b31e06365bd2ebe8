"""Text and conversations -> token ids, with a defined boundary between prompt and completion.

* Prompt ids are the same for both completions. Completion ids are what follows them in the ids of the whole
  text; where a merge crosses the boundary, the completion's text is tokenised alone, and that is counted.
* A conversation is what its template writes, special tokens included. A plain-text prompt gets the BOS its
  tokenizer adds, unless the text has it already. Completions never get one.
* A whole completion ends with exactly one end token, which is trained: the first control token the template
  writes after the answer, or else EOS. A completion cut at its limit gets none.
* Prompts are trimmed from the left (a BOS the tokenizer adds stays); completions are cut from the right.
"""

import dataclasses
import functools
from typing import NamedTuple

import jinja2
import numpy as np

from jaxpo.data.sources import Example, Message, Rejection, prompt_of
from jaxpo.errors import InputError

SENTINEL = 'completionGoesHere'


@dataclasses.dataclass(frozen=True)
class Alignment:
    """How the tokens of a whole completion, before it is cut, lie in its text."""

    text: str
    tokens: int  # the end token included
    characters: np.ndarray | None
    """[tokens]: place in `text` of each token's first character that is not white space (its first, where all are).
    The end token, and what a template writes behind the text, have the text's last such; what it writes before has
    -1. None where it was not asked for, or the template rewrites the text."""


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Token ids (int32) of a preference, and what had to be done to fit them. A missing completion is empty."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    prompt_trimmed: bool
    completions_cut: int
    boundary_mismatches: int
    alignments: dict[str, Alignment]  # of the completions there are, by `chosen` and `rejected`


@dataclasses.dataclass(frozen=True)
class _Prompt:
    text: str
    bare: list[int]  # ids of the text as it is
    ids: np.ndarray  # with the BOS it lacked, trimmed
    trimmed: bool


class _Body(NamedTuple):
    """Where a completion's own text stands in what is written of it: its characters first..last, from `place` on."""

    place: int
    first: int
    last: int


@dataclasses.dataclass(frozen=True)
class _Written:
    """A completion as text behind its prompt."""

    text: str
    closed: bool  # whether it has its end token
    differs: bool  # whether its template writes something else before it than the prompt
    body: _Body | None  # None where the template rewrites the completion's own text


class _Encoded(NamedTuple):
    """A text that ends with a completion, its ids, and how many of them are in front of the completion."""

    text: str
    ids: list[int]
    ids_before: int


@dataclasses.dataclass(frozen=True)
class _Answer:
    ids: np.ndarray
    cut: bool
    mismatch: bool
    alignment: Alignment


def check_tokenizer(tokenizer) -> None:
    """InputError where the tokenizer has no EOS, without which no plain-text completion could end."""
    if tokenizer.eos_token_id is None:
        raise InputError('The tokenizer has no EOS token: completions could not be ended. Set eos_token.')


def check_template(tokenizer) -> None:
    """InputError where the tokenizer cannot write conversations."""
    if not tokenizer.chat_template:
        raise InputError(
            'The data are conversations (messages), but the tokenizer has no chat template: use a tokenizer that '
            "has one (the model's or the reference's `tokenizer`), or data whose prompt, chosen and rejected are plain "
            'text.'
        )


def prompt_ids(prompt: str | list[Message], tokenizer, max_prompt_tokens: int) -> np.ndarray:
    """Ids [<= max_prompt_tokens] int32 that a completion follows: the same for training and for generation.

    InputError: not a prompt, no template to write it, refused by the template, or no token in it.
    """
    prompt = prompt_of(prompt)
    if not isinstance(prompt, str):
        check_template(tokenizer)
    return _prompt(prompt, tokenizer, max_prompt_tokens).ids


def tokenize(
    example: Example, tokenizer, max_prompt_tokens: int, max_completion_tokens: int, *, align: bool = False
) -> Tokenized:
    """Ids of a preference; with `align`, the characters of its tokens as well. Rejection: why it has none."""
    prompt = _prompt(example.prompt, tokenizer, max_prompt_tokens)
    frame = None if isinstance(example.prompt, str) else _frame(example.prompt, tokenizer)
    sides = {'chosen': example.chosen, 'rejected': example.rejected}
    answers = {
        side: _answer(example.prompt, completion, prompt, frame, tokenizer, max_completion_tokens, align)
        for side, completion in sides.items()
        if completion is not None
    }
    ids = {side: answers[side].ids if side in answers else np.zeros(0, np.int32) for side in sides}
    return Tokenized(
        prompt.ids,
        **ids,
        prompt_trimmed=prompt.trimmed,
        completions_cut=sum(answer.cut for answer in answers.values()),
        boundary_mismatches=sum(answer.mismatch for answer in answers.values()),
        alignments={side: answer.alignment for side, answer in answers.items()},
    )


def _prompt(prompt: str | list[Message], tokenizer, limit: int) -> _Prompt:
    head = []
    if not isinstance(prompt, str):
        text = _render(prompt, tokenizer, add_generation_prompt=True)
    elif adds_bos(tokenizer):
        head, text = [tokenizer.bos_token_id], prompt.removeprefix(tokenizer.bos_token)
    else:
        text = prompt
    bare = _ids(text, tokenizer)
    ids, trimmed = _trimmed(head + bare, tokenizer, limit)
    if not ids.size:
        raise Rejection('empty prompt')
    return _Prompt(text, bare, ids, trimmed)


def _ids(text: str, tokenizer) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, verbose=False)


def _encode_apart(text: str, tokenizer) -> _Encoded:
    """A text that continues another: behind a line break, as some tokenizers put a space before a text's first word."""
    break_ids = _ids('\n', tokenizer)
    ids = _ids('\n' + text, tokenizer)
    if ids[: len(break_ids)] == break_ids:
        return _Encoded('\n' + text, ids, len(break_ids))
    return _Encoded(text, _ids(text, tokenizer), 0)


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer itself puts its BOS in front of a text."""
    first = tokenizer.encode('a', verbose=False)[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _trimmed(ids: list[int], tokenizer, limit: int) -> tuple[np.ndarray, bool]:
    """The last `limit` ids, behind the BOS where the tokenizer adds one: models read worse without it."""
    trimmed = len(ids) > limit
    if trimmed:
        keep = 1 if limit > 1 and ids[0] == tokenizer.bos_token_id and adds_bos(tokenizer) else 0
        ids = ids[:keep] + ids[len(ids) - (limit - keep) :]
    return np.asarray(ids, np.int32), trimmed


def _render(messages: list[Message], tokenizer, *, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise Rejection('refused by the chat template', str(error)) from error


def _frame(prompt: list[Message], tokenizer) -> tuple[str, str]:
    """What the template writes before and after the content of an assistant message that follows `prompt`.

    Found with a placeholder, as content like 'end' may also occur within the template's own text.
    """
    message = {'role': 'assistant', 'content': SENTINEL}
    before, found, after = _render([*prompt, message], tokenizer).rpartition(SENTINEL)
    if not found:
        raise Rejection('hidden by the chat template')
    return before, after


def _closing(after: str, tokenizer) -> tuple[str, bool]:
    """The template's text after an answer, up to its first control token, and whether there is one."""
    controls = _control_tokens(tokenizer, len(tokenizer))
    places = [(after.find(token), -len(token)) for token in controls if token in after]
    if not places:
        return after.rstrip(), False
    start, negative_length = min(places)
    return after[: start - negative_length], True


@functools.lru_cache(maxsize=4)
def _control_tokens(tokenizer, size: int) -> frozenset[str]:
    """Tokens that text is never merged into. `size` notices a grown vocabulary."""
    return frozenset({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens})


def _write_completion(prompt, message, text, frame, tokenizer) -> _Written:
    """A message as text behind the prompt's `text`."""
    before, after = frame
    whole = _render([*prompt, message], tokenizer)
    differs = not whole.startswith(text)
    start = before if differs else text
    if not whole.startswith(start) or not whole.endswith(after):
        raise Rejection('hidden by the chat template')
    closing, closed = _closing(after, tokenizer)
    end = len(whole) - len(after)
    content, kept = message['content'], whole[len(before) : end]
    first, body = content.find(kept), None
    if whole.startswith(before) and first >= 0 and first == content.rfind(kept):  # a template may trim its contents
        body = _Body(len(before) - len(start), first, first + len(kept))
    return _Written(whole[len(start) : end] + closing, closed, differs, body)


def _answer(prompt, completion, head: _Prompt, frame, tokenizer, limit: int, align: bool) -> _Answer:
    """Ids of one completion behind its prompt; `frame` is None for plain text."""
    if frame is None:
        own, written = completion, _Written(completion, False, False, _Body(0, 0, len(completion)))
    else:
        own, written = completion['content'], _write_completion(prompt, completion, head.text, frame, tokenizer)
    text = head.text + written.text
    encoded = _Encoded(text, _ids(text, tokenizer), len(head.bare))
    mismatch = encoded.ids[: len(head.bare)] != head.bare
    if mismatch:
        encoded = _encode_apart(written.text, tokenizer)
    ids = encoded.ids[encoded.ids_before :]
    if not written.closed and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if len(ids) < 2:
        raise Rejection('no completion token left')
    if not {ids[-1], tokenizer.eos_token_id}.isdisjoint(ids[:-1]):
        raise Rejection('end token inside completion')
    characters = _characters(encoded, written, own, len(ids), tokenizer) if align and written.body else None
    alignment = Alignment(own, len(ids), characters)
    return _Answer(np.asarray(ids[:limit], np.int32), len(ids) > limit, mismatch or written.differs, alignment)


def _characters(encoded: _Encoded, written: _Written, own: str, tokens: int, tokenizer) -> np.ndarray:
    """`Alignment.characters` of `tokens` tokens of a completion, of which the encoded text may lack the last."""
    place, first, last = written.body
    places = np.full(tokens, len(written.text))
    found = _first_characters(encoded.text, tokenizer)[encoded.ids_before :]
    places[: len(found)] = np.asarray(found) - (len(encoded.text) - len(written.text))
    places += first - place
    places[places < first] = -1
    places[places >= last] = len(own[:last].rstrip()) - 1
    return places


def _first_characters(text: str, tokenizer) -> list[int]:
    """The place of each token's first character that is not white space; of its first, where all are."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places, done = [], 0
    for start, end in encoding['offset_mapping']:
        if not text[done:start].strip():
            start = min(start, done)  # some tokenizers leave a token's leading space out
        done = max(end, done)
        token = text[start:done]
        places.append(start + len(token) - len(token.lstrip()) if token.strip() else start)
    return places
