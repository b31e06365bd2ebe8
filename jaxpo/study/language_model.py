"""Training the cells of a study of language models, one by one or many in one program."""

import collections
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxpo import evaluate, loading, sharding, storage, weighing
from jaxpo.data import rows
from jaxpo.run import Run
from jaxpo.state import TrainState
from jaxpo.study import heldout, programs, unfinished
from jaxpo.study.bundles import Bundle, name_of
from jaxpo.study.design import Cell
from jaxpo.study.measures import metrics_of
from jaxpo.study.records import Compute, Outcome
from jaxpo.study.trainee import Trainee
from jaxpo.study.unfinished import Unfinished
from jaxpo.study.workshop import Shop, Workshop
from jaxpo.types import Batch


def run_bundle(workshop: Workshop, bundle: Bundle, show: Callable[[int], None]) -> Iterator[tuple[Cell, Outcome]]:
    """Trains the cells of a bundle, and says of each what came of it.

    Args:
      show: is told how many steps are done.
    """
    started = time.monotonic()
    shop = workshop.shop(bundle)
    trainees = [Trainee(workshop, shop, bundle, cell) for cell in bundle.cells]
    every = shop.run.config.train.checkpoint_every
    with unfinished.kept(storage.path(workshop.study.base.output), name_of(bundle.cells), every) as kept:
        state = _start(shop, _filled(bundle, trainees)) if bundle.at_once > 1 else _start_one(shop, trainees[0])
        done, state, progress = kept.resumed(state)
        for trainee, held in zip(trainees, progress):
            trainee.go_on(held)
        before = progress[0]['seconds'] if progress else 0.0
        _train(shop, bundle, trainees, state, done, kept, lambda: before + time.monotonic() - started, show)
        seconds = (before + time.monotonic() - started) / len(trainees)
        devices = jax.device_count() if bundle.at_once > 1 else shop.run.mesh.size
        for trainee in trainees:
            compute = Compute(seconds, trainee.schedule.steps, trainee.tokens, devices, len(trainees))
            yield trainee.cell, trainee.outcome(compute)


def _filled(bundle: Bundle, trainees: Sequence[Trainee]) -> list[Trainee]:
    """A program has room for `at_once` cells: the last one fills what is left over."""
    return [trainees[min(place, len(trainees) - 1)] for place in range(bundle.at_once)]


def _train(
    shop: Shop,
    bundle: Bundle,
    trainees: Sequence[Trainee],
    state: TrainState,
    done: int,
    kept: Unfinished,
    seconds: Callable[[], float],
    show: Callable[[int], None],
) -> None:
    """The loop: from step `done` to the last."""
    filled, settings, steps = _filled(bundle, trainees), shop.run.config.train, trainees[0].schedule.steps
    judge = weighing.make_judge(trainees[0].run, shop.pairs.validation) if bundle.at_once == 1 else None
    if not done:
        _evaluate(shop, filled, state, 0, steps)
    pending = None
    for number in range(done, steps):
        batch = _batch(shop, [trainee.schedule.pairs_of(number) for trainee in filled])
        before = judge.accuracy(state, number) if judge else None
        given = _stacked([trainee.settings(number) for trainee in filled])
        state, metrics = shop.programs.train(state, batch, given if bundle.at_once > 1 else _first(given))
        state = judge.credit(state, number, before) if judge else state
        _read(trainees, pending, settings.log_every)
        pending, last = (number + 1, metrics), number + 1 == steps
        look = last or _due(number + 1, settings.evaluate_every)
        keep = not last and _due(number + 1, settings.checkpoint_every)
        if look or keep:
            _read(trainees, pending, settings.log_every)
            pending = None
        if look:
            _evaluate(shop, filled, state, number + 1, steps)
        if keep:
            kept.save(number + 1, state, [trainee.so_far() | {'seconds': seconds()} for trainee in trainees])
        show(number + 1)


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _batch(shop: Shop, indices: Sequence[np.ndarray]) -> Batch:
    """The pairs of a step of each cell as one batch on the devices. Cells of one seed read the same pairs."""
    filled: dict[bytes, Batch] = {}
    for chosen in indices:
        if chosen.tobytes() not in filled:
            pairs = [shop.pairs.train[place] for place in chosen]
            batch = rows.fill_rows(pairs, shop.run.config.rows, row_multiple=shop.run.row_multiple)
            filled[chosen.tobytes()] = batch if shop.shape is None else heldout.padded(batch, shop.shape)
    return shop.programs.place(_stacked([filled[chosen.tobytes()] for chosen in indices]))


def _read(trainees: Sequence[Trainee], pending, log_every: int) -> None:
    if pending is None:
        return
    number, metrics = pending
    metrics = sharding.read(metrics)
    for place, trainee in enumerate(trainees):
        own = {name: float(values[place]) for name, values in metrics.items()}
        trainee.read(number, own, number % log_every == 0)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _start_one(shop: Shop, trainee: Trainee) -> TrainState:
    start = loading.load_start(trainee.run, policy=shop.weights)
    start = start.replace(**jax.device_put(_own_method(trainee), sharding.replicated(trainee.run.mesh)))
    start = start.replace(opt_state=shop.programs.start_optimizer(start.trained))
    return weighing.weigh(trainee.run, start, shop.pairs.validation)


def _start(shop: Shop, trainees: Sequence[Trainee]) -> TrainState:
    """States of all cells before their first step, on a leading axis, but for what they share."""
    first = jax.device_get(loading.load_start(trainees[0].run, policy=shop.weights))
    own = first.replace(**{name: {} for name in programs.SHARED})
    state = shop.programs.place(_stacked([own.replace(**_own_start(trainee)) for trainee in trainees]))
    shared = {name: shop.programs.place_shared(getattr(first, name)) for name in programs.SHARED}
    return state.replace(opt_state=shop.programs.start_optimizer(state.trained), **shared)


def _own_start(trainee: Trainee) -> dict[str, Any]:
    """What of a state at step 0 depends on the cell: its adapter, averages of it, and parts of its methods."""
    run, method = trainee.run, _own_method(trainee)
    if not run.lora:
        return method
    adapter = jax.device_get(loading.fresh_adapter(run))
    return method | {'params': adapter, 'average_params': dict.fromkeys(run.averages, adapter)}


def _own_method(trainee: Trainee) -> dict[str, Any]:
    """Running state and trained parts of its own losses as they start alone, and of the others in its program."""
    whole = loading.init_method(trainee.run)
    own = loading.init_method(dataclasses.replace(trainee.run, objective=trainee.objective))
    return jax.device_get({name: a | b for name, a, b in zip(('method_state', 'method_params'), whole, own)})


def _evaluate(shop: Shop, trainees: Sequence[Trainee], state: TrainState, number: int, steps: int) -> None:
    """Evaluation lines of every cell after `number` steps, and at the end its numbers by pair."""
    settings = _stacked([trainee.settings(min(number, steps - 1)) for trainee in trainees])
    settings = settings if len(trainees) > 1 else _first(settings)

    def numbers_of(batch):
        return sharding.read(shop.programs.measure(state, shop.programs.place_shared(batch), settings))

    cells = list({id(trainee): trainee for trainee in trainees}.values())
    for split in shop.held.pairs:
        if not shop.held.pairs[split]:
            continue
        starts = [trainee.starts[split] for trainee in trainees] if number else []
        for trainee, numbers in zip(cells, heldout.measure(shop.held, split, numbers_of, starts)):
            if not number:
                trainee.starts[split] = numbers
            if number == steps:
                trainee.numbers[split] = numbers
            trainee.evaluated(number, split, metrics_of(numbers))
    if shop.evaluator is not None:
        _sample(shop, cells, state, number, many=len(trainees) > 1)


def _sample(shop: Shop, trainees: Sequence[Trainee], state: TrainState, number: int, *, many: bool) -> None:
    """Reward, KL and length of samples, by split of their prompts."""
    for place, trainee in enumerate(trainees):
        if trainee.error:
            continue
        # Before the first step all cells have one policy: those of a seed have the same samples.
        samples = shop.first_samples.get(trainee.cell.seed) if not number else None
        if samples is None:
            own = _unstacked(shop.run, state, place) if many else state
            evaluator = dataclasses.replace(shop.evaluator, run=trainee.run)
            samples = evaluate.draw_samples(evaluator, own.replace(opt_state=()))
        if not number:
            shop.first_samples[trainee.cell.seed] = samples
        groups = collections.defaultdict(list)
        for index, sample in enumerate(samples):
            prompt = shop.evaluator.prompts[index // evaluate.COMPLETIONS]
            groups[heldout.split_of(prompt.ids, shop.held.selection_share)].append(sample)
        for split, members in sorted(groups.items()):
            trainee.evaluated(number, split, evaluate.summarised(members, shop.run.objective.references))


def _unstacked(run: Run, state: TrainState, place: int) -> TrainState:
    """One cell's state, on the run's device."""
    here, own = {}, state.replace(opt_state=(), **{name: {} for name in programs.SHARED})
    for name in programs.SHARED:
        here[name] = jax.tree.map(lambda leaf: leaf.addressable_data(0), getattr(state, name))
    one = sharding.read(jax.tree.map(lambda leaf: leaf[place], own))
    return jax.device_put(one.replace(**here), sharding.replicated(run.mesh))
