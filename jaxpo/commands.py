"""The commands beside `train`: references, evaluate, sample, export; and what each says it would do."""

import dataclasses
import json
from collections.abc import Sequence

import jax

from jaxpo import evaluate as evaluation
from jaxpo import processes, report, storage, tabulate, weighing
from jaxpo.checkpoint import open_checkpoints
from jaxpo.console import console
from jaxpo.data.prompts import Prompt, read_prompts
from jaxpo.errors import InputError
from jaxpo.evaluate import Sampled
from jaxpo.experiment import Experiment
from jaxpo.loading import abstract_state, load_start, load_unsaved, load_weights
from jaxpo.models import families
from jaxpo.models.checkpoint import write_hugging_face
from jaxpo.models.leaves import without_padding
from jaxpo.models.lora import merged_by_leaf
from jaxpo.models.peft import write_adapter
from jaxpo.run import Pairs, Run, Schedule, prepare, read_pairs
from jaxpo.state import TrainState


def dry_run(experiment: Experiment) -> None:
    """Checks a run and prints what it would do; writes nothing."""
    run = prepare(experiment)
    pairs = read_pairs(run)
    report.print_dry_run(run, pairs, Schedule(run.config.train, len(pairs.train)))


def references(experiment: Experiment) -> None:
    """Computes the tables of the run's references ahead of training, for all of its pairs, and says where they are."""
    run = _with_tables(experiment)
    _, filled = tabulate.attach(run, read_pairs(run))
    report.print_tables(filled)


def dry_run_references(experiment: Experiment) -> None:
    """Checks an experiment and prints what its tables lack; writes nothing."""
    run = _with_tables(experiment)
    report.print_tables(tabulate.missing(run, read_pairs(run)), computed='to compute')


def _with_tables(experiment: Experiment) -> Run:
    run = prepare(experiment)
    if not run.held('table'):
        names = ', '.join(run.config.references) or 'none'
        raise InputError(f'references: no reference is read from a table ({names}). Set references.NAME.table.')
    return run


def evaluate(experiment: Experiment) -> None:
    """Evaluates the newest checkpoint of a run (its model's source, where there is none) and prints the table."""
    run = prepare(experiment)
    pairs = read_pairs(run)
    if not pairs.evaluation:
        raise InputError('data.evaluation names no pairs to evaluate on.')
    processes.decide(lambda: storage.check_writable(run.directory))
    pairs, _ = tabulate.attach(run, dataclasses.replace(pairs, train=[]))
    state = _newest(run, pairs)
    step = int(state.step)
    found = evaluation.evaluate(evaluation.make_evaluator(run, pairs.evaluation), state)
    if found.samples:
        evaluation.write_samples(run.directory / f'evaluation_samples_{step:06d}.jsonl', found.samples)
    _write_json(run.directory / f'evaluation_{step:06d}.json', {'step': step, **found.metrics})
    report.print_evaluation(run, step, found.metrics)


def sample(experiment: Experiment) -> None:
    """Samples completions of prompts, one JSON line each; and best-against-worst pairs, where the config asks."""
    run = prepare(experiment)
    prompts = _prompts(run)
    processes.decide(lambda: storage.check_writable(run.directory))
    newest = run.config.sample.policy == 'newest'
    state = _policy(run) if newest else load_start(run, references=False)
    completions = run.config.sample.completions
    console().print(f'Sampling {len(prompts)} x {completions} completions after step {int(state.step)}.')
    groups = evaluation.generate(run, state.policy, prompts, completions, run.config.sample)
    sampled = [
        [evaluation.describe(run, prompt, generated, {}) for generated in group]
        for prompt, group in zip(prompts, groups)
    ]
    path = run.directory / run.config.sample.output
    evaluation.write_samples(path, [sample for group in sampled for sample in group])
    console().print(f'Wrote {path}.')
    if run.config.sample.pairs:
        _write_pairs(storage.path(run.config.sample.pairs), prompts, sampled)


def dry_run_sample(experiment: Experiment) -> None:
    """Checks a sampling run and prints what it would do; writes nothing."""
    run = prepare(experiment)
    count = len(_prompts(run)) * run.config.sample.completions
    most = count * run.config.sample.max_new_tokens
    console().print(f'{run.pretrained.name}: {count} completions, at most {most:,} tokens, to {run.directory}.')


def export(experiment: Experiment) -> None:
    """Writes the newest policy of a run: a Hugging Face directory that transformers opens, or a PEFT adapter."""
    run = prepare(experiment)
    state = _policy(run)
    directory, step = _export_directory(run), int(state.step)
    if run.config.export.form == 'adapter':
        write_adapter(directory, state.params, run.lora, run.pretrained.architecture, run.pretrained.source)
        console().print(f'Wrote the adapter of {run.pretrained.name} after {step} steps to {directory}.')
        return
    write_hugging_face(
        directory,
        _whole(run, state),
        run.pretrained.hugging_face_config,
        run.tokenizer,
        generation_config=run.pretrained.generation_config,
        dtype=_export_dtype(run),
        max_shard_bytes=int(run.config.export.max_shard_gigabytes * 1e9),
    )
    console().print(f'Wrote {run.pretrained.name} after {step} steps to {directory}.')


def dry_run_export(experiment: Experiment) -> None:
    """Checks an export and prints what it would do; writes nothing."""
    run = prepare(experiment)
    console().print(f'{run.pretrained.name} would be written as {_export_dtype(run)} to {_export_directory(run)}.')


def _export_directory(run: Run) -> storage.Path:
    return run.directory / run.config.export.directory


def _export_dtype(run: Run) -> str:
    return run.pretrained.dtype if run.config.export.dtype == 'source' else run.config.export.dtype


def _whole(run: Run, state: TrainState):
    """The policy's float32 weights, its adapter merged in: into those of the source, not a copy in fewer bits."""
    params = state.params
    if run.lora:
        shardings = abstract_state(run)[1].base_params
        params = merged_by_leaf(load_weights(run, None, shardings), run.lora, state.params, shardings)
    return without_padding(families.keys(run.pretrained.architecture), params)


def _newest(run: Run, pairs: Pairs) -> TrainState:
    """The newest checkpoint's state without its optimizer, or that at step 0 where nothing was trained."""
    restored = _restored(run, references=True)
    return restored or weighing.weigh(run, load_start(run), pairs.validation)


def _policy(run: Run) -> TrainState:
    """The newest checkpoint's state, or the source's where nothing was trained, without references."""
    return _restored(run, references=False) or load_start(run, references=False)


def _restored(run: Run, *, references: bool) -> TrainState | None:
    """The newest checkpoint's state without its optimizer, or None."""
    directory = run.directory / 'checkpoints'
    if not processes.decide(directory.is_dir):
        return None
    with open_checkpoints(directory, run.config.train.keep_checkpoints) as checkpoints:
        step = processes.agree(checkpoints.latest())
        if step is None:
            return None
        shapes, _ = abstract_state(run)
        return checkpoints.restore_without_optimizer(step, shapes, load_unsaved(run, references=references))


def _prompts(run: Run) -> list[Prompt]:
    source = run.config.sample.prompts or run.config.data.evaluation
    if not source:
        raise InputError('sample.prompts is empty, and data.evaluation too: name a file of prompts.')
    if run.config.sample.pairs and run.experiment.reward is None:
        raise InputError(f'sample.pairs needs a reward: {run.experiment.path} defines no reward(prompt, completion).')
    return read_prompts(source, run.config.data, run.tokenizer)


def _write_pairs(path: storage.Path, prompts: Sequence[Prompt], groups: Sequence[Sequence[Sampled]]) -> None:
    """The best against the worst completion of each prompt that differ in reward. A completion that was cut is none."""
    lines = []
    for prompt, group in zip(prompts, groups):
        ranked = sorted((sample for sample in group if sample.ended and sample.completion), key=lambda s: s.reward)
        if ranked and ranked[-1].reward > ranked[0].reward:
            best, worst = ranked[-1], ranked[0]
            row = {'prompt': prompt.source, 'chosen': best.completion, 'rejected': worst.completion}
            row |= {'chosen_reward': round(best.reward, 4), 'rejected_reward': round(worst.reward, 4)}
            lines.append(json.dumps(row, ensure_ascii=False) + '\n')
    if jax.process_index() == 0:
        storage.write_text(path, ''.join(lines))
    console().print(f'Wrote {len(lines)} pairs of {len(prompts)} prompts to {path}.')


def _write_json(path: storage.Path, value) -> None:
    if jax.process_index() == 0:
        storage.write_text(path, json.dumps(value, indent=2) + '\n')
