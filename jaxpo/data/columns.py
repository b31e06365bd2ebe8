"""What the objective's losses read of the data beside prompts and completions, by name, and the numbers of each row.

A token column describes one completion, in either of two ways: one number for each of its tokens, the end token
included; or spans `[start, end, value]` of characters (Unicode code points) of its text, whatever the tokenizer. A
token has the value of the span that holds its first character that is not white space, and 0 outside all spans (an
empty list has none). The end token, and what a chat template writes behind the text, belong to the text's last such
character.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxpo.data.chat import Alignment, Tokenized
from jaxpo.data.sources import Rejection, Row
from jaxpo.errors import InputError, unknown

COMPANIONS = {'mismatched': (), 'corrupted': ('corrupted_prompt',)}
"""Further sequences that can be scored with each pair, and the columns each of them is made of."""
SIDES = ('chosen', 'rejected')
LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What an objective reads of the data."""

    numbers: tuple[str, ...] = ()
    """Columns with one number a row: `margin`, or `chosen_score` and `rejected_score`."""
    tokens: tuple[str, ...] = ()
    """Columns with one number a completion token: `chosen_segment` and `rejected_segment`."""
    companions: tuple[str, ...] = ()
    """Of COMPANIONS."""
    unpaired: bool = False
    """Whether rows with one completion are taken."""

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read, as the losses name them."""
        further = (column for name in self.companions for column in COMPANIONS[name])
        return (*self.numbers, *self.tokens, *further)


NOTHING = Wanted()


def check_wanted(wanted: Wanted, renamed: Mapping[str, str]) -> None:
    """InputError for a companion there is not, a token column of no completion, or a renamed column nobody reads."""
    for name in wanted.companions:
        if name not in COMPANIONS:
            raise unknown('companion', name, COMPANIONS)
    for name in wanted.tokens:
        if not name.startswith(('chosen_', 'rejected_')):
            raise InputError(
                f'The token column {name!r} must start with chosen_ or rejected_, whose tokens it describes.'
            )
    for name in renamed:
        if name not in wanted.columns:
            raise InputError(
                f'data.columns renames {name!r}, which no loss of the objective reads.{_hint(name, wanted.columns)} '
                f'They read: {", ".join(wanted.columns) or "none"}.'
            )


def check_columns(rows: Sequence[Row], wanted: Wanted, renamed: Mapping[str, str]) -> None:
    """InputError where no row at all has a needed column, text has no prompt, or no row is a pair but must be."""
    readable = [row for row in rows if row.fields is not None]
    if not readable:
        return
    origin, found = readable[0].origin, sorted({name for row in readable for name in row.fields})
    unpaired = 'completion' in found and not {'chosen', 'rejected'} & set(found)
    if unpaired and not wanted.unpaired:
        raise InputError(
            f'{origin}: all rows are unpaired (prompt, completion, label), but the losses of the objective need pairs '
            '(prompt, chosen, rejected). Choose losses that take unpaired rows, or other data.'
        )
    completions = ('completion', 'label') if unpaired else SIDES
    expected = ('prompt', *completions, *(renamed.get(name, name) for name in wanted.columns))
    for name in (*completions, *wanted.columns):
        _check_found(name, renamed, found, expected, origin)
    first = next((row for row in readable if isinstance(row.fields.get(completions[0]), str)), None)
    if first is not None and 'prompt' not in found:
        raise InputError(
            f'{first.origin}: plain-text {" and ".join(completions)} need a column prompt (only whole conversations, '
            f'as messages, may leave it out). Found: {", ".join(found)}.'
        )


def _check_found(name: str, renamed: Mapping[str, str], found: list[str], expected: Sequence[str], origin: str) -> None:
    source = renamed.get(name, name)
    if source in found:
        return
    needed = f' (data.columns says so for {name!r})' if name in renamed else ''
    raise InputError(
        f'{origin}: no column {source!r}{needed}.{_hint(source, found)} Found: {", ".join(found) or "none"}. '
        f'Expected: {", ".join(expected)}.'
    )


def _hint(name: str, choices: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f' Did you mean {near[0]!r}?' if near else ''


def columns_of(row: Row, tokenized: Tokenized, wanted: Wanted, renamed: Mapping[str, str]) -> dict[str, Any]:
    """Numbers of a row by wanted name: a float, or a float32 vector with one number for each token of a completion.

    A completion that an unpaired row lacks has 0, or no tokens. Rejection: the row lacks a column, or its token
    numbers do not fit the completion. InputError: what stands there is something else than finite float32 numbers.
    """
    values: dict[str, Any] = {}
    for name in wanted.numbers:
        there = _side(name) is None or _side(name) in tokenized.alignments
        values[name] = _number(row, renamed.get(name, name)) if there else 0.0
    for name in wanted.tokens:
        side, values[name] = _side(name), np.zeros(0, np.float32)
        if side in tokenized.alignments:
            whole = _token_numbers(row, renamed.get(name, name), tokenized.alignments[side])
            values[name] = whole[: getattr(tokenized, side).size]
    return values


def _side(name: str) -> str | None:
    """The completion a column is about; None where it is about the pair."""
    return next((side for side in SIDES if name.startswith(f'{side}_')), None)


def field(row: Row, column: str):
    """What a row has in a column. Rejection: nothing."""
    value = row.fields.get(column)
    if value is None:
        raise Rejection('missing column', column)
    return value


def _is_number(value) -> bool:
    """Whether a value is a finite float32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _number(row: Row, column: str) -> float:
    value = field(row, column)
    if not _is_number(value):
        raise InputError(f'{row.origin}: column {column!r} must be a finite number, not {str(value)[:80]}.')
    return float(value)


def _token_numbers(row: Row, column: str, alignment: Alignment) -> np.ndarray:
    """[tokens before any cut] float32"""
    values = field(row, column)
    if isinstance(values, list) and values and all(map(_is_number, values)):
        if len(values) != alignment.tokens:
            raise Rejection(
                'token numbers of another length',
                f'{column}: {len(values)} for {alignment.tokens} tokens, end token included',
            )
        return np.asarray(values, np.float32)
    if isinstance(values, list) and all(map(_is_span, values)):
        return _of_spans(values, column, alignment)
    raise InputError(
        f'{row.origin}: column {column!r} must be a list of finite numbers, one for each token of the completion, or '
        f'of spans [start, end, value], not {str(values)[:80]}.'
    )


def _is_span(value) -> bool:
    if not isinstance(value, list) or len(value) != 3 or not all(map(_is_number, value)):
        return False
    return all(place == int(place) for place in value[:2])  # columnar files make floats of them


def _of_spans(spans: list[list[float]], column: str, alignment: Alignment) -> np.ndarray:
    if alignment.characters is None:
        raise Rejection('text rewritten by the chat template', column)
    by_character = np.zeros(len(alignment.text) + 1, np.float32)  # the last one is for tokens before the text
    done = 0
    for start, end, value in sorted(spans):
        if not done <= start < end <= len(alignment.text):
            where = f'{column}: [{start:.0f}, {end:.0f}] of {len(alignment.text)} characters'
            raise Rejection('spans overlap or leave the text', where)
        by_character[int(start) : int(end)] = value
        done = end
    return by_character[alignment.characters]
