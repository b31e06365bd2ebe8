"""The arrays that flow through a step: their shapes and units, said once.

R rows, T tokens of a row, S scored tokens of a row, P pair slots of a row, C tokens of a completion,
K references, B pairs (B = R * P, empty slots included: their `pair_weight` is 0).
"""

import dataclasses

import flax.struct
import jax
import numpy as np

TABLE_STATISTICS = ('logps', 'entropy')
"""Numbers a token that a table of a reference may hold."""


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A prompt and a completion of it, as token ids on the host: int32 vectors."""

    prompt: np.ndarray
    completion: np.ndarray


@dataclasses.dataclass(frozen=True)
class Pair:
    """One audited preference as token ids, on the host. int32 vectors.

    An unpaired row (one completion that is desirable or undesirable) is a pair whose other completion is empty.
    """

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    index: int  # its place in the audited data set
    row: int = dataclasses.field(default=-1, kw_only=True)  # its place among the rows that were read; -1: of none
    columns: dict[str, float | np.ndarray] = dataclasses.field(default_factory=dict)
    """Numbers of its row by column name: one for the pair (`margin`) or for a completion (`chosen_score`), or a
    float32 vector with one for each token of a completion (`chosen_segment`)."""
    companions: dict[str, Sequence] = dataclasses.field(default_factory=dict)
    """Further sequences that are scored with the pair, by the name a loss knows them by."""
    table: dict[str, dict[str, dict[str, np.ndarray]]] = dataclasses.field(default_factory=dict)
    """What reference tables say: completion (`chosen`, `rejected`, a companion's name) -> reference -> statistic of
    TABLE_STATISTICS -> float32 vector, one number a token; `length` is one number."""


@flax.struct.dataclass
class Places:
    """Where the tokens of one completion of each pair lie among its row's scored tokens."""

    place: jax.Array  # [R, P, C] int32: place in S of each token; 0 where weightless
    weights: jax.Array  # [R, P, C] float32: 1 on completion tokens, 0 elsewhere


@flax.struct.dataclass
class Batch:
    """Rows of tokens and where the completions lie in them. Every index is local to its row.

    A token attends to the tokens of its own `segment` whose position is not later than its own and whose
    `branch` is 0 (the prompt) or its own. In a padded or packed row each completion has a segment of its own,
    with a copy of the prompt; where prompts are shared, a pair is one segment of prompt, chosen and rejected.
    Companions have segments of their own always.
    """

    tokens: jax.Array  # [R, T] int32; 0 where segment is 0
    positions: jax.Array  # [R, T] int32: place in prompt + completion, not in the row
    segment: jax.Array  # [R, T] int32: 1.. ; 0 is padding
    branch: jax.Array  # [R, T] int32: 0 prompt, 1 chosen (or a companion's completion), 2 rejected
    source: jax.Array  # [R, S] int32: place in the row of the hidden state that predicts a scored token
    target: jax.Array  # [R, S] int32: id of the scored token
    chosen: Places
    rejected: Places
    companions: dict[str, Places]  # by name
    pair_weight: jax.Array  # [R, P] float32: 1 for a pair, 0 for an empty slot
    pair_index: jax.Array  # [R, P] int32: the pair's index in the data set; -1 for an empty slot
    columns: dict[str, jax.Array]  # name -> [R, P] float32, or [R, P, C] for one number a completion token
    table: dict[str, dict[str, dict[str, jax.Array]]] = flax.struct.field(default_factory=dict)
    """As `Pair.table`: float32 `[R, P, C]`, 0 where weightless; `length` is `[R, P]`."""


@flax.struct.dataclass
class TokenStatistics:
    """What the vocabulary says of scored tokens, float32, nats, all of one shape `[...]`; None where not asked for."""

    logps: jax.Array
    forward_kl: jax.Array | None = None  # KL(reference || policy) of the next token
    reverse_kl: jax.Array | None = None  # KL(policy || reference)
    entropy: jax.Array | None = None  # of this model's distribution
    log_sum_squares: jax.Array | None = None  # log of the sum over the vocabulary of squared probabilities
    mean_logit: jax.Array | None = None  # over the vocabulary; a logit, not nats


@flax.struct.dataclass
class Completion:
    """One side of B pairs: token log-probabilities under the policy and K references. float32, nats.

    All below `weights` is there only if a loss of the objective asks for it (`losses.registry.Needs`).
    """

    policy_logps: jax.Array  # [B, C]; 0 where weightless
    reference_logps: jax.Array  # [K, B, C]; never differentiated; K may be 0
    weights: jax.Array  # [B, C]; 1 on completion tokens, 0 on padding
    forward_kl: jax.Array | None = None  # [B, C]: KL(reference || policy) of the token's distribution
    reverse_kl: jax.Array | None = None  # [B, C]: KL(policy || reference)
    entropy: jax.Array | None = None  # [B, C]: of the policy
    log_sum_squares: jax.Array | None = None  # [B, C]: log sum_v pi(v)^2
    reference_entropy: jax.Array | None = None  # [B, C]; never differentiated
    columns: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    """Numbers of the data by name, the prefix `chosen_` or `rejected_` taken off: `[B]`, or `[B, C]` by token."""
    model_logps: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    """`[B, C]` under each frozen model that has a role of its own beside the references; never differentiated."""
    activations: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    """`[N, B, C]` by kind: means over features of the reference's N activations of that kind; not differentiated."""
    masks: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    """`[B, C]` by name: what the loss's `token_masks` made of the reference's hidden states."""
    prompt_hidden: jax.Array | None = None  # [B, D]: the policy's last hidden state of the prompt; not differentiated
    by_reference: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    """`[K, B, C]`: `forward_kl`, `reverse_kl`, `reference_entropy` of each reference, before one is made of them."""
    reference_lengths: jax.Array | None = None  # [K, B]: tokens by each one's own tokenizer; None: all as the policy's
    mixing_weights: jax.Array | None = None  # [K, B], sum 1 over K; for losses that take many references as they are
    companions: dict[str, 'Completion'] = flax.struct.field(default_factory=dict)
    """Further completions scored with the pair, by name (`mismatched`, `corrupted`); the chosen side holds them."""
    vocabulary: int = flax.struct.field(pytree_node=False, default=0)  # V of the policy's head


@flax.struct.dataclass
class Rewards:
    """Implicit rewards as the loss sees them (beta times the score), nats, one per completion."""

    chosen: jax.Array  # [B]
    rejected: jax.Array  # [B]
