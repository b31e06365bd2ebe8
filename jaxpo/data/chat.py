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

import jinja2
import numpy as np

from jaxpo.data.sources import Example, Message, Rejection, prompt_of
from jaxpo.errors import InputError

SENTINEL = 'completionGoesHere'


@dataclasses.dataclass(frozen=True)
class Tokenized:
    """Token ids (int32) of a preference, and what had to be done to fit them."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    prompt_trimmed: bool
    completions_cut: int
    boundary_mismatches: int


@dataclasses.dataclass(frozen=True)
class _Prompt:
    text: str
    bare: list[int]  # ids of the text as it is
    ids: np.ndarray  # with the BOS it lacked, trimmed
    trimmed: bool


@dataclasses.dataclass(frozen=True)
class _Answer:
    ids: np.ndarray
    cut: bool
    mismatch: bool


def check_tokenizer(tokenizer) -> None:
    """InputError where the tokenizer has no EOS, without which no plain-text completion could end."""
    if tokenizer.eos_token_id is None:
        raise InputError('The tokenizer has no EOS token: completions could not be ended. Set eos_token.')


def check_template(tokenizer) -> None:
    """InputError where the tokenizer cannot write conversations."""
    if not tokenizer.chat_template:
        raise InputError(
            'The data are conversations (messages), but the tokenizer has no chat template: use a tokenizer that '
            'has one (model.tokenizer), or data whose prompt, chosen and rejected are plain text.'
        )


def prompt_ids(prompt: str | list[Message], tokenizer, max_prompt_tokens: int) -> np.ndarray:
    """Ids [<= max_prompt_tokens] int32 that a completion follows: the same for training and for generation.

    InputError: not a prompt, no template to write it, refused by the template, or no token in it.
    """
    prompt = prompt_of(prompt)
    if not isinstance(prompt, str):
        check_template(tokenizer)
    return _prompt(prompt, tokenizer, max_prompt_tokens).ids


def tokenize(example: Example, tokenizer, max_prompt_tokens: int, max_completion_tokens: int) -> Tokenized:
    """Ids of a preference. Rejection: why it has none."""
    prompt = _prompt(example.prompt, tokenizer, max_prompt_tokens)
    frame = None if isinstance(example.prompt, str) else _frame(example.prompt, tokenizer)
    chosen, rejected = (
        _answer(example.prompt, completion, prompt, frame, tokenizer, max_completion_tokens)
        for completion in (example.chosen, example.rejected)
    )
    return Tokenized(
        prompt.ids,
        chosen.ids,
        rejected.ids,
        prompt.trimmed,
        int(chosen.cut) + int(rejected.cut),
        int(chosen.mismatch) + int(rejected.mismatch),
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


def _ids_apart(text: str, tokenizer) -> list[int]:
    """Ids of a text that continues another: behind a line break, as some tokenizers put a space before a text's
    first word."""
    break_ids = _ids('\n', tokenizer)
    ids = _ids('\n' + text, tokenizer)
    return ids[len(break_ids) :] if ids[: len(break_ids)] == break_ids else _ids(text, tokenizer)


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


def _chat_completion(prompt, message, text, frame, tokenizer) -> tuple[str, bool, bool]:
    """A message as text behind the prompt's `text`; whether it has its end token; whether the headers differ."""
    before, after = frame
    whole = _render([*prompt, message], tokenizer)
    differs = not whole.startswith(text)
    start = before if differs else text
    if not whole.startswith(start) or not whole.endswith(after):
        raise Rejection('hidden by the chat template')
    closing, closed = _closing(after, tokenizer)
    return whole[len(start) : len(whole) - len(after)] + closing, closed, differs


def _answer(prompt, completion, head: _Prompt, frame, tokenizer, limit: int) -> _Answer:
    """Ids of one completion behind its prompt; `frame` is None for plain text."""
    differs = closed = False
    if frame is not None:
        completion, closed, differs = _chat_completion(prompt, completion, head.text, frame, tokenizer)
    whole = _ids(head.text + completion, tokenizer)
    mismatch = whole[: len(head.bare)] != head.bare
    ids = _ids_apart(completion, tokenizer) if mismatch else whole[len(head.bare) :]
    if not closed and ids[-1:] != [tokenizer.eos_token_id]:
        ids = [*ids, tokenizer.eos_token_id]
    if len(ids) < 2:
        raise Rejection('no completion token left')
    if not {ids[-1], tokenizer.eos_token_id}.isdisjoint(ids[:-1]):
        raise Rejection('end token inside completion')
    return _Answer(np.asarray(ids[:limit], np.int32), len(ids) > limit, mismatch or differs)
