"""A study's findings as files for others to read: CSV (a file a table) and JSON, with all digits.

Every number is a field of `Findings`; none is computed here. A number within a number, as the difference within a
comparison, has a name with a dot: `against_baseline.difference`.
"""

import csv
import dataclasses
import io
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxpo.study import findings
from jaxpo.study.findings import Findings

Scalar = str | int | float | bool | None


class Table(NamedTuple):
    """Rows of plain values beneath their names."""

    header: tuple[str, ...]
    rows: tuple[tuple[Scalar, ...], ...]


class Keyed(NamedTuple):
    """One row to be: what it belongs to, and the dataclass that it is."""

    keys: Mapping[str, Scalar]
    value: Any


def to_json(found: Findings) -> str:
    """All findings, strictly JSON: what is no number is null."""
    return json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False, allow_nan=False) + '\n'


def to_csv(table: Table) -> str:
    """Numbers with all digits that they have; an empty cell is no number."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(table.header)
    writer.writerows(['' if value is None else value for value in row] for row in table.rows)
    return text.getvalue()


def tables(found: Findings) -> dict[str, Table]:
    """Name -> table. One that the study has no rows for is left out."""
    kinds = {name: (kind, list(rows)) for name, kind, rows in _sources(found)}
    return {'facts': _facts(found)} | {name: _table(kind, rows) for name, (kind, rows) in kinds.items() if rows}


def _facts(found: Findings) -> Table:
    """What there is one of, by its place in the findings."""
    facts = (('.'.join(path), _value(found, path)) for path in _columns(Findings))
    return Table(('name', 'value'), tuple(fact for fact in facts if fact[1] is not None))


def _sources(found: Findings) -> Iterator[tuple[str, type, Iterable[Keyed]]]:
    """Name, the dataclass of its rows, and they."""
    yield 'methods', findings.MethodDesign, _plain(found.design.methods)
    yield 'progress', findings.Counts, _plain((*found.progress.methods, found.progress.all))
    yield 'leaderboard', findings.LeaderboardRow, _plain(found.leaderboard.rows)
    yield 'against_itself', findings.AgainstItself, _plain([found.against_itself])
    if found.frontier is not None:
        yield from _of_frontier(found.frontier)
    robustness = found.robustness.rows
    yield 'robustness', findings.RobustnessRow, _plain(robustness)
    yield 'profile', findings.ProfilePoint, _within(robustness, 'profile')
    yield (
        'best_of',
        _BestOf,
        (
            Keyed({'method': row.method}, _BestOf(k, value))
            for row in robustness
            for k, value in enumerate(row.best_of, 1)
        ),
    )
    yield 'grid', findings.HeatCell, _within(robustness, 'grid')
    if found.length is not None:
        yield 'length', findings.LengthRow, _plain(found.length.rows)
    if found.health is not None:
        yield 'health', findings.HealthRow, _plain(found.health.rows)
        yield 'calibration', findings.CalibrationBin, _within(found.health.rows, 'calibration')
    if found.learning is not None:
        yield 'learning', findings.CurvePoint, _within(found.learning.curves, 'metric')
        yield 'training_loss', findings.CurvePoint, _within(found.learning.curves, 'loss')
    yield 'compute', findings.ComputeRow, _plain((*found.compute.rows, found.compute.total))
    yield 'versions', findings.Version, _plain(found.provenance.versions)
    yield 'cells', findings.CellLine, _plain(found.provenance.cells)


def _of_frontier(frontier: findings.Frontier) -> Iterator[tuple[str, type, Iterable[Keyed]]]:
    yield 'frontier', findings.MethodFrontier, _plain(frontier.methods)
    yield 'frontier_points', findings.FrontierPoint, _within(frontier.methods, 'points')
    yield 'frontier_fronts', findings.FrontPoint, _within(frontier.methods, 'front')
    yield 'matched_kl', findings.MatchedRow, (Keyed({'kl': at.kl}, row) for at in frontier.matched for row in at.rows)


@dataclasses.dataclass(frozen=True)
class _BestOf:
    k: int
    value: float | None


def _plain(rows: Iterable[Any]) -> list[Keyed]:
    return [Keyed({}, row) for row in rows]


def _within(rows: Iterable[Any], field: str) -> list[Keyed]:
    """What the rows' methods have of this field, one beneath the other."""
    return [Keyed({'method': row.method}, value) for row in rows for value in getattr(row, field)]


def _table(kind: type, rows: Iterable[Keyed]) -> Table:
    rows = list(rows)
    names = tuple(rows[0].keys)
    columns = [*_columns(kind)]
    values = tuple((*row.keys.values(), *(_value(row.value, path) for path in columns)) for row in rows)
    return Table((*names, *('.'.join(path) for path in columns)), values)


def _columns(kind: type) -> Iterator[tuple[str, ...]]:
    """Paths to all plain values of a dataclass. What there are many of, as points, has a table of its own."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        nested = next((one for one in kinds if dataclasses.is_dataclass(one)), None)
        if nested is not None:
            yield from ((field.name, *path) for path in _columns(nested))
        elif typing.get_origin(kinds[0]) is not tuple:
            yield (field.name,)


def _value(row: Any, path: tuple[str, ...]) -> Scalar:
    for name in path:
        row = None if row is None else getattr(row, name)
    return row
