"""The rows of audited pairs as another model's tokenizer and chat template write them: the same texts, other ids."""

import sys
from collections.abc import Sequence

from jaxpo import config
from jaxpo.data.audit import NAMED_ROWS
from jaxpo.data.chat import Tokenized, check_template, check_tokenizer, tokenize
from jaxpo.data.sources import Example, Rejection, Row, example_of
from jaxpo.errors import InputError
from jaxpo.types import Pair

WHOLE = sys.maxsize


def retokenized(
    rows: Sequence[Row], pairs: Sequence[Pair], tokenizer, data: config.Data, *, policy_tokenizer, reference: str
) -> list[Pair]:
    """Prompts and completions of pairs as ids of another tokenizer, whole, in the pairs' order, with index and row.

    A completion ends with the end token that the other template or tokenizer gives it; one that is not there is
    empty. Columns, companions and tables belong to the policy's tokens: these pairs have none. They may be longer
    than a row or than the other model has positions for: that is the caller's to check.

    Args:
      rows: those that `Pair.row` counts.
      pairs: audited with `policy_tokenizer` and `data`.
      reference: the name, for messages, of the reference that reads them.

    Raises:
      InputError: no end token or no chat template to be had; a prompt or completion that was shortened for the
        policy, so that the two would score different texts; a row the other tokenizer or template refuses.
    """
    examples = [_example(rows, pair) for pair in pairs]
    try:
        check_tokenizer(tokenizer)
        if any(not isinstance(example.prompt, str) for example in examples):
            check_template(tokenizer)
    except InputError as error:
        raise InputError(f'references.{reference}: {error}') from error
    _check_whole(rows, pairs, examples, data, policy_tokenizer, reference)
    found, refused = [], []
    for pair, example in zip(pairs, examples):
        try:
            ids = tokenize(example, tokenizer, WHOLE, WHOLE)
            found.append(Pair(ids.prompt, ids.chosen, ids.rejected, pair.index, row=pair.row))
        except Rejection as rejection:
            refused.append(f'{rows[pair.row].origin} ({rejection})')
    if refused:
        raise InputError(
            f'references.{reference}: its tokenizer refuses {_named(refused)}. Leave these rows out, or this reference.'
        )
    return found


def _example(rows: Sequence[Row], pair: Pair) -> Example:
    if not 0 <= pair.row < len(rows):
        raise InputError(f'Pair {pair.index} is of row {pair.row}, but there are the rows 0 to {len(rows) - 1}.')
    return example_of(rows[pair.row].fields)


def _check_whole(
    rows: Sequence[Row],
    pairs: Sequence[Pair],
    examples: Sequence[Example],
    data: config.Data,
    policy_tokenizer,
    reference: str,
) -> None:
    """InputError where the policy's prompt or completions are not the whole text of their row."""
    cut: dict[str, list[tuple[str, int]]] = {'max_prompt_tokens': [], 'max_completion_tokens': []}
    for pair, example in zip(pairs, examples):
        if not _at_a_limit(pair, data):
            continue
        whole = tokenize(example, policy_tokenizer, WHOLE, WHOLE)
        for setting, size, kept in _sizes(whole, pair):
            if size > kept:
                cut[setting].append((rows[pair.row].origin, size))
    for setting, found in cut.items():
        if found:
            origins = list(dict.fromkeys(origin for origin, _ in found))
            raise InputError(
                f'references.{reference} has another tokenizer than the policy and would score other texts: '
                f'data.{setting} {getattr(data, setting)} shortens {_named(origins)}. Raise data.{setting} to '
                f'{max(size for _, size in found)} at least, or leave these rows out.'
            )


def _at_a_limit(pair: Pair, data: config.Data) -> bool:
    """Whether a pair may have been shortened: it cannot where it is shorter than it might be."""
    longest = max(pair.chosen.size, pair.rejected.size)
    return pair.prompt.size >= data.max_prompt_tokens or longest >= data.max_completion_tokens


def _sizes(whole: Tokenized, pair: Pair) -> tuple[tuple[str, int, int], ...]:
    """The setting that limits it, tokens in all and tokens kept: of the prompt and of the longer completion cut."""
    return (
        ('max_prompt_tokens', whole.prompt.size, pair.prompt.size),
        ('max_completion_tokens', whole.chosen.size, pair.chosen.size),
        ('max_completion_tokens', whole.rejected.size, pair.rejected.size),
    )


def _named(origins: Sequence[str]) -> str:
    more = ', ...' if len(origins) > NAMED_ROWS else ''
    return f'{len(origins)} row(s): {", ".join(origins[:NAMED_ROWS])}{more}'
