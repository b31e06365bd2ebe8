"""One audit of all rows before step 0: every row is kept, or dropped for a reason that is counted and named.

Masks and ends come from lengths and rules, never from token ids, so nothing here depends on a padding token.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np

from jaxpo import config, storage
from jaxpo.data import companions
from jaxpo.data.chat import Tokenized, check_template, check_tokenizer, tokenize
from jaxpo.data.columns import NOTHING, Wanted, check_columns, check_wanted, columns_of, field
from jaxpo.data.rows import check_rows, lengths_of, unfit
from jaxpo.data.sources import Example, Rejection, Row, example_of
from jaxpo.errors import InputError
from jaxpo.types import Pair

REJECTIONS = (
    'not UTF-8',
    'not JSON',
    'wrong shape',
    'empty prompt',
    'empty chosen',
    'empty rejected',
    'empty completion',
    'label is not true or false',
    'unpaired, but the losses need pairs',
    'identical',
    'no common prompt',
    'prompt ends with an assistant turn',
    'completion is not one assistant turn',
    'refused by the chat template',
    'hidden by the chat template',
    'no completion token left',
    'end token inside completion',
    'missing column',
    'token numbers of another length',
    'spans overlap or leave the text',
    'text rewritten by the chat template',
    'corrupted prompt refused',
    'corrupted prompt is the prompt',
    'identical after truncation',
    'longer than a row',
    'duplicate',
)
OVERLAPS = (
    'prompt also in training',
    'pair also in training',
    'prompt also in validation',
    'pair also in validation',
)
NOTES = ('prompt trimmed', 'completion cut', 'boundary mismatch', 'duplicate prompt', 'contradiction', *OVERLAPS)
NAMED_ROWS = 5


@dataclasses.dataclass(frozen=True)
class _Kept:
    pair: Pair
    origin: str
    notes: list[str]


def audit(
    rows: Sequence[Row],
    tokenizer,
    data: config.Data,
    rows_config: config.Rows,
    *,
    wanted: Wanted = NOTHING,
    training: Sequence[Pair] = (),
    validation: Sequence[Pair] = (),
) -> tuple[list[Pair], dict]:
    """Pairs that can be trained on, indexed 0.. in the order of their rows, and a report of all rows.

    Dropped rows are counted under `rejected` by reason; kept rows with something to know about them under
    `noted` (a contradiction prefers what an earlier row rejects).

    Args:
      wanted: what else of the data the objective's losses read; pairs have exactly these columns and companions.
      training: pairs that held-out rows should not share.
      validation: pairs that choose mixing weights, which rows that judge the result should not share.

    Raises:
      InputError: wrong columns or settings, a number that is none, no row left, any row rejected where `bad_rows` is
        'error', more than `max_drop_rate` of them otherwise.
    """
    check_rows(rows_config)
    _check_limits(data)
    check_tokenizer(tokenizer)
    check_wanted(wanted, data.columns)
    check_columns(rows, wanted, data.columns)
    kept, ledger, seen = [], _Ledger(), _Seen({'training': training, 'validation': validation})
    for place, row in enumerate(rows):
        try:
            tokenized, pair = _pair(row, tokenizer, data, wanted)
            _check_pair(pair, rows_config)
            pair = dataclasses.replace(pair, row=place)
            kept.append(_Kept(pair, row.origin, [*_fitting_notes(tokenized), *seen.add(pair)]))
        except Rejection as rejection:
            ledger.reject(row.origin, rejection)
    if 'mismatched' in wanted.companions:
        _enforce(_report(rows, kept, ledger, tokenizer), data)
        kept = _with_mismatched(kept, wanted, rows_config, ledger)
    kept = [dataclasses.replace(one, pair=dataclasses.replace(one.pair, index=i)) for i, one in enumerate(kept)]
    report = _report(rows, kept, ledger, tokenizer)
    _enforce(report, data)
    return [one.pair for one in kept], report


class _Ledger:
    """Origins of rejected rows by reason."""

    def __init__(self):
        self.rejected = {reason: [] for reason in REJECTIONS}

    def reject(self, origin: str, rejection: Rejection) -> None:
        self.rejected[rejection.reason].append(origin + (f' ({rejection.detail})' if rejection.detail else ''))


class _Seen:
    """What earlier rows and the pairs of other splits hold, by the bytes of their ids."""

    def __init__(self, splits: Mapping[str, Sequence[Pair]]):
        self.rows, self.prompts, self.preferences = set(), set(), set()
        self.split_prompts = {split: {pair.prompt.tobytes() for pair in pairs} for split, pairs in splits.items()}
        self.split_pairs = {split: {_preference(pair) for pair in pairs} for split, pairs in splits.items()}

    def add(self, pair: Pair) -> list[str]:
        """Notes about a pair, which is remembered. Rejection: an equal row, columns included, came before."""
        prompt, preference = pair.prompt.tobytes(), _preference(pair)
        row = (preference, *_extras(pair))
        if row in self.rows:
            raise Rejection('duplicate')
        holds = {
            'duplicate prompt': prompt in self.prompts,
            'contradiction': (preference[0], preference[2], preference[1]) in self.preferences,
            **{f'prompt also in {split}': prompt in prompts for split, prompts in self.split_prompts.items()},
            **{f'pair also in {split}': preference in pairs for split, pairs in self.split_pairs.items()},
        }
        self.rows.add(row)
        self.prompts.add(prompt)
        self.preferences.add(preference)
        return [note for note, held in holds.items() if held]


def _preference(pair: Pair) -> tuple[bytes, bytes, bytes]:
    return pair.prompt.tobytes(), pair.chosen.tobytes(), pair.rejected.tobytes()


def _extras(pair: Pair) -> list:
    columns = [np.asarray(value, np.float64).tobytes() for value in pair.columns.values()]
    return columns + [other.prompt.tobytes() for other in pair.companions.values()]


def _check_limits(data: config.Data) -> None:
    for name in ('max_prompt_tokens', 'max_completion_tokens'):
        if getattr(data, name) < 1:
            raise InputError(f'data.{name} must be at least 1, not {getattr(data, name)!r}.')
    if not 0 <= data.max_drop_rate <= 1:
        raise InputError(f'data.max_drop_rate must be from 0 to 1, not {data.max_drop_rate!r}.')


def _pair(row: Row, tokenizer, data: config.Data, wanted: Wanted) -> tuple[Tokenized, Pair]:
    """A row as a pair, its index to be set. Rejection: why it is none."""
    if row.fields is None:
        raise Rejection(row.fault)
    example: Example = example_of(row.fields)
    if not wanted.unpaired and None in (example.chosen, example.rejected):
        raise Rejection('unpaired, but the losses need pairs')
    if not isinstance(example.prompt, str):
        check_template(tokenizer)
    limits = data.max_prompt_tokens, data.max_completion_tokens
    tokenized = tokenize(example, tokenizer, *limits, align=bool(wanted.tokens))
    columns = columns_of(row, tokenized, wanted, data.columns)
    pair = Pair(tokenized.prompt, tokenized.chosen, tokenized.rejected, -1, columns)
    if 'corrupted' in wanted.companions:
        prompt = field(row, data.columns.get('corrupted_prompt', 'corrupted_prompt'))
        other = companions.corrupted(prompt, example, pair, tokenizer, data.max_prompt_tokens)
        pair = dataclasses.replace(pair, companions={'corrupted': other})
    return tokenized, pair


def _with_mismatched(kept: list[_Kept], wanted: Wanted, rows_config: config.Rows, ledger: _Ledger) -> list[_Kept]:
    """Those that are not longer than a row with their mismatched completions, which may be of rows that are."""
    fitting = []
    for one, other in zip(kept, companions.mismatched([one.pair for one in kept])):
        found = {**one.pair.companions, 'mismatched': other}
        pair = dataclasses.replace(one.pair, companions={name: found[name] for name in wanted.companions})
        if unfit(pair, rows_config):
            ledger.reject(one.origin, Rejection('longer than a row', 'with its mismatched completion'))
        else:
            fitting.append(dataclasses.replace(one, pair=pair))
    return fitting


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


def _report(rows: Sequence[Row], kept: Sequence[_Kept], ledger: _Ledger, tokenizer) -> dict:
    pairs = [one.pair for one in kept]
    lengths = lengths_of(pairs)
    companion_names = pairs[0].companions if pairs else ()
    names = ['prompt', 'chosen', 'rejected', *(f'{name}{of}' for name in companion_names for of in ('_prompt', ''))]
    chosen, rejected = lengths[(lengths[:, 1:3] > 0).all(axis=1), 1:3].T
    noted = {note: [one.origin for one in kept if note in one.notes] for note in NOTES}
    return {
        'rows': len(rows),
        'kept': len(pairs),
        'dropped': len(rows) - len(pairs),
        'drop_rate': (len(rows) - len(pairs)) / max(1, len(rows)),
        'rejected': {reason: _named(origins) for reason, origins in ledger.rejected.items()},
        'noted': {note: _named(origins) for note, origins in noted.items()},
        'unpaired': {'chosen': int((lengths[:, 2] == 0).sum()), 'rejected': int((lengths[:, 1] == 0).sum())},
        'tokens': {name: _statistics(column[column > 0]) for name, column in zip(names, lengths.T)},
        'chosen_longer_rate': _rate(chosen > rejected),
        'equal_length_rate': _rate(chosen == rejected),
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


def overlaps(report: dict) -> str:
    """What the rows of a report share with those of other splits, as text; empty where nothing."""
    counts = {note: report['noted'][note]['count'] for note in OVERLAPS}
    return ', '.join(f'{note} ({count})' for note, count in counts.items() if count)


def write_report(path: storage.Path, report: dict) -> None:
    """Writes a report, or several by name, as JSON: the same bytes for the same data."""
    storage.write_text(path, json.dumps(report, indent=2, ensure_ascii=False) + '\n')
