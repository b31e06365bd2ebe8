"""16 cells of a model of 260,000 parameters: three methods at two settings, the baseline again, two seeds.

    jaxpo study benchmarks/stories_study.py     all cells, in one program
    jaxpo train benchmarks/stories_study.py     one of them, alone

`study.py` times both, and writes the pairs that they read.
"""

from jaxpo.config import Config, Data, Evaluate, Model, Optimizer, Reference, Rows, Train
from jaxpo.study.design import Method, Study

OUTPUT = 'runs/benchmark/study'


def get_config() -> Config:
    """A cell alone; what the cells share."""
    return Config(
        output=f'{OUTPUT}/alone',
        tables=f'{OUTPUT}/tables',
        model=Model(source='../shared/models/stories260k', remat='none'),
        references={'start': Reference('policy', table=True)},
        objective={'dpo': {'beta': 0.1}},
        data=Data(f'{OUTPUT}/plain.train.jsonl', f'{OUTPUT}/plain.eval.jsonl', max_prompt_tokens=64),
        rows=Rows(layout='shared', lengths=(256,), microbatch=16, pairs_per_row=8),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2),
        train=Train(batch_pairs=8, steps=60),
        evaluate=Evaluate(pairs=64),
    )


def get_study() -> Study:
    return Study(
        base=get_config(),
        methods={
            'dpo': Method({'dpo': {}}, {'objective.dpo.beta': (0.05, 0.1)}),
            'ipo': Method({'ipo': {}}, {'objective.ipo.tau': (0.05, 0.1)}),
            'hinge': Method({'hinge': {}}, {'objective.hinge.beta': (0.05, 0.1)}),
        },
        seeds=(0, 1),
        cells_per_program=16,
        question='How long do 16 cells take beside one?',
    )
