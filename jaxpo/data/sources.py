"""Reads preference rows from files or the hub, and understands the field's formats.

A broken line is not a crash: it is a row with a `fault`, which the audit counts by file and line.
"""

import dataclasses
import difflib
import gzip
import json
import pathlib
import re
import tempfile
import zlib
from collections.abc import Iterator

from jaxpo.errors import InputError, unknown

SUFFIXES = ('.jsonl', '.jsonl.gz', '.parquet')
HUB_ID = re.compile(r'\w[\w-]*|\w[\w.-]*/[\w.-]+')
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Row:
    """One source row: `fields` by column name, or the `fault` that kept it from being read. origin: 'file:line'."""

    origin: str
    fields: dict | None
    fault: str | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One preference in one of two forms: all three plain text; or a list of messages and one message for each
    completion. An unpaired row has one completion, not both."""

    prompt: str | list[Message]
    chosen: str | Message | None
    rejected: str | Message | None


class Rejection(InputError):
    """Why one row cannot be used: a reason the audit counts, and what more is known of this row."""

    def __init__(self, reason: str, detail: str = ''):
        super().__init__(f'{reason}: {detail}' if detail else reason)
        self.reason = reason
        self.detail = detail


def read_rows(source: str, split: str = 'train', revision: str | None = None) -> list[Row]:
    """Rows of a local .jsonl, .jsonl.gz or .parquet file, or of one split of a hub data set; code is never run.

    Local files have neither splits nor revisions. InputError: nothing there, nothing in it, or not readable.
    """
    if not source:
        raise InputError('No data source given: expected a .jsonl, .jsonl.gz or .parquet file or a hub id.')
    path = pathlib.Path(source).expanduser()
    if path.is_dir():
        raise InputError(f'Data source {source!r} is a directory; expected a file ({", ".join(SUFFIXES)}).')
    if path.is_file():
        if revision is not None:
            raise InputError(f'data.revision is only for hub data sets; {source!r} is a file. Leave it unset.')
        rows = _read_file(path)
    elif source.endswith(SUFFIXES) or not HUB_ID.fullmatch(source):
        raise _missing_file(path)
    else:
        rows = _read_hub(source, split, revision)
    if not rows:
        raise InputError(f'Data source {source!r} is empty.')
    return rows


def _missing_file(path: pathlib.Path) -> InputError:
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    hint = f' Did you mean {str(folder / near[0])!r}?' if near else ''
    where = '' if folder.is_dir() else f' (there is no directory {str(folder)!r})'
    return InputError(f'No data file {str(path)!r}{where}.{hint}')


def _read_file(path: pathlib.Path) -> list[Row]:
    if path.name.endswith('.parquet'):
        return _read_parquet(path)
    if path.name.endswith('.jsonl'):
        with path.open('rb') as file:
            return list(_json_rows(file, str(path)))
    if path.name.endswith('.jsonl.gz'):
        try:
            with gzip.open(path, 'rb') as file:
                return list(_json_rows(file, str(path)))
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f'{str(path)!r} is not a whole gzip file: {error}') from error
    raise unknown(f'kind of data file ({path})', ''.join(path.suffixes[-2:]), SUFFIXES)


def _json_rows(file, name: str) -> Iterator[Row]:
    """Rows of a file of JSON lines open as bytes; blank lines are skipped, line numbers start at 1."""
    for number, line in enumerate(file, start=1):
        if number == 1:
            line = line.removeprefix(b'\xef\xbb\xbf')
        if line.strip():
            yield _json_row(line, f'{name}:{number}')


def _json_row(line: bytes, origin: str) -> Row:
    try:
        fields = json.loads(line.decode('utf-8'))
        # JSON can spell half a surrogate pair, which no tokenizer can encode.
        if b'\\ud' in line.lower():
            json.dumps(fields, ensure_ascii=False).encode('utf-8')
    except (UnicodeDecodeError, UnicodeEncodeError):
        return Row(origin, None, 'not UTF-8')
    except (ValueError, RecursionError):
        return Row(origin, None, 'not JSON')
    return Row(origin, fields) if isinstance(fields, dict) else Row(origin, None, 'wrong shape')


def _read_parquet(path: pathlib.Path) -> list[Row]:
    import datasets

    with tempfile.TemporaryDirectory() as cache:
        try:
            dataset = datasets.Dataset.from_parquet(str(path), cache_dir=cache, keep_in_memory=True)
        except Exception as error:  # pyarrow and datasets raise many kinds, all meaning the same here
            raise InputError(f'{str(path)!r} is not a readable parquet file: {_cause(error)}') from error
        return _dataset_rows(dataset, str(path))


def _read_hub(name: str, split: str, revision: str | None) -> list[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # network, unknown id, unknown split, loading script: all are the user's to mend
        raise InputError(
            f'No local file {name!r}, and the hub data set {name!r} (split {split!r}, revision {revision!r}) '
            f'could not be loaded: {_cause(error)}'
        ) from error
    return _dataset_rows(dataset, f'{name}[{split}]')


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f'{type(error).__name__}: {error}'


def _dataset_rows(dataset, name: str) -> list[Row]:
    try:
        return [Row(f'{name}:{number}', fields) for number, fields in enumerate(dataset.to_list(), start=1)]
    except UnicodeDecodeError:
        return [_dataset_row(dataset, number, f'{name}:{number + 1}') for number in range(len(dataset))]


def _dataset_row(dataset, number: int, origin: str) -> Row:
    try:
        return Row(origin, dataset[number])
    except UnicodeDecodeError:
        return Row(origin, None, 'not UTF-8')


def example_of(fields: dict) -> Example:
    """The preference a row states, in any of the field's formats. Rejection: why it states none.

    prompt, chosen, rejected as text; all as messages; a prompt of messages with completions of text (each one
    assistant message); or, without a prompt of messages, whole conversations whose longest common prefix of
    turns is the prompt. A completion of messages is exactly one assistant turn: with more, tokens that nobody
    preferred (a user's) would be scored. A row without chosen and rejected is unpaired: prompt and completion, in
    the same forms, and a label: true makes it a chosen, false a rejected completion.
    """
    if is_unpaired(fields):
        return _unpaired_example(fields)
    prompt, chosen, rejected = (fields.get(name) for name in ('prompt', 'chosen', 'rejected'))
    _check_there(chosen, 'chosen')
    _check_there(rejected, 'rejected')
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise Rejection('wrong shape')
    if chosen == rejected:
        raise Rejection('identical')
    if isinstance(chosen, str):
        if isinstance(prompt, str):
            return Example(prompt, chosen, rejected)
        return Example(prompt_of(prompt), _assistant(chosen), _assistant(rejected))
    chosen, rejected = _messages(chosen), _messages(rejected)
    if prompt is None or isinstance(prompt, str):
        turns = _common_turns(chosen, rejected)
        prompt, chosen, rejected = _split(chosen[:turns], prompt), chosen[turns:], rejected[turns:]
    return Example(prompt_of(prompt), _one_turn(chosen, 'chosen'), _one_turn(rejected, 'rejected'))


def is_unpaired(fields: dict) -> bool:
    """Whether a row has one completion with a label, not two. Columnar files have empty fields for the others."""
    return 'completion' in fields and fields.get('chosen') is None and fields.get('rejected') is None


def _unpaired_example(fields: dict) -> Example:
    completion, label = fields['completion'], fields.get('label')
    _check_there(completion, 'completion')
    if not isinstance(label, bool):
        raise Rejection('label is not true or false', repr(label))
    prompt = prompt_of(fields.get('prompt'))
    if not isinstance(completion, str):
        completion = _one_turn(_messages(completion), 'completion')
        if isinstance(prompt, str):
            raise Rejection('wrong shape')
    elif not isinstance(prompt, str):
        completion = _assistant(completion)
    return Example(prompt, completion, None) if label else Example(prompt, None, completion)


def _check_there(completion, name: str) -> None:
    if completion is None or (isinstance(completion, str) and not completion.strip()) or completion == []:
        raise Rejection(f'empty {name}')


def _assistant(content: str) -> Message:
    return {'role': 'assistant', 'content': content}


def _messages(value) -> list[Message]:
    """`value` as a list of messages, without the empty fields columnar formats add."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Rejection('wrong shape')
    messages = [{key: part for key, part in message.items() if part is not None} for message in value]
    if not all(isinstance(message.get(key), str) for message in messages for key in ('role', 'content')):
        raise Rejection('wrong shape')
    return messages


def prompt_of(prompt) -> str | list[Message]:
    """A prompt as text or as messages, checked. Rejection: it is neither, or no assistant's turn can follow."""
    if isinstance(prompt, str):
        return prompt
    if prompt is None or prompt == []:
        raise Rejection('empty prompt')
    messages = _messages(prompt)
    if messages[-1]['role'] == 'assistant':
        raise Rejection('prompt ends with an assistant turn')
    return messages


def _common_turns(chosen: list[Message], rejected: list[Message]) -> int:
    limit = min(len(chosen), len(rejected))
    return next((turn for turn in range(limit) if chosen[turn] != rejected[turn]), limit)


def _split(common: list[Message], prompt: str | None) -> list[Message]:
    """The implicit prompt; where the row also has a prompt as text, that must be one of its turns."""
    if not common:
        raise Rejection('no common prompt')
    if prompt is not None and prompt.strip() not in {message['content'].strip() for message in common}:
        raise Rejection('wrong shape')
    return common


def _one_turn(completion: list[Message], name: str) -> Message:
    if not completion:
        raise Rejection(f'empty {name}')
    if len(completion) != 1 or completion[0]['role'] != 'assistant':
        raise Rejection('completion is not one assistant turn')
    if not completion[0]['content'].strip():
        raise Rejection(f'empty {name}')
    return completion[0]
