"""One audit of all rows before step 0: every row is kept, or dropped for a reason that is counted and named.

Masks and ends come from lengths and rules, never from token ids, so nothing here depends on a padding token.
"""

import json
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxpo import config
from jaxpo.data.chat import Tokenized, check_template, check_tokenizer, tokenize
from jaxpo.data.rows import check_rows, lengths_of, unfit
from jaxpo.data.sources import Example, Rejection, Row, check_columns, example_of, numeric_columns
from jaxpo.errors import InputError
from jaxpo.types import Pair

REJECTIONS = (
    'not UTF-8',
    'not JSON',
    'wrong shape',
    'empty prompt',
    'empty chosen',
    'empty rejected',
    'identical',
    'no common prompt',
    'prompt ends with an assistant turn',
    'completion is not one assistant turn',
    'refused by the chat template',
    'hidden by the chat template',
    'no completion token left',
    'end token inside completion',
    'identical after truncation',
    'longer than a row',
    'duplicate',
)
NOTES = (
    'prompt trimmed',
    'completion cut',
    'boundary mismatch',
    'duplicate prompt',
    'contradiction',
    'prompt also in training',
    'pair also in training',
)
NAMED_ROWS = 5


def audit(
    rows: Sequence[Row],
    tokenizer,
    data: config.Data,
    rows_config: config.Rows,
    *,
    training: Sequence[Pair] = (),
) -> tuple[list[Pair], dict]:
    """Pairs that can be trained on, indexed 0.. in the order of their rows, and a report of all rows.

    Dropped rows are counted under `rejected` by reason; kept rows with something to know about them under
    `noted` (a contradiction prefers what an earlier row rejects). `training`: pairs that held-out rows should
    not share. InputError: wrong columns or settings, no row left, any row rejected where `bad_rows` is 'error',
    more than `max_drop_rate` of them otherwise.
    """
    check_rows(rows_config)
    _check_limits(data)
    check_tokenizer(tokenizer)
    check_columns(rows, data.columns)
    pairs, ledger, seen = [], _Ledger(), _Seen(training)
    for row in rows:
        try:
            tokenized = _tokenized(row, tokenizer, data)
            pair = Pair(
                prompt=tokenized.prompt,
                chosen=tokenized.chosen,
                rejected=tokenized.rejected,
                index=len(pairs),
                columns=numeric_columns(row, data.columns),
            )
            _check_pair(pair, rows_config)
            notes = [*_fitting_notes(tokenized), *seen.add(pair)]
        except Rejection as rejection:
            detail = f' ({rejection.detail})' if rejection.detail else ''
            ledger.rejected[rejection.reason].append(row.origin + detail)
            continue
        pairs.append(pair)
        for note in notes:
            ledger.noted[note].append(row.origin)
    report = _report(rows, pairs, ledger, tokenizer)
    _enforce(report, data)
    return pairs, report


class _Ledger:
    """Origins of rows by reason."""

    def __init__(self):
        self.rejected = {reason: [] for reason in REJECTIONS}
        self.noted = {note: [] for note in NOTES}


class _Seen:
    """What earlier rows and the training pairs hold, by the bytes of their ids."""

    def __init__(self, training: Sequence[Pair]):
        self.rows, self.prompts, self.preferences = set(), set(), set()
        self.training_prompts = {pair.prompt.tobytes() for pair in training}
        self.training_pairs = {_preference(pair) for pair in training}

    def add(self, pair: Pair) -> list[str]:
        """Notes about a pair, which is remembered. Rejection: an equal row, extra columns included, came before."""
        prompt, preference = pair.prompt.tobytes(), _preference(pair)
        row = (preference, tuple(pair.columns.items()))
        if row in self.rows:
            raise Rejection('duplicate')
        holds = {
            'duplicate prompt': prompt in self.prompts,
            'contradiction': (preference[0], preference[2], preference[1]) in self.preferences,
            'prompt also in training': prompt in self.training_prompts,
            'pair also in training': preference in self.training_pairs,
        }
        self.rows.add(row)
        self.prompts.add(prompt)
        self.preferences.add(preference)
        return [note for note, held in holds.items() if held]


def _preference(pair: Pair) -> tuple[bytes, bytes, bytes]:
    return pair.prompt.tobytes(), pair.chosen.tobytes(), pair.rejected.tobytes()


def _check_limits(data: config.Data) -> None:
    for name in ('max_prompt_tokens', 'max_completion_tokens'):
        if getattr(data, name) < 1:
            raise InputError(f'data.{name} must be at least 1, not {getattr(data, name)!r}.')
    if not 0 <= data.max_drop_rate <= 1:
        raise InputError(f'data.max_drop_rate must be from 0 to 1, not {data.max_drop_rate!r}.')


def _tokenized(row: Row, tokenizer, data: config.Data) -> Tokenized:
    if row.fields is None:
        raise Rejection(row.fault)
    example: Example = example_of(row.fields)
    if not isinstance(example.prompt, str):
        check_template(tokenizer)
    return tokenize(example, tokenizer, data.max_prompt_tokens, data.max_completion_tokens)


def _check_pair(pair: Pair, rows_config: config.Rows) -> None:
    if np.array_equal(pair.chosen, pair.rejected):
        raise Rejection('identical after truncation')
    if unfit(pair, rows_config):
        raise Rejection('longer than a row')


def _fitting_notes(tokenized: Tokenized) -> list[str]:
    holds = {
        'prompt trimmed': tokenized.prompt_trimmed,
        'completion cut': tokenized.completions_cut > 0,
        'boundary mismatch': tokenized.boundary_mismatches > 0,
    }
    return [note for note, held in holds.items() if held]


def _report(rows: Sequence[Row], pairs: Sequence[Pair], ledger: _Ledger, tokenizer) -> dict:
    lengths = lengths_of(pairs)
    return {
        'rows': len(rows),
        'kept': len(pairs),
        'dropped': len(rows) - len(pairs),
        'drop_rate': (len(rows) - len(pairs)) / max(1, len(rows)),
        'rejected': {reason: _named(origins) for reason, origins in ledger.rejected.items()},
        'noted': {note: _named(origins) for note, origins in ledger.noted.items()},
        'tokens': {
            name: _statistics(lengths[:, column]) for column, name in enumerate(('prompt', 'chosen', 'rejected'))
        },
        'chosen_longer_rate': _rate(lengths[:, 1] > lengths[:, 2]),
        'equal_length_rate': _rate(lengths[:, 1] == lengths[:, 2]),
        'unknown_token_rate': _unknown_rate(pairs, tokenizer.unk_token_id),
    }


def _named(origins: list[str]) -> dict:
    return {'count': len(origins), 'rows': origins[:NAMED_ROWS]}


def _statistics(counts: np.ndarray) -> dict[str, float]:
    if not counts.size:
        return {}
    statistics = {
        'min': counts.min(),
        'median': np.median(counts),
        'mean': counts.mean(),
        'p95': np.percentile(counts, 95),
        'max': counts.max(),
    }
    return {name: round(float(value), 3) for name, value in statistics.items()}


def _rate(mask: np.ndarray) -> float:
    return round(float(mask.mean()), 6) if mask.size else 0.0


def _unknown_rate(pairs: Sequence[Pair], unknown_id: int | None) -> float:
    """Share of unknown tokens; 0 where the tokenizer knows everything."""
    ids = [part for pair in pairs for part in (pair.prompt, pair.chosen, pair.rejected)]
    return _rate(np.concatenate(ids) == unknown_id) if ids and unknown_id is not None else 0.0


def _enforce(report: dict, data: config.Data) -> None:
    dropped, rate = report['dropped'], report['drop_rate']
    if not report['kept']:
        problem = 'no row can be used'
    elif dropped and data.bad_rows == 'error':
        problem = "there are bad rows and data.bad_rows is 'error'"
    elif rate > data.max_drop_rate:
        problem = f'{rate:.1%} of rows would be dropped, more than data.max_drop_rate {data.max_drop_rate:.1%}'
    else:
        return
    raise InputError(f'Data refused: {problem}.\n{table(report)}')


def table(report: dict) -> str:
    """The report's reasons as text: one line each, with the first rows of that reason."""
    lines = [f'{report["rows"]} rows: {report["kept"]} kept, {report["dropped"]} dropped']
    for part in ('rejected', 'noted'):
        lines += [
            f'  {entry["count"]:7d}  {reason} ({part}): {", ".join(entry["rows"])}'
            for reason, entry in report[part].items()
            if entry['count']
        ]
    return '\n'.join(lines)


def write_report(path: str | pathlib.Path, report: dict) -> None:
    """Writes a report, or several by name, as JSON: the same bytes for the same data."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
