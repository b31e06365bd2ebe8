"""The arrays that flow through a step: their shapes and units, said once.

R rows, T tokens of a row, S scored tokens of a row, P pair slots of a row, C tokens of a completion,
K references, B pairs (B = R * P, empty slots included: their `pair_weight` is 0).
"""

import dataclasses

import flax.struct
import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Pair:
    """One audited preference pair as token ids, on the host. int32 vectors, none empty but perhaps `prompt`.

    `columns` holds the extra numeric columns of its row, by name; `index` is its place in the audited data set.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    index: int
    columns: dict[str, float] = dataclasses.field(default_factory=dict)


@flax.struct.dataclass
class Batch:
    """Rows of tokens and where the completions lie in them. Every index is local to its row.

    A token attends to the tokens of its own `segment` whose position is not later than its own and whose
    `branch` is 0 (the prompt) or its own. In a padded or packed row each completion has a segment of its own,
    with a copy of the prompt; where prompts are shared, a pair is one segment of prompt, chosen and rejected.
    """

    tokens: jax.Array  # [R, T] int32; 0 where segment is 0
    positions: jax.Array  # [R, T] int32: place in prompt + completion, not in the row
    segment: jax.Array  # [R, T] int32: 1.. ; 0 is padding
    branch: jax.Array  # [R, T] int32: 0 prompt, 1 chosen, 2 rejected
    source: jax.Array  # [R, S] int32: place in the row of the hidden state that predicts a scored token
    target: jax.Array  # [R, S] int32: id of the scored token
    chosen: jax.Array  # [R, P, C] int32: place in S of each token of the chosen completion; 0 where weightless
    rejected: jax.Array  # [R, P, C] int32
    chosen_weights: jax.Array  # [R, P, C] float32: 1 on completion tokens, 0 elsewhere
    rejected_weights: jax.Array  # [R, P, C] float32
    pair_weight: jax.Array  # [R, P] float32: 1 for a pair, 0 for an empty slot
    pair_index: jax.Array  # [R, P] int32: the pair's index in the data set; -1 for an empty slot
    columns: dict[str, jax.Array]  # name -> [R, P] float32


@flax.struct.dataclass
class TokenStatistics:
    """What the vocabulary says of scored tokens, in nats, float32, all of one shape `[...]`."""

    logps: jax.Array


@flax.struct.dataclass
class Completion:
    """One side of B pairs: token log-probabilities under the policy and K references. float32, nats."""

    policy_logps: jax.Array  # [B, C]; 0 where weightless
    reference_logps: jax.Array  # [K, B, C]; never differentiated; K may be 0
    weights: jax.Array  # [B, C]; 0 on padding


@flax.struct.dataclass
class Rewards:
    """Implicit rewards as the loss sees them (beta times the score), nats, one per completion."""

    chosen: jax.Array  # [B]
    rejected: jax.Array  # [B]
