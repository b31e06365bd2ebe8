"""Every method that needs no special columns, compared on real pairs: a small model, many cells, one report.

    jaxpo study experiments/methods.py
    jaxpo report runs/methods

The model is stories260k (260 thousand parameters, trained on children's stories), the pairs are TruthfulQA's (best
against best incorrect answer), both read from a folder beside the repository (`../shared`), as plain text: the model
knows no chat. Each method is tried at three strengths (a third of its default, its default, three times that) and two
learning rates, with five seeds; what it is compared by is the share of held-out pairs that its own implicit reward gets
right.
"""

import json
import pathlib

from jaxpo import losses
from jaxpo.config import Config, Data, Evaluate, Model, Optimizer, Reference, Rows, Train
from jaxpo.data.sources import read_rows
from jaxpo.experiment import import_module
from jaxpo.losses.registry import Loss
from jaxpo.study.design import Method, Study

HERE = pathlib.Path(__file__).resolve().parent
SHARED = HERE.parents[1] / 'shared'
PAIRS = pathlib.Path('runs/methods_pairs')
plain = import_module(str(HERE / 'every_method.py')).plain
STRENGTHS = {'ipo': 'tau', 'mi': 'alpha', 'orpo': 'odds_ratio_weight', 'slic': 'delta'}
"""The hyperparameter that says how strongly a method holds on to its prior, where that is not `beta`."""
LEARNING_RATES = (3e-4, 1e-3)
LEARNING_RATES_ALONE = (1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 2e-3)
"""Of a method without such a hyperparameter: as many settings as the others have."""


def pairs(split: str) -> str:
    """The file of a split's pairs as plain text, written when it is first asked for."""
    file = PAIRS / f'truthfulqa.{split}.jsonl'
    source = SHARED / f'data/ci/{file.name}'
    if not file.exists() and source.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = (row.fields for row in read_rows(str(source)))
        file.write_text(''.join(json.dumps(plain(row), ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
    return str(file)


def special(loss: Loss) -> str:
    """What a method needs beside pairs and one reference, or nothing."""
    needs = loss.needs_of({})
    columns = (*needs.pair_columns, *needs.completion_columns, *needs.token_columns)
    columns += ('corrupted_prompt',) if 'corrupted' in needs.companions else ()
    wanted = {'columns': columns, 'frozen models': needs.models}
    return '; '.join(f'{kind}: {", ".join(names)}' for kind, names in wanted.items() if names)


def method(loss: Loss) -> Method:
    """A loss with its defaults, tried at six settings."""
    name = STRENGTHS.get(loss.name, 'beta')
    grid = {'optimizer.learning_rate': LEARNING_RATES_ALONE}
    if name in loss.defaults:
        default = loss.defaults[name]
        strengths = tuple(float(f'{factor * default:.3g}') for factor in (1 / 3, 1, 3))
        grid = {f'objective.{loss.name}.{name}': strengths, 'optimizer.learning_rate': LEARNING_RATES}
    # What a reference says of tokens that are not there is in no table: it has to be at hand.
    live = {'forward_kl', 'reverse_kl', 'activations'} & {*loss.needs_of({}).statistics} or loss.token_masks
    return Method({loss.name: {}}, grid, {'references': {'start': Reference()}} if live else {})


def get_study() -> Study:
    base = Config(
        output='runs/methods',
        model=Model(source=str(SHARED / 'models/stories260k'), remat='none'),
        references={'start': Reference(table=True)},
        data=Data(pairs('train'), pairs('eval'), max_prompt_tokens=48, max_completion_tokens=40),
        # Long enough for every pair with kto's further completion: all methods have the same data.
        rows=Rows(layout='shared', lengths=(224,), microbatch=8, pairs_per_row=3),
        optimizer=Optimizer(warmup_steps=2),
        train=Train(batch_pairs=8, steps=24, evaluate_every=12),
        evaluate=Evaluate(pairs=120),
    )
    return Study(
        base=base,
        methods={name: method(loss) for name, loss in losses.LOSSES.items() if not special(loss)},
        metric='rewards/accuracies',
        cells_per_program=30,
        question='Which methods tell held-out best from best incorrect answers better than DPO, by their own rewards?',
    )
