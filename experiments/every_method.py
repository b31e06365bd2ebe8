"""Trains every registered method on real pairs, and holds each to this: all finite, and its own loss falls, held out.

    python experiments/every_method.py [MODEL PAIRS_TRAIN PAIRS_EVALUATION] [--output OUTPUT] [--only dpo,kto]

One run a method, one more for each further choice of its words (`f_dpo divergence=alpha`) and one on unpaired rows
where it takes them, all by the loop of `jaxpo train`. The result is a Markdown table, `table.md` in OUTPUT; the exit
status is 1 where a loss did not fall or a run failed. What is finished is not run again.

It shows that the wiring works, not which method is better: the model is tiny, the steps are few, and what a method
needs beside pairs is made of them by plain rules that stand in for annotations (`with_columns`). The frozen models are
real: each is trained here first. `spo` is in its second round: its policy starts as `positive`, and `earlier` is the
model that this one started from. (`jaxpo train experiments/every_method.py` trains one method on the rows made here.)
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import re
import traceback
from collections.abc import Iterator, Sequence

import jax

from jaxpo import losses, provenance, report
from jaxpo.commands import export
from jaxpo.config import Config, Data, Evaluate, Model, Optimizer, Reference, Rows, Train
from jaxpo.console import number
from jaxpo.data.sources import read_rows
from jaxpo.errors import InputError, Interrupted
from jaxpo.experiment import Experiment
from jaxpo.losses.contract import settings
from jaxpo.metrics import read_metrics
from jaxpo.objective import spelled_out
from jaxpo.train import train

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'
OUTPUT = 'runs/every_method'
LOWER_LEARNING_RATES = {'dpop': 1e-4, 'ipo reduction=sum': 1e-4, 'odpo': 1e-4}
LOWER_LEARNING_RATES |= {'f_dpo divergence=alpha': 3e-5, 'f_dpo divergence=forward_kl': 3e-5}
"""Where the common one is too large for a loss that grows steeply with nats of a whole completion."""
FROZEN = {'positive': ('sft', 'paired'), 'negative': ('sft', 'swapped'), 'margin': ('dpo', 'shorter')}
"""How each frozen model is trained: by which loss, on which rows."""
HEADER = ('method', 'held-out loss', 'training loss', 'held-out accuracy', 'held-out margin', 'seconds', 'falls')


def files(root: str | pathlib.Path, kind: str) -> tuple[str, str]:
    """The training and the held-out rows of a kind, which `write_data` writes."""
    return f'{root}/data/{kind}.train.jsonl', f'{root}/data/{kind}.evaluation.jsonl'


def get_config() -> Config:
    """The setting that all methods share. One row length: each run compiles little."""
    return Config(
        output=f'{OUTPUT}/one_method',
        model=Model(source=str(SHARED / 'models/stories260k'), remat='none'),
        data=Data(*files(OUTPUT, 'paired'), max_prompt_tokens=64, max_completion_tokens=64),
        rows=Rows(layout='shared', lengths=(320,), microbatch=16, pairs_per_row=2),
        objective={'dpo': {}},
        optimizer=Optimizer(learning_rate=1e-3),
        train=Train(batch_pairs=16, steps=16),
        evaluate=Evaluate(pairs=128),
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: a method, its words where not the default ones, and the rows it reads."""

    loss: str
    words: dict[str, str]
    rows: str = 'paired'

    @property
    def label(self) -> str:
        words = (f' {name}={word}' for name, word in self.words.items())
        return ''.join([self.loss, *words]) + (' (unpaired)' if self.rows == 'unpaired' else '')


def cases(only: Sequence[str]) -> Iterator[Case]:
    for name in only or sorted(losses.LOSSES):
        entry = losses.find(name)
        for given in settings(entry):
            if all(isinstance(value, str) for value in given.values()):
                yield Case(name, given)
        if entry.takes_unpaired:
            yield Case(name, {}, 'unpaired')


def words(text: str) -> list[str]:
    return re.findall(r'\w+', text.lower())


def plain(row: dict) -> dict:
    """The pair as plain text: the prompt's turns, each with a newline behind it."""
    turns = [row['prompt']] if isinstance(row['prompt'], str) else [turn['content'] for turn in row['prompt']]
    return {'prompt': ''.join(turn + '\n' for turn in turns), 'chosen': row['chosen'], 'rejected': row['rejected']}


def with_columns(pair: dict) -> dict:
    """The pair with all that a method may read beside it.

    * corrupted_prompt: the second half of the prompt's words.
    * score: of the chosen completion, the share of both completions' words that only one has; 0 of the rejected one.
    * win_probability: 1/2 and half that share more (chosen) or less (rejected).
    * margin_reward: less by 0.1 for every word, so that the other objective is to be short.
    * auxiliary_reward: the share of the completion's words that the prompt has.
    * token_weight: 1 for words that the other completion lacks, 1/2 for the rest.
    * segment: from the first character on in which the completions differ.
    """
    prompt, chosen, rejected = pair['prompt'], pair['chosen'], pair['rejected']
    both = {*words(chosen)} & {*words(rejected)}
    apart = 1 - len(both) / max(1, len({*words(chosen + ' ' + rejected)}))
    start = len(os.path.commonprefix([chosen, rejected]))
    found = {'corrupted_prompt': ' '.join(prompt.split()[len(prompt.split()) // 2 :]) + '\n'}
    for side, text, sign in (('chosen', chosen, 1), ('rejected', rejected, -1)):
        own, spans = words(text), re.finditer(r'\S+', text)
        columns = {
            'score': apart if sign > 0 else 0.0,
            'win_probability': (1 + sign * apart) / 2,
            'margin_reward': -0.1 * len(own),
            'auxiliary_reward': sum(word in words(prompt) for word in own) / max(1, len(own)),
            'token_weight': [[*one.span(), 0.5 if {*words(one[0])} <= both else 1.0] for one in spans],
            'segment': [[start, len(text), 1.0]] if start < len(text) else [],
        }
        found |= {f'{side}_{name}': value for name, value in columns.items()}
    return pair | found


def swapped(pair: dict) -> dict:
    return pair | {'chosen': pair['rejected'], 'rejected': pair['chosen']}


def write_data(root: pathlib.Path, *sources: str) -> None:
    """The rows of all kinds, made of the training and the held-out pairs."""
    (root / 'data').mkdir(parents=True, exist_ok=True)
    for split, source in enumerate(sources):
        pairs = [plain(row.fields) for row in read_rows(source)]
        halves = [(pair['prompt'], pair[side], side == 'chosen') for pair in pairs for side in ('chosen', 'rejected')]
        kinds = {
            'paired': map(with_columns, pairs),
            'swapped': map(swapped, pairs),
            'shorter': (swapped(pair) if len(pair['chosen']) > len(pair['rejected']) else pair for pair in pairs),
            'unpaired': (dict(zip(('prompt', 'completion', 'label'), half)) for half in halves),
        }
        for kind, rows in kinds.items():
            lines = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
            pathlib.Path(files(root, kind)[split]).write_text(lines, encoding='utf-8')


def experiment(root: pathlib.Path, folder: str, case: Case, start: str, roles: dict[str, str]) -> Experiment:
    """The run of a case in `folder`. start: the policy's source; roles: sources of the frozen models, by role."""
    shared = get_config()
    training, held_out = files(root, case.rows)
    rate = LOWER_LEARNING_RATES.get(case.label, shared.optimizer.learning_rate)
    config = dataclasses.replace(
        shared,
        output=str(root / folder),
        model=dataclasses.replace(shared.model, source=start),
        references={'initial': Reference(), **{role: Reference(source) for role, source in roles.items()}},
        data=dataclasses.replace(shared.data, train=training, evaluation=held_out),
        objective=spelled_out({case.loss: case.words}, ('initial', *roles)),
        optimizer=dataclasses.replace(shared.optimizer, learning_rate=rate),
    )
    return Experiment(pathlib.Path(__file__), config, None)


def run(one: Experiment) -> pathlib.Path:
    """Trains, unless that is done already. The run's directory."""
    directory = pathlib.Path(one.config.output)
    if (directory / 'metrics.jsonl').exists() and report.evaluations(directory, one.config.train.steps):
        provenance.claim(directory, one.config)  # InputError if it was done with other settings
    else:
        train(one)
        jax.clear_caches()
    return directory


def frozen(root: pathlib.Path, model: str, role: str) -> str:
    """The directory of the frozen model of a role, trained and exported where it is not there yet."""
    loss, rows = FROZEN[role]
    one = experiment(root, f'frozen/{role}', Case(loss, {}, rows), model, {})
    directory = run(one) / one.config.export.directory
    if not directory.exists():
        export(one)
    return str(directory)


def run_case(root: pathlib.Path, model: str, case: Case) -> pathlib.Path:
    """Runs a case with real models in all roles."""
    needed = losses.find(case.loss).needs_of(case.words).models
    roles = {role: model if role == 'earlier' else frozen(root, model, role) for role in needed}
    start = frozen(root, model, 'positive') if 'earlier' in needed else model
    folder = re.sub(r'\W+', '-', case.label).strip('-')
    return run(experiment(root, f'methods/{folder}', case, start, roles))


def cells(directory: pathlib.Path) -> list[str]:
    """What the table says of a finished run: before and after, first step and last."""
    lines = read_metrics(directory)
    steps, held_out = ([line for line in lines if name in line] for name in ('loss', 'eval/loss'))
    changes = ((held_out, 'eval/loss', 4), (steps, 'loss', 4))
    changes += ((held_out, 'eval/rewards/accuracies', 2), (held_out, 'eval/rewards/margins', 3))
    shown = [' → '.join(number(of[place][name], digits) for place in (0, -1)) for of, name, digits in changes]
    seconds = sum(line.get('seconds', 0) + line.get('eval/seconds', 0) for line in lines)
    finite = all(math.isfinite(value) for line in lines for value in line.values())
    falls = held_out[-1]['eval/loss'] < held_out[0]['eval/loss']
    return [*shown, f'{seconds:.0f}', 'not finite' if not finite else 'yes' if falls else 'no']


def row_of(root: pathlib.Path, model: str, case: Case) -> list[str]:
    """The table's row of a case. A run that fails is a row that says so; its traceback goes to stderr."""
    rate = LOWER_LEARNING_RATES.get(case.label)
    label = f'`{case.label}`' + (f', learning rate {rate:g}' if rate else '')
    try:
        return [label, *cells(run_case(root, model, case))]
    except Interrupted:
        raise
    except Exception as error:  # of whatever kind: the other methods are to be seen too
        traceback.print_exc()
        return [label, *[''] * (len(HEADER) - 2), f'{type(error).__name__}: {error}'.replace('\n', ' ')]


def table(rows: Sequence[Sequence[str]]) -> str:
    return ''.join(f'| {" | ".join(row)} |\n' for row in (HEADER, ['---'] * len(HEADER), *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description='Train every registered method on real pairs, as the script says.')
    parser.add_argument('model', nargs='?', default=get_config().model.source)
    for split, name in (('train', 'truthfulqa.train.jsonl'), ('evaluation', 'truthfulqa.eval.jsonl')):
        parser.add_argument(f'pairs_{split}', nargs='?', default=str(SHARED / 'data/ci' / name))
    parser.add_argument('--output', type=pathlib.Path, default=pathlib.Path(OUTPUT))
    parser.add_argument('--only', default='', help='losses by name, separated by commas; leaves table.md as it is')
    given = parser.parse_args()
    try:
        found = list(cases([name for name in given.only.split(',') if name]))
        write_data(given.output, given.pairs_train, given.pairs_evaluation)
    except InputError as error:
        parser.error(str(error))
    rows = [row_of(given.output, given.model, case) for case in found]
    print(table(rows))
    if not given.only:
        (given.output / 'table.md').write_text(table(rows), encoding='utf-8')
    return 0 if all(row[-1] == 'yes' for row in rows) else 1


if __name__ == '__main__':
    raise SystemExit(main())
