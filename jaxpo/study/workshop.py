"""What the cells of a study of language models share, opened and compiled once: models, pairs, tables, programs."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxpo import evaluate, loading, tabulate
from jaxpo import objective as objectives
from jaxpo.config import Config
from jaxpo.data import rows
from jaxpo.data.rows import Shape, lengths_of, row_tokens
from jaxpo.errors import InputError
from jaxpo.evaluate import Evaluator, Sampled
from jaxpo.experiment import Experiment, Reward
from jaxpo.run import Pairs, Run, Schedule, prepare, read_pairs, wanted_of
from jaxpo.study import heldout, programs, union
from jaxpo.study.bundles import Bundle
from jaxpo.study.design import Cell, Study
from jaxpo.study.heldout import HeldOut
from jaxpo.study.programs import Programs


@dataclasses.dataclass(frozen=True)
class Shop:
    """What bundles of one kind share."""

    run: Run  # of the kind's union of objectives; on one device where cells are side by side
    pairs: Pairs
    held: HeldOut
    programs: Programs
    evaluator: Evaluator | None  # where prompts are sampled
    shape: Shape | None  # of every batch, where cells are side by side
    weights: dict[str, Any]  # the policy as it starts
    first_samples: dict[int, list[Sampled]] = dataclasses.field(default_factory=dict)
    """Of the policy as it starts, by seed."""


@dataclasses.dataclass
class Workshop:
    """The shops of a study, and what several of them share. Opened when they are first asked for."""

    study: Study
    path: pathlib.Path  # of the experiment
    reward: Reward | None
    told: Callable[[Sequence[tabulate.Filled]], None]  # what was done to tables of references
    _runs: dict[tuple[str, bool], Run] = dataclasses.field(default_factory=dict)
    _shops: dict[str, Shop] = dataclasses.field(default_factory=dict)
    _pairs: dict[str, Pairs] = dataclasses.field(default_factory=dict)
    _weights: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def check(self, bundle: Bundle) -> Run:
        """The run of a bundle's kind. InputError for what cannot be trained, before anything is."""
        run = self._prepared(bundle)
        if not run.config.data.evaluation:
            raise InputError('study: data.evaluation names no held-out pairs: there is nothing to compare cells by.')
        heldout.hold_out(run.config.rows, self._read(run).evaluation, [], self.study.selection_share)
        return run

    def schedule(self, bundle: Bundle, cell: Cell) -> Schedule:
        """Which pairs each step of a cell takes."""
        return Schedule(cell.config.train, len(self._read(self._prepared(bundle)).train))

    def tokens(self, bundle: Bundle, cell: Cell) -> int:
        """Tokens of all rows that a cell trains on, padding left out."""
        schedule = self.schedule(bundle, cell)
        by_pair = row_tokens(lengths_of(self._read(self._prepared(bundle)).train), cell.config.rows.layout)
        return int(sum(by_pair[schedule.pairs_of(step)].sum() for step in range(schedule.steps)))

    def shop(self, bundle: Bundle) -> Shop:
        """What the bundle's kind shares. Reference tables are filled here."""
        if bundle.kind not in self._shops:
            self._shops[bundle.kind] = self._opened(bundle)
        return self._shops[bundle.kind]

    def _prepared(self, bundle: Bundle, devices: Sequence[jax.Device] | None = None) -> Run:
        key = (bundle.kind, devices is None)
        if key not in self._runs:
            self._runs[key] = self._made(bundle, devices)
        return self._runs[key]

    def _made(self, bundle: Bundle, devices: Sequence[jax.Device] | None) -> Run:
        config, whole = bundle.cells[0].config, bundle.whole
        # Losses that read no reference leave the tables of a study unread.
        references = {n: one for n, one in config.references.items() if whole.runs_references or not one.table}
        mixture = {name: spec for name, spec in config.objective.items() if name == objectives.MIXTURE}
        objective = {**mixture, **union.specification(whole)}
        config = dataclasses.replace(config, references=references, objective=objective)
        run = prepare(Experiment(self.path, config, self.reward), devices)
        measured = tuple(name for name in whole.references if name in references)
        return dataclasses.replace(run, objective=dataclasses.replace(whole, references=measured))

    def _opened(self, bundle: Bundle) -> Shop:
        many, run = bundle.at_once > 1, self._prepared(bundle)
        pairs = self._pairs_of(run)
        run = self._prepared(bundle, jax.local_devices()[:1]) if many else run
        share = self.study.selection_share
        held = heldout.hold_out(run.config.rows, pairs.evaluation, pairs.train, share, run.row_multiple)
        evaluator = evaluate.make_evaluator(run, []) if run.config.evaluate.sample_prompts else None
        made = programs.of_many(run, self.study.lanes) if many else programs.of_one(run)
        shape = _largest_shape(run.config, bundle.peers, pairs) if many else None
        return Shop(run, pairs, held, made, evaluator, shape, self._weights_of(run))

    def _read(self, run: Run) -> Pairs:
        """The pairs as they are read and tokenised, once for all kinds that read the same of them."""
        held = run.config
        key = repr((held.model, held.references, held.data, held.rows, held.evaluate, wanted_of(run.objective)))
        if key not in self._pairs:
            self._pairs[key] = read_pairs(run)
        return self._pairs[key]

    def _pairs_of(self, run: Run) -> Pairs:
        """The pairs with what tables say of them, which are filled where they lack something."""
        pairs, filled = tabulate.attach(run, self._read(run))
        self.told(filled)
        return pairs

    def _weights_of(self, run: Run) -> dict[str, Any]:
        """The policy's weights as it starts; those of one model at a time."""
        seed = run.config.train.seed if run.config.model.source.startswith('random:') else None
        key = repr((run.config.model, run.lora, seed, run.mesh.devices.tolist()))
        if key not in self._weights:
            self._weights.clear()
            _, shardings = loading.abstract_state(run)
            policy = shardings.base_params if run.lora else shardings.params
            self._weights[key] = loading.load_weights(run, None, policy)
        return self._weights[key]


def _largest_shape(config: Config, cells: Sequence[Cell], pairs: Pairs) -> Shape:
    """The least shape that holds every batch of these cells, so that their program is compiled once."""
    schedule, lengths = Schedule(config.train, len(pairs.train)), lengths_of(pairs.train)
    found = set()
    for seed in {cell.seed for cell in cells}:
        own = dataclasses.replace(schedule, settings=dataclasses.replace(config.train, seed=seed))
        found |= rows.run_shapes(lengths, (own.pairs_of(step) for step in range(own.steps)), config.rows).keys()
    return heldout.largest(list(found))
