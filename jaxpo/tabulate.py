"""Tables of references, filled and read: every log-probability of a frozen model is computed once, for all runs.

Several processes compute together, process 0 writes, and all read: `config.tables` must be a directory they share.
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxpo import config, processes, sharding, step, storage
from jaxpo.console import progress
from jaxpo.data import rows
from jaxpo.data.retokenize import retokenized
from jaxpo.errors import InputError
from jaxpo.loading import load_frozen
from jaxpo.models.identity import weights_identity
from jaxpo.references.table import Table, open_table, sequence_key
from jaxpo.run import Pairs, Run
from jaxpo.scoring import FrozenModel, Models
from jaxpo.types import Pair

SPLITS = ('train', 'validation', 'evaluation')
SECONDS_BETWEEN_SHARDS = 60.0
LENGTH_STEP = 128  # tokens: rows for pairs longer than all of `rows.lengths` come in multiples of it


class Filled(NamedTuple):
    """What was found in the tables of one reference and what was computed."""

    reference: str
    completions: int
    computed: int
    seconds: float
    directories: tuple[storage.Path, ...]


class _Place(NamedTuple):
    """One completion that a table has to know: of which pair, and its name there."""

    pair: int
    completion: str
    key: bytes


def attach(run: Run, pairs: Pairs) -> tuple[Pairs, list[Filled]]:
    """Pairs with what the tables of the run's references say of their tokens; what is missing is computed first.

    Raises:
      InputError: a damaged table, a text that a reference's own tokenizer cannot read whole, or one too long for it.
    """
    filled = []
    for name in run.held('table'):
        pairs, found = _attach_one(run, name, pairs)
        filled.append(found)
    return pairs, filled


def missing(run: Run, pairs: Pairs) -> list[Filled]:
    """What `attach` would compute; reads tables and computes nothing."""
    found = []
    for name in run.held('table'):
        own = {split: _own_pairs(run, name, pairs, split) for split in SPLITS}
        tables = _open(run, name)
        places = [place for split in SPLITS for place in _places(own[split])]
        directories = tuple(table.directory for table in tables.values())
        found.append(Filled(name, len(places), len(_absent(tables, places)), 0.0, directories))
    return found


def _attach_one(run: Run, name: str, pairs: Pairs) -> tuple[Pairs, Filled]:
    started = time.monotonic()
    own = {split: _own_pairs(run, name, pairs, split) for split in SPLITS}
    tables = _open(run, name)
    everything = [pair for split in SPLITS for pair in own[split]]
    computed = _fill(run, name, tables, everything)
    splits = {split: _told(run, name, tables, getattr(pairs, split), own[split]) for split in SPLITS}
    directories = tuple(table.directory for table in tables.values())
    seconds = time.monotonic() - started
    filled = Filled(name, len(_places(everything)), computed, seconds, directories)
    return dataclasses.replace(pairs, **splits), filled


def statistics_of(run: Run, name: str) -> tuple[str, ...]:
    """The numbers that the objective reads of a reference, as tables name them."""
    entropy = 'reference_entropy' in run.objective.needs.statistics and name in run.objective.references
    return ('logps', 'entropy') if entropy else ('logps',)


def _open(run: Run, name: str) -> dict[str, Table]:
    adapter = run.adapter_of(name)
    weights = weights_identity(run.pretrained_of(name), adapter and pathlib.Path(adapter), run.config.train.seed)
    identity = {'model': weights, 'dtype': run.config.model.dtype}
    return {statistic: open_table(run.config.tables, identity, statistic) for statistic in statistics_of(run, name)}


def _own_pairs(run: Run, name: str, pairs: Pairs, split: str) -> list[Pair]:
    """The pairs of a split as a reference reads them: as they are, or written with its own tokenizer."""
    policys = getattr(pairs, split)
    if name not in run.reference_tokenizers or not policys:
        return policys
    tokenizer = run.reference_tokenizers[name]
    own = retokenized(
        pairs.rows[split], policys, tokenizer, run.config.data, policy_tokenizer=run.tokenizer, reference=name
    )
    longest = max(pair.prompt.size + max(pair.chosen.size, pair.rejected.size) for pair in own)
    room = run.pretrained_of(name).architecture.max_positions
    if longest > room:
        raise InputError(
            f'references.{name}: a prompt with its completion takes {longest} of its tokens, but it has {room} '
            'positions. Leave out the longest rows, or this reference.'
        )
    return own


def _completions_of(pair: Pair) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Prompt and completion of all that is scored with a pair, by name."""
    further = {name: (other.prompt, other.completion) for name, other in pair.companions.items()}
    return {'chosen': (pair.prompt, pair.chosen), 'rejected': (pair.prompt, pair.rejected), **further}


def _places(pairs: Sequence[Pair]) -> list[_Place]:
    return [
        _Place(place, name, sequence_key(prompt, completion))
        for place, pair in enumerate(pairs)
        for name, (prompt, completion) in _completions_of(pair).items()
        if completion.size
    ]


def _fill(run: Run, name: str, tables: Mapping[str, Table], pairs: Sequence[Pair]) -> int:
    """Computes what the tables lack; returns how many completions that were."""
    places = _places(pairs)
    # Process 0 says what is absent: another, a moment later, may find rows that a third run has written meanwhile.
    absent = {bytes.fromhex(key) for key in processes.decide(lambda: _absent(tables, places))}
    if not absent:
        return 0
    processes.decide(next(iter(tables.values())).check_writable)
    wanted = [pairs[place] for place in sorted({place.pair for place in places if place.key in absent})]
    # Neighbours of one length: few shapes, and little padding.
    wanted = sorted((_bare(pair) for pair in wanted), key=lambda pair: -_tokens(pair, run.config.rows.layout))
    compute = _computer(run, name, tuple(tables), wanted)
    batch, found, last = run.config.train.batch_pairs, {}, time.monotonic()
    with progress(len(wanted), what=f'pair for the table of {name}') as show:
        for start in range(0, len(wanted), batch):
            part = wanted[start : start + batch]
            found |= {key: values for key, values in compute(part).items() if key in absent}
            done = start + len(part)
            if done == len(wanted) or time.monotonic() - last > SECONDS_BETWEEN_SHARDS:
                _write(tables, found)
                found, last = {}, time.monotonic()
            show(done, {})
    processes.wait_for_all('reference table written')
    return len(absent)


def _absent(tables: Mapping[str, Table], places: Sequence[_Place]) -> list[str]:
    keys = [place.key for place in places]
    return sorted({key.hex() for table in tables.values() for key in table.missing(keys)})


def _bare(pair: Pair) -> Pair:
    return dataclasses.replace(pair, columns={}, table={})


def _tokens(pair: Pair, layout: str) -> int:
    return int(rows.row_tokens(rows.lengths_of([pair]), layout)[0])


def _computer(run: Run, name: str, statistics: tuple[str, ...], pairs: Sequence[Pair]):
    """A function of a list of pairs: key -> statistic -> vector. It holds the reference's weights."""
    model = run.models.frozen[name]
    models = Models(run.decoder, {name: FrozenModel(model.decoder, 'own')}, run.mesh)
    frozen = {'base': {}, 'references': {name: load_frozen(run, name)}}
    table_step = jax.jit(step.make_table_step(models, name, statistics), out_shardings=sharding.replicated(run.mesh))
    settings = _rows_for(run.config.rows, _tokens(pairs[0], run.config.rows.layout))

    def compute(part: Sequence[Pair]) -> dict[bytes, dict[str, np.ndarray]]:
        numbered = [dataclasses.replace(pair, index=place) for place, pair in enumerate(part)]
        host = rows.fill_rows(numbered, settings, row_multiple=run.row_multiple)
        told = jax.device_get(table_step(frozen, sharding.put(host, run.mesh, sharding.MICROBATCHES)))
        return _by_key(numbered, host.pair_index, told)

    return compute


def _rows_for(settings: config.Rows, longest: int) -> config.Rows:
    """The run's rows, and one length more where the longest pair fits none of them."""
    if longest <= max(settings.lengths):
        return settings
    return dataclasses.replace(settings, lengths=(*settings.lengths, -(-longest // LENGTH_STEP) * LENGTH_STEP))


def _by_key(pairs: Sequence[Pair], pair_index: np.ndarray, told) -> dict[bytes, dict[str, np.ndarray]]:
    found = {}
    for microbatch, row, slot in zip(*np.nonzero(pair_index >= 0)):
        pair = pairs[pair_index[microbatch, row, slot]]
        for name, (prompt, completion) in _completions_of(pair).items():
            values = {
                statistic: np.array(array[microbatch, row, slot, : completion.size])
                for statistic, array in told[name].items()
            }
            found[sequence_key(prompt, completion)] = values
    return found


def _write(tables: Mapping[str, Table], found: Mapping[bytes, Mapping[str, np.ndarray]]) -> None:
    if jax.process_index() == 0:
        for statistic, table in tables.items():
            table.write(list(found), [values[statistic] for values in found.values()])


def _told(run: Run, name: str, tables: Mapping[str, Table], pairs: Sequence[Pair], own: Sequence[Pair]) -> list[Pair]:
    """The policy's pairs with what the tables say of them."""
    places = _places(own)
    for table in tables.values():
        table.missing(place.key for place in places)  # looks again: another process may have written them
    values = {statistic: table.read(place.key for place in places) for statistic, table in tables.items()}
    found: list[dict[str, dict[str, np.ndarray]]] = [{} for _ in own]
    for number, place in enumerate(places):
        found[place.pair][place.completion] = {statistic: vectors[number] for statistic, vectors in values.items()}
    spread = functools.partial(_spread, apart=name in run.reference_tokenizers)
    return [_with_table(pair, name, tuple(tables), told, spread) for pair, told in zip(pairs, found)]


def _with_table(pair: Pair, name: str, statistics: tuple[str, ...], told, spread) -> Pair:
    nothing = {statistic: np.zeros(0, np.float32) for statistic in statistics}
    table = {
        completion: {**pair.table.get(completion, {}), name: spread(told.get(completion, nothing), ids.size)}
        for completion, (_, ids) in _completions_of(pair).items()
    }
    return dataclasses.replace(pair, table=table)


def _spread(told: Mapping[str, np.ndarray], tokens: int, *, apart: bool) -> dict[str, np.ndarray | float]:
    """A completion's numbers by the policy's tokens: those of another tokenizer as their sum, evenly."""
    if not apart:
        return dict(told)
    length = told['logps'].size
    total = told['logps'].astype(np.float64).sum()
    return {'logps': np.full(tokens, total / max(tokens, 1), np.float32), 'length': float(length)}
