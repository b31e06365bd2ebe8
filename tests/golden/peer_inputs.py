"""Random pairs for the peers' losses: small, of unequal lengths, and exact in float32 as in float64."""

import json
import pathlib

import numpy as np

PROMPTS, CHOSEN, REJECTED = (2, 3, 1, 2), (3, 5, 1, 6), (5, 2, 6, 4)  # tokens of each of four pairs
TOKENS, VOCABULARY = 9, 7


def both(mismatched=False):
    """Two sets, whose pairs fall on either side of what losses distinguish.

    random: completions the policy finds unlikely; the mismatched ones have a negative log-ratio on average (KTO's KL
      is clamped); every WPO weight is small. The pairs' order by policy and by reference differs (AOT sorts).
    sure: completions the policy finds likely; KTO's KL is positive; WPO weights lie on both sides of 1.
    """
    made = {'random': pairs(10), 'sure': pairs(8, sure=3.0)}
    if mismatched:
        made['random']['mismatched'] = _mismatched(12, made['random'])
        made['sure']['mismatched'] = _mismatched(10, made['sure'])
    return made


def pairs(seed, sure=0.0):
    """Four pairs as eight rows, chosen before rejected, padded on the right, with logits of two models.

    Args:
      sure: added to the policy's logits of the tokens that follow.

    Returns:
      `tokens`, `attention_mask`, `completion_mask` `[8, T]` and `policy`, `reference` `[8, T, V]`, whose place t
      predicts the token t + 1. Lists, as JSON holds them.
    """
    random = np.random.default_rng(seed)
    prompts = [random.integers(0, VOCABULARY, length) for length in PROMPTS]
    lengths = list(zip(PROMPTS * 2, CHOSEN + REJECTED))
    tokens = random.integers(0, VOCABULARY, (len(lengths), TOKENS))
    place = np.arange(TOKENS)
    for row, prompt in enumerate(prompts * 2):
        tokens[row, : len(prompt)] = prompt
    attention_mask = np.array([place < prompt + completion for prompt, completion in lengths])
    completion_mask = attention_mask & np.array([place >= prompt for prompt, _ in lengths])
    policy = logits(random, len(lengths))
    next_token = np.roll(tokens, -1, axis=1)[..., None] == np.arange(VOCABULARY)
    return {
        'tokens': np.where(attention_mask, tokens, 0).tolist(),
        'attention_mask': attention_mask.astype(int).tolist(),
        'completion_mask': completion_mask.astype(int).tolist(),
        'policy': (policy + sure * next_token).tolist(),
        'reference': logits(random, len(lengths)).tolist(),
    }


def _mismatched(seed, inputs):
    """The same prompts, each with the completion of the row before it, as a trainer of unpaired rows makes them."""
    random = np.random.default_rng(seed)
    lengths = list(zip(PROMPTS * 2, (CHOSEN + REJECTED)[-1:] + (CHOSEN + REJECTED)[:-1]))
    tokens = np.zeros((len(lengths), TOKENS), int)
    masks = np.zeros((2, len(lengths), TOKENS), int)
    for row, (prompt, completion) in enumerate(lengths):
        tokens[row, :prompt] = inputs['tokens'][row][:prompt]
        source = (PROMPTS * 2)[row - 1]
        tokens[row, prompt : prompt + completion] = inputs['tokens'][row - 1][source : source + completion]
        masks[0, row, : prompt + completion] = 1
        masks[1, row, prompt : prompt + completion] = 1
    return {
        'tokens': tokens.tolist(),
        'attention_mask': masks[0].tolist(),
        'completion_mask': masks[1].tolist(),
        'policy': logits(random, len(lengths)).tolist(),
        'reference': logits(random, len(lengths)).tolist(),
    }


def logits(random, rows):
    return np.round(random.normal(0.0, 1.5, (rows, TOKENS, VOCABULARY)) * 64) / 64


def write(name, content):
    """Numbers are written so that they read back exactly."""
    path = pathlib.Path(__file__).with_name(name)
    path.write_text(json.dumps(content) + '\n')
    print(name, path.stat().st_size // 1024, 'KiB,', len(content['cases']), 'cases')
