"""`jaxpo train`: the loop, in chapters. To try what it does not do, copy it."""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxpo import evaluate, failures, processes, provenance, report, tabulate, weighing
from jaxpo.checkpoint import check_room, open_checkpoints
from jaxpo.console import console, progress
from jaxpo.data import audit
from jaxpo.data.rows import lengths_of, row_tokens
from jaxpo.errors import Interrupted, TrainingError
from jaxpo.experiment import Experiment
from jaxpo.loading import abstract_state, jitted_train_step, load_state, load_unsaved
from jaxpo.metrics import flatten, open_metrics
from jaxpo.run import Pairs, Run, Schedule, make_batch, prepare, read_pairs
from jaxpo.state import TrainState, learning_rates


def train(experiment: Experiment) -> None:
    """Trains a policy, or resumes a run that was interrupted. Writes all under the config's `output`.

    Raises:
      InputError: bad settings, model, data, or an output directory that holds another run; before any training.
      TrainingError: a loss that is not finite; the parameters are those before it.
      Interrupted: SIGTERM (of several processes: to any) or Ctrl-C; the state was saved, and the same command goes on.
    """
    # Check everything before anything is written or computed.
    run = prepare(experiment)
    pairs = read_pairs(run)
    schedule = Schedule(run.config.train, len(pairs.train))
    shapes, _ = abstract_state(run)
    check_room(run.directory, shapes, run.config.train.keep_checkpoints)
    provenance.check(run.directory, run.config)
    report.print_header(run, pairs, schedule)
    pairs, filled = tabulate.attach(run, pairs)
    report.print_tables(filled)
    provenance.claim(run.directory, run.config)
    if jax.process_index() == 0:
        audit.write_report(run.directory / 'data_report.json', pairs.reports)

    directory, keep = run.directory / 'checkpoints', run.config.train.keep_checkpoints
    with open_checkpoints(directory, keep) as checkpoints, failures.telling_at_once():
        # Load, or resume where the last committed checkpoint is.
        done = processes.agree(checkpoints.latest()) or 0
        state = weighing.weigh(run, load_state(run), pairs.validation) if not done else _resume(run, checkpoints, done)
        with open_metrics(run.directory, done) as log:
            # Evaluate before training, train, evaluate after.
            evaluator = evaluate.make_evaluator(run, pairs.evaluation)
            if not done:
                _evaluate(run, evaluator, state, 0, log)
            if done < schedule.steps:
                state = _loop(run, pairs, schedule, state, done, checkpoints, log, evaluator)
            if not processes.decide(lambda: report.evaluations(run.directory, schedule.steps)):
                _evaluate(run, evaluator, state, schedule.steps, log)
            results = processes.decide(lambda: report.evaluations(run.directory, schedule.steps))
            log.write_hyperparameters(flatten(dataclasses.asdict(run.config)), results)
    if jax.process_index() == 0:
        report.print_results(run, schedule.steps)


def _resume(run: Run, checkpoints, done: int) -> TrainState:
    """The state of the checkpoint; what is frozen comes from its own source."""
    console().print(f'Resuming after step {done}.')
    shapes, _ = abstract_state(run)
    return checkpoints.restore(done, shapes, load_unsaved(run))


def _loop(run: Run, pairs: Pairs, schedule: Schedule, state, done, checkpoints, log, evaluator) -> TrainState:
    train_step = jitted_train_step(run)
    rates = learning_rates(run.config.optimizer, schedule.steps)
    settings = run.config.train
    judge = weighing.make_judge(run, pairs.validation)
    meter = _Meter(pairs, schedule, done, run.config.rows.layout)

    with progress(schedule.steps, done) as show, _interruption() as interrupted:
        pending = None
        for number in range(done, schedule.steps):
            indices = schedule.pairs_of(number)
            batch = make_batch(run, [pairs.train[i] for i in indices])
            before = judge.accuracy(state, number) if judge else None
            state, metrics = train_step(state, batch, run.traced | rates(number))
            state = judge.credit(state, number, before) if judge else state
            # The metrics of the step before are read while this one runs: the device never waits for the host.
            _finish(pending, run, meter, log, show)
            pending = (number + 1, indices, metrics)
            last, stop = number + 1 == schedule.steps, interrupted(number + 1)
            save = last or stop or _due(number + 1, settings.checkpoint_every)
            look = not last and not stop and _due(number + 1, settings.evaluate_every)
            if save or look:
                _finish(pending, run, meter, log, show)
                pending = None
            if save:
                log.publish()  # first: a resumed run logs no step again that its checkpoint holds
                checkpoints.save(number + 1, state)
            if stop and not last:
                checkpoints.wait()
                raise Interrupted(f'Stopped after step {number + 1}; its checkpoint is saved.')
            if look:
                _evaluate(run, evaluator, state, number + 1, log)
                meter.restart()
    return state


def _due(number: int, every: int | None) -> bool:
    return every is not None and number % every == 0


def _finish(pending, run: Run, meter: '_Meter', log, show: Callable) -> None:
    """Waits for a step's metrics, stops the run if they are not finite, and logs and shows them."""
    if pending is None:
        return
    number, indices, metrics = pending
    metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not metrics.pop('finite'):
        _stop_broken(run, number, indices, metrics)
    metrics |= meter.read(number)
    if number % run.config.train.log_every == 0:
        log.write(number, metrics)
    show(number, metrics)


def _stop_broken(run: Run, number: int, indices: np.ndarray, metrics) -> None:
    path = run.directory / f'not_finite_{number}.json'
    if jax.process_index() == 0:
        found = {'step': number, 'pairs': indices.tolist(), 'metrics': {k: repr(v) for k, v in metrics.items()}}
        path.write_text(json.dumps(found, indent=2), encoding='utf-8')
    raise TrainingError(
        f'Step {number}: the loss ({metrics["loss"]}) or the gradient norm ({metrics["grad_norm"]}) is not finite. '
        f'Parameters were left as they were; the last checkpoint stands. Its pairs are in {path}.'
    )


def _evaluate(run: Run, evaluator: evaluate.Evaluator, state: TrainState, number: int, log) -> None:
    if not evaluator.pairs and not evaluator.prompts:
        return
    what = f'{len(evaluator.pairs)} held-out pairs' + (
        f', {len(evaluator.prompts)} prompts' if evaluator.prompts else ''
    )
    console().print(f'Evaluating after {number} steps: {what} ...')
    started = time.monotonic()
    found = evaluate.evaluate(evaluator, state.replace(opt_state=()))
    seconds = time.monotonic() - started
    log.write(number, {**found.metrics, 'eval/seconds': seconds})
    console().print(f'Evaluated in {seconds:.0f} s.')
    if found.samples:
        evaluate.write_samples(run.directory / f'samples_{number:06d}.jsonl', found.samples)
        evaluate.write_samples(run.directory / f'greedy_{number:06d}.jsonl', found.shown)
    for place, sample in enumerate(found.shown):
        log.write_text(number, f'samples/{place}', f'**{sample.prompt}**\n\n{sample.completion}')
    log.publish()


class _Meter:
    """Tokens trained on so far, and the speed since the last reading. The first reading includes compilation."""

    def __init__(self, pairs: Pairs, schedule: Schedule, done: int, layout: str):
        tokens = row_tokens(lengths_of(pairs.train), layout)
        self._tokens_of = lambda number: int(tokens[schedule.pairs_of(number - 1)].sum())
        self._total = sum(self._tokens_of(number) for number in range(1, done + 1))
        self.restart()

    def restart(self) -> None:
        self._last = time.monotonic()

    def read(self, number: int) -> dict[str, float]:
        tokens, now = self._tokens_of(number), time.monotonic()
        seconds, self._last = now - self._last, now
        self._total += tokens
        return {'num_tokens': self._total, 'seconds': seconds, 'tokens_per_second': tokens / seconds}


@contextlib.contextmanager
def _interruption(signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT)) -> Iterator[Callable[[int], bool]]:
    """Gives a function that says whether to stop after a step, as one of `signals` came. A second one ends at once.

    Several processes agree on the step, after a SIGTERM to any of them; Ctrl-C ends them.
    """
    if jax.process_count() > 1:
        yield processes.interrupted
        return
    caught = []

    def note(number, frame):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield lambda step: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
