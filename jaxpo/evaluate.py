"""Evaluation: held-out pairs scored, held-out prompts sampled, rewarded and measured against the reference."""

import collections
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from jaxpo import config, sampling, sharding, step, storage
from jaxpo.data import prompts as prompt_files
from jaxpo.data import rows
from jaxpo.data.prompts import Prompt
from jaxpo.models.tokenizer import end_ids
from jaxpo.objective import counts_of
from jaxpo.run import Run, make_batch
from jaxpo.state import TrainState
from jaxpo.types import Pair

COMPLETIONS = 2  # of each sampled prompt: they share its row when they are scored


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One sampled completion."""

    prompt: str
    completion: str
    tokens: int  # its end token included
    ended: bool
    reward: float | None  # by the experiment's `reward`, where it has one
    log_ratios: dict[str, float]  # log pi - log pi_ref, nats, to each reference whose weights are in memory


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one evaluation found."""

    metrics: dict[str, float]  # with the prefix `eval/`
    samples: list[Sampled]  # COMPLETIONS of each prompt, in order
    shown: list[Sampled]  # the greedy completion of the first few prompts: for people, in no metric


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """The compiled parts of an evaluation and what it is over."""

    run: Run
    pairs: list[Pair]
    prompts: list[Prompt]
    eval_step: Callable[..., dict[str, jax.Array]]
    measured: tuple[str, ...]  # references whose weights are in memory
    score_step: Callable[..., dict[str, jax.Array]]


def make_evaluator(run: Run, pairs: list[Pair]) -> Evaluator:
    """An evaluator of held-out pairs and, where the config asks for samples, of the first prompts of their file."""
    count = run.config.evaluate.sample_prompts
    held_out = []
    if count:
        held_out = prompt_files.read_prompts(run.config.data.evaluation, run.config.data, run.tokenizer)[:count]
    models = run.models
    measured = tuple(name for name in run.objective.references if models.frozen[name].weights != 'table')
    # Whole on every device: of several processes, each reads all of what is found.
    jit = functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
    eval_step, score_step = step.make_eval_step(models, run.objective), step.make_score_step(models, measured)
    return Evaluator(run, pairs, held_out, jit(eval_step), measured, jit(score_step))


def evaluate(evaluator: Evaluator, state: TrainState) -> Evaluation:
    """Scores the held-out pairs and samples the held-out prompts, where there are any. Needs no optimizer state.

    `eval/reward` and `eval/kl` are means over samples, each with its standard error over prompts; `eval/kl` estimates
    KL(policy || reference) of whole completions, nats, where `sample` draws from the policy itself. It is to the first
    reference; where there are several, `eval/kl/NAME` is to each. A reference read from a table has none.
    """
    run, metrics, samples, shown = evaluator.run, {}, [], []
    if evaluator.pairs:
        metrics |= _score_pairs(evaluator, state)
    if evaluator.prompts:
        samples = draw_samples(evaluator, state)
        metrics |= summarised(samples, run.objective.references)
        shown = _show(run, state.policy, evaluator.prompts[: run.config.evaluate.show])
    return Evaluation({f'eval/{name}': value for name, value in metrics.items()}, samples, shown)


def _score_pairs(evaluator: Evaluator, state: TrainState) -> dict[str, float]:
    """The objective's metrics over all held-out pairs."""
    run, totals = evaluator.run, collections.defaultdict(float)
    lengths = np.array([(pair.chosen.size, pair.rejected.size) for pair in evaluator.pairs])
    counts = jax.device_get(counts_of(lengths[:, :1], lengths[:, 1:]))
    for part in _parts(run, evaluator.pairs):
        shares = evaluator.eval_step(state, make_batch(run, part), run.traced, counts)
        for name, value in jax.device_get(shares).items():
            totals[name] += float(value)
    return dict(totals)


def _parts(run: Run, pairs: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    size = run.config.train.batch_pairs
    return (pairs[start : start + size] for start in range(0, len(pairs), size))


def draw_samples(evaluator: Evaluator, state: TrainState) -> list[Sampled]:
    """COMPLETIONS of each of the evaluator's prompts, in order."""
    run, prompts = evaluator.run, evaluator.prompts
    groups = generate(run, state.policy, prompts, COMPLETIONS, run.config.sample)
    log_ratios = [[{}] * COMPLETIONS for _ in prompts]
    if evaluator.measured:
        log_ratios = _log_ratios(evaluator, state, groups)
    return [
        describe(run, prompt, generated, log_ratio)
        for prompt, group, ratios in zip(prompts, groups, log_ratios)
        for generated, log_ratio in zip(group, ratios)
    ]


def _show(run: Run, params, prompts: Sequence[Prompt]) -> list[Sampled]:
    greedy = dataclasses.replace(run.config.sample, temperature=0.0, batch=max(1, len(prompts)))
    groups = generate(run, params, prompts, 1, greedy)
    return [describe(run, prompt, generated, {}) for prompt, (generated,) in zip(prompts, groups)]


def generate(
    run: Run, params, prompts: Sequence[Prompt], completions: int, settings: config.Sample
) -> list[list[sampling.Generated]]:
    """Completions of each prompt, as `settings` say."""
    return sampling.generate(
        run.decoder,
        params,
        [prompt.ids for prompt in prompts],
        end_ids=end_ids(run.tokenizer, run.pretrained.hugging_face_config, run.pretrained.generation_config),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=run.config.train.seed,
        completions=completions,
        batch_size=settings.batch,
        mesh=run.mesh,
    )


def describe(run: Run, prompt: Prompt, generated: sampling.Generated, log_ratios: dict[str, float]) -> Sampled:
    """A generated completion as text, with its reward."""
    completion = run.tokenizer.decode(generated.tokens, skip_special_tokens=True)
    reward = run.experiment.reward
    return Sampled(
        prompt.text,
        completion,
        len(generated.scored_tokens),
        generated.ended,
        None if reward is None else float(reward(prompt.text, completion)),
        log_ratios,
    )


def _log_ratios(evaluator: Evaluator, state: TrainState, groups) -> list[list[dict[str, float]]]:
    """log pi - log pi_ref of each completion. Two samples of a prompt make one pair of a row."""
    pairs = [
        Pair(prompt.ids, *(generated.scored_tokens for generated in group), index)
        for index, (prompt, group) in enumerate(zip(evaluator.prompts, groups))
    ]
    run, ratios = evaluator.run, [None] * len(pairs)
    for part in _parts(run, pairs):
        host = rows.fill_rows(part, run.config.rows, row_multiple=run.row_multiple)
        batch = sharding.put(host, run.mesh, sharding.MICROBATCHES)
        scored = jax.device_get(evaluator.score_step(state.params, state.frozen, batch))
        places = host.pair_index.reshape(-1)  # of a batch on the mesh, a process sees its own rows alone
        sides = [np.moveaxis(scored[side], 1, -1).reshape(len(places), -1) for side in ('chosen', 'rejected')]
        for place, *both in zip(places, *sides):
            if place >= 0:
                ratios[place] = [dict(zip(evaluator.measured, map(float, one))) for one in both]
    return ratios


def summarised(samples: Sequence[Sampled], references: Sequence[str]) -> dict[str, float]:
    """Means over samples, COMPLETIONS of each prompt in order, as `evaluate` has them, without its prefix."""
    metrics = {
        'completion_tokens': float(np.mean([sample.tokens for sample in samples])),
        'ended': float(np.mean([sample.ended for sample in samples])),
    }
    columns = {} if samples[0].reward is None else {'reward': [sample.reward for sample in samples]}
    for place, name in enumerate(references):
        if name in samples[0].log_ratios:
            ratios = [sample.log_ratios[name] for sample in samples]
            columns |= ({'kl': ratios} if place == 0 else {}) | ({f'kl/{name}': ratios} if len(references) > 1 else {})
    for name, values in columns.items():
        metrics[name], metrics[f'{name}_standard_error'] = mean_and_standard_error(values)
    return metrics


def mean_and_standard_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean over samples, and its standard error over prompts: samples of one prompt are not independent."""
    by_prompt = np.reshape(values, (-1, COMPLETIONS)).mean(axis=1)
    error = by_prompt.std(ddof=1) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else math.nan
    return float(by_prompt.mean()), float(error)


def write_samples(path: storage.Path, samples: Sequence[Sampled]) -> None:
    """One JSON line per sample. Process 0 alone writes."""
    if jax.process_index() == 0:
        lines = (json.dumps(dataclasses.asdict(sample), ensure_ascii=False) for sample in samples)
        storage.write_text(path, ''.join(line + '\n' for line in lines))
