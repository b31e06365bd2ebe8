"""Prompts to complete: a file of lines, or the prompts of preference rows."""

import contextlib
import dataclasses
import pathlib

import numpy as np

from jaxpo import config
from jaxpo.data.chat import check_template, prompt_ids
from jaxpo.data.sources import Message, Rejection, example_of, prompt_of, read_rows
from jaxpo.errors import InputError


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as ids (int32) and as text: its last user turn, where it is a conversation."""

    ids: np.ndarray
    text: str
    source: str | list[Message]  # as the data has it


def read_prompts(source: str, data: config.Data, tokenizer) -> list[Prompt]:
    """The distinct prompts of a .txt file (one a line) or of rows (preferences, or `prompt` alone), in order.

    A line is one user turn where the tokenizer writes conversations, plain text elsewhere. InputError: no such file,
    no prompt in it.
    """
    path = pathlib.Path(source).expanduser()
    found = _lines(path, tokenizer) if path.suffix == '.txt' else _rows(source, data)
    prompts, seen = [], set()
    for prompt in found:
        if not isinstance(prompt, str):
            check_template(tokenizer)
        ids = prompt_ids(prompt, tokenizer, data.max_prompt_tokens)
        if ids.size and ids.tobytes() not in seen:
            seen.add(ids.tobytes())
            prompts.append(Prompt(ids, prompt if isinstance(prompt, str) else prompt[-1]['content'], prompt))
    if not prompts:
        raise InputError(f'{source} holds no prompt.')
    return prompts


def _lines(path: pathlib.Path, tokenizer) -> list[str | list[Message]]:
    if not path.is_file():
        raise InputError(f'There is no file of prompts {str(path)!r}.')
    try:
        lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f'{path} is not UTF-8: {error}.') from None
    texts = [line for line in lines if line]
    return [[{'role': 'user', 'content': text}] for text in texts] if tokenizer.chat_template else texts


def _rows(source: str, data: config.Data) -> list[str | list[Message]]:
    """Prompts of the rows that have one; the audit says what is wrong with the others."""
    prompts = []
    for row in read_rows(source, data.evaluation_split, data.revision):
        with contextlib.suppress(Rejection):
            if row.fields is not None:
                prompts.append(_prompt(row.fields))
    return prompts


def _prompt(fields: dict) -> str | list[Message]:
    """The prompt of a preference, or of a row that has nothing else. Rejection: it has none."""
    return example_of(fields).prompt if 'chosen' in fields else prompt_of(fields.get('prompt'))
