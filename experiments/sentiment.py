"""True reward against KL where the reward is known: the controlled setting of Rafailov et al. 2023, section 6.1, small.

    python experiments/sentiment.py      # the model's own samples, made into pairs by the true reward
    jaxpo study experiments/sentiment.py
    jaxpo report runs/sentiment

The policy is stories260k (260 thousand parameters, trained on children's stories; read from a folder beside the
repository), which goes on with a story whose beginning it is given. The true reward is the sentiment of what it writes,
as the rules of VADER score it. Pairs are its own continuations, the best of six against the worst. Every method is
tried at three strengths and three learning rates; samples are taken before, half way and at the end, on prompts of
which one half chooses the settings and the other is reported. The larger run of this kind is quickstart.py.
"""

import dataclasses
import itertools
import json
import pathlib

import numpy as np
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from jaxpo import evaluate
from jaxpo.config import Config, Data, Evaluate, Model, Optimizer, Reference, Rows, Sample, Train
from jaxpo.data.prompts import read_prompts
from jaxpo.experiment import Experiment
from jaxpo.loading import load_start
from jaxpo.run import prepare
from jaxpo.study.design import Method, Study

SHARED = pathlib.Path(__file__).resolve().parents[2] / 'shared'
PAIRS = pathlib.Path('runs/sentiment_pairs')
TRAIN, EVALUATION = 400, 160
TOKENS = 48
ANALYZER = SentimentIntensityAnalyzer()

NAMES = ('Anna', 'Ben', 'Lily', 'Max', 'Mia', 'Sam', 'Sara', 'Tim', 'Tom', 'Zoe')
WHO = ('little girl', 'little boy', 'small cat', 'big dog', 'young bird', 'brown bear', 'old man', 'grey mouse')
WHAT = (
    'saw a box in the garden',
    'walked to the river',
    'heard a noise in the house',
    'met a stranger on the road',
    'wanted to play outside',
    'looked for a lost ball',
    'climbed up a tall tree',
    'found a key under the bed',
    'sat down next to the door',
    'asked mom for a cake',
)


def reward(prompt: str, completion: str) -> float:
    """Sentiment of the completion, from -1 (negative) to 1 (positive)."""
    return ANALYZER.polarity_scores(completion)['compound']


def get_config() -> Config:
    return Config(
        output='runs/sentiment',
        model=Model(source=str(SHARED / 'models/stories260k'), remat='none'),
        references={'start': Reference()},
        data=Data(
            train=str(PAIRS / 'train.jsonl'),
            evaluation=str(PAIRS / 'evaluation.jsonl'),
            max_prompt_tokens=64,
            max_completion_tokens=TOKENS,
        ),
        # Two pairs to a row, or one with kto's further completions.
        rows=Rows(layout='shared', lengths=(288,), microbatch=8, pairs_per_row=2),
        optimizer=Optimizer(learning_rate=1e-3, warmup_steps=2),
        train=Train(batch_pairs=8, steps=40, evaluate_every=20),
        evaluate=Evaluate(sample_prompts=EVALUATION // 2, show=0),
        sample=Sample(max_new_tokens=TOKENS, batch=EVALUATION),
    )


def get_study() -> Study:
    strengths = {
        'dpo': ('beta', (0.03, 0.1, 0.3)),
        'ipo': ('tau', (0.1, 0.3, 1.0)),
        'hinge': ('beta', (0.03, 0.1, 0.3)),
        'exo': ('beta', (0.03, 0.1, 0.3)),
        'kto': ('beta', (0.03, 0.1, 0.3)),
        'simpo': ('beta', (0.7, 2.0, 6.0)),
        'orpo': ('odds_ratio_weight', (0.1, 1.0, 10.0)),
    }
    return Study(
        base=get_config(),
        methods={
            name: Method({name: {}}, {f'objective.{name}.{field}': values})
            for name, (field, values) in strengths.items()
        },
        grid={'optimizer.learning_rate': (1e-4, 3e-4, 1e-3)},
        metric='reward',
        cells_per_program=15,
        question='Which methods earn more true reward than DPO from the same pairs, and at what KL?',
    )


def beginnings() -> list[str]:
    """The beginnings of stories, in an order of their own."""
    found = [
        f'Once upon a time, there was a {who} named {name}. One day, {name} {what}.'
        for name, who, what in itertools.product(NAMES, WHO, WHAT)
    ]
    return [found[place] for place in np.random.Generator(np.random.PCG64(0)).permutation(len(found))]


def write_pairs(split: str, prompts: list[str], seed: int) -> None:
    """Samples six continuations of each prompt; writes the best against the worst where their rewards differ."""
    file = PAIRS / f'{split}.jsonl'
    file.parent.mkdir(parents=True, exist_ok=True)
    listed = file.with_suffix('.txt')
    listed.write_text(''.join(prompt + '\n' for prompt in prompts), encoding='utf-8')
    config = get_config()
    # Some tokens more than are trained on, so that no continuation seems to have ended where it was cut.
    sample = dataclasses.replace(config.sample, max_new_tokens=TOKENS + 16)
    config = dataclasses.replace(config, sample=sample, train=dataclasses.replace(config.train, seed=seed))
    run = prepare(Experiment(pathlib.Path(__file__), config, reward))
    found = read_prompts(str(listed), config.data, run.tokenizer)
    groups = evaluate.generate(run, load_start(run, references=False).policy, found, 6, config.sample)
    lines = []
    for prompt, group in zip(found, groups):
        scored = []
        for generated in group:
            read, whole = (run.tokenizer.decode(tokens) for tokens in (generated.tokens[:TOKENS], generated.tokens))
            scored.append((reward(prompt.text, read), whole))
        (worst, rejected), (best, chosen) = min(scored), max(scored)
        if best > worst:
            row = {'prompt': prompt.text, 'chosen': chosen, 'rejected': rejected}
            lines.append(json.dumps({**row, 'chosen_reward': best, 'rejected_reward': worst}) + '\n')
    file.write_text(''.join(lines), encoding='utf-8')
    print(f'{len(lines)} pairs of {len(found)} prompts in {file}')


if __name__ == '__main__':
    every = beginnings()
    write_pairs('train', every[:TRAIN], seed=0)
    write_pairs('evaluation', every[TRAIN : TRAIN + EVALUATION], seed=1)
