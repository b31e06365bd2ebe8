"""Further sequences that are scored with a pair, for losses that ask for them by name."""

from collections.abc import Sequence as Many

import numpy as np

from jaxpo.data.chat import prompt_ids
from jaxpo.data.sources import Example, Rejection
from jaxpo.errors import InputError
from jaxpo.types import Pair, Sequence


def corrupted(prompt, example: Example, pair: Pair, tokenizer, max_prompt_tokens: int) -> Sequence:
    """The pair's chosen tokens behind a corrupted prompt, which is of the same kind as the prompt: text or messages.

    Rejection: it is no prompt, or no other than the pair's, which is trimmed alike.
    """
    if isinstance(prompt, str) != isinstance(example.prompt, str):
        raise Rejection('corrupted prompt refused', "it is not of the prompt's kind, text or messages")
    try:
        ids = prompt_ids(prompt, tokenizer, max_prompt_tokens)
    except Rejection as rejection:
        raise Rejection('corrupted prompt refused', str(rejection)) from rejection
    if np.array_equal(ids, pair.prompt):
        raise Rejection('corrupted prompt is the prompt')
    return Sequence(ids, pair.chosen)


def mismatched(pairs: Many[Pair]) -> list[Sequence]:
    """For each pair, a completion of another prompt behind its own: as KTO's KL term is estimated with.

    It is taken from the next pair with another prompt (behind the last comes the first): its chosen completion for
    pairs at even places, its rejected for those at odd ones; an unpaired row's only one. InputError: one prompt in all.
    """
    donors = _next_with_another_prompt([pair.prompt.tobytes() for pair in pairs])
    found = []
    for place, pair in enumerate(pairs):
        donor = pairs[donors[place]]
        sides = (donor.chosen, donor.rejected) if place % 2 == 0 else (donor.rejected, donor.chosen)
        found.append(Sequence(pair.prompt, next(side for side in sides if side.size)))
    return found


def _next_with_another_prompt(prompts: list[bytes]) -> list[int]:
    if len(set(prompts)) < 2:
        raise InputError(
            f'The losses of the objective put completions behind prompts of other rows, but all {len(prompts)} usable '
            'rows have one prompt. Give data with several.'
        )
    count, other = len(prompts), {}
    for place in range(2 * count - 1, -1, -1):  # twice around, as the end needs to know the start
        here, behind = place % count, (place + 1) % count
        other[here] = behind if prompts[behind] != prompts[here] else other.get(behind)
    return [other[place] for place in range(count)]
