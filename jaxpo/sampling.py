"""Completions of prompts, in batches: one prefill, then a loop over a cache of keys and values, all under one jit."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpo.errors import InputError
from jaxpo.models.cache import Cache, empty_cache
from jaxpo.models.decoder import Decoder, head_weight
from jaxpo.sharding import ROWS, put, read, row_multiple

_LEAST_SLOTS = 16
_OPEN = -1  # in place of an end token: the row has not ended


@dataclasses.dataclass(frozen=True)
class Generated:
    """One completion."""

    tokens: np.ndarray  # int32, without the end token
    end: int | None  # the token that ended it; None where it was cut at max_new_tokens
    logp: float  # nats: summed over `scored_tokens`, under the policy at temperature 1

    @property
    def ended(self) -> bool:
        return self.end is not None

    @property
    def scored_tokens(self) -> np.ndarray:
        """The tokens that were drawn: int32, the end token included."""
        return self.tokens if self.end is None else np.append(self.tokens, np.int32(self.end))


def generate(
    decoder: Decoder,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    end_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    completions: int = 1,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    mesh: jax.sharding.Mesh | None = None,
) -> list[list[Generated]]:
    """The `completions` completions of each prompt (int token ids), in the prompts' order.

    Temperature 0 takes the likeliest token; otherwise tokens are drawn from the likeliest ones that hold `top_p` of
    the tempered probability. A draw depends on the seed, the prompt's index (its place, unless `indices` says
    another) and the completion's number, and on nothing else of the batch. With the `mesh` that holds the parameters,
    the rows of a batch are split over it. Raises InputError for a prompt that is empty or leaves no room, and for
    values out of range.
    """
    counts = {'max_new_tokens': max_new_tokens, 'completions': completions, 'batch_size': batch_size}
    _check(decoder, prompts, end_ids, temperature, top_p, **counts)
    indices = range(len(prompts)) if indices is None else indices
    if len(indices) != len(prompts):
        raise InputError(f'{len(indices)} indices for {len(prompts)} prompts.')
    jobs = [(place, number) for place in range(len(prompts)) for number in range(completions)]
    jobs.sort(key=lambda job: len(prompts[job[0]]))  # neighbours in length share a bucket
    settings = _Settings(
        end_ids=np.asarray(sorted(end_ids), np.int32),
        limit=np.int32(max_new_tokens),
        temperature=np.float32(temperature),
        top_p=np.float32(top_p),
        seed=np.uint32(seed),
    )
    devices = 1 if mesh is None else row_multiple(mesh)
    row_count = -(-batch_size // devices) * devices
    done: dict[tuple[int, int], Generated] = {}
    for start in range(0, len(jobs), batch_size):
        batch = jobs[start : start + batch_size]
        arrays = _lay_out([(prompts[place], indices[place], number) for place, number in batch], row_count)
        arrays = arrays if mesh is None else put(arrays, mesh, ROWS)
        result = _generate_batch(decoder, _bucket(max_new_tokens), params, *arrays, settings)
        result = read(result)
        for row, job in enumerate(batch):
            tokens = result.tokens[row, : result.length[row]]
            end = int(result.end[row])
            done[job] = Generated(tokens, None if end == _OPEN else end, float(result.logp[row]))
    return [[done[place, number] for number in range(completions)] for place in range(len(prompts))]


class _Settings(NamedTuple):
    """Traced, so that none of them compiles anything (the number of end ids aside)."""

    end_ids: np.ndarray
    limit: np.ndarray
    temperature: np.ndarray
    top_p: np.ndarray
    seed: np.ndarray


class _State(NamedTuple):
    step: jax.Array  # tokens chosen so far, the same for all rows
    token: jax.Array  # [B] int32: the last one chosen
    tokens: jax.Array  # [B, N] int32
    length: jax.Array  # [B] int32: tokens before the end
    end: jax.Array  # [B] int32: the token that ended it, or _OPEN
    logp: jax.Array  # [B] float32
    cache: Cache


class _Result(NamedTuple):
    tokens: Any
    length: Any
    end: Any
    logp: Any


def _check(
    decoder: Decoder,
    prompts: Sequence[np.ndarray],
    end_ids: Sequence[int],
    temperature: float,
    top_p: float,
    **counts: int,
) -> None:
    if not temperature >= 0:
        raise InputError(f'temperature must be 0 or more, not {temperature}.')
    if not 0 < top_p <= 1:
        raise InputError(f'top_p must be above 0 and at most 1, not {top_p}.')
    for name, value in counts.items():
        if value < 1:
            raise InputError(f'{name} must be at least 1, not {value}.')
    architecture = decoder.architecture
    for token in end_ids:
        if not 0 <= token < architecture.vocabulary:
            raise InputError(f'End id {token} is outside the vocabulary of {architecture.vocabulary}.')
    max_new_tokens = counts['max_new_tokens']
    room = architecture.max_positions - max_new_tokens
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f'Prompt {place} is empty: generation needs at least one token.')
        strange = [int(token) for token in prompt if not 0 <= token < architecture.vocabulary]
        if strange:
            raise InputError(f'Prompt {place} has token {strange[0]}: the vocabulary has {architecture.vocabulary}.')
        if len(prompt) > room:
            raise InputError(
                f'Prompt {place} has {len(prompt)} tokens; with max_new_tokens {max_new_tokens} the model has room '
                f'for {room} of its {architecture.max_positions} positions.'
            )


def _bucket(tokens: int) -> int:
    """The power of two that holds so many tokens: few shapes, few compilations."""
    return max(_LEAST_SLOTS, 1 << (tokens - 1).bit_length())


def _lay_out(jobs: list[tuple[np.ndarray, int, int]], rows: int) -> tuple[np.ndarray, ...]:
    """Right-aligned prompts [B, P], their lengths, indices and completion numbers [B]; spare rows have length 0."""
    tokens = np.zeros((rows, _bucket(max(len(prompt) for prompt, _, _ in jobs))), np.int32)
    columns = np.zeros((3, rows), np.int32)
    for row, (prompt, index, number) in enumerate(jobs):
        tokens[row, -len(prompt) :] = prompt
        columns[:, row] = len(prompt), index, number
    return (tokens, *columns)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate_batch(
    decoder: Decoder,
    new_slots: int,
    params: Any,
    prompts: jax.Array,
    lengths: jax.Array,
    indices: jax.Array,
    numbers: jax.Array,
    settings: _Settings,
) -> _Result:
    # Kernels would be cast in every step; norms, of rank 2, are used in float32.
    params = jax.tree.map(lambda leaf: leaf.astype(decoder.dtype) if leaf.ndim == 3 else leaf, params)
    head = head_weight(params).astype(decoder.dtype)
    keys = jax.vmap(functools.partial(_job_key, settings.seed))(indices, numbers)
    count, slots = prompts.shape
    place = jnp.arange(slots, dtype=jnp.int32)[None, :] - (slots - lengths)[:, None]
    segment = (place >= 0).astype(jnp.int32)
    # Behind a barrier, or XLA spends seconds folding the attention to a cache it knows to be empty.
    cache = jax.lax.optimization_barrier(empty_cache(decoder.architecture, count, slots + new_slots, decoder.dtype))

    def read(tokens: jax.Array, positions: jax.Array, segment: jax.Array, cache: Cache) -> Any:
        """The logits [B, V] after the last of the tokens [B, T], and the cache with them."""
        branch = jnp.zeros_like(tokens)
        hidden, cache = decoder.apply({'params': params}, tokens, positions, segment, branch, cache)
        return _logits(decoder, head, hidden[:, -1]), cache

    def extend(state: _State) -> _State:
        positions = lengths + state.step - 1
        real = jnp.ones_like(positions)[:, None]
        logits, cache = read(state.token[:, None], positions[:, None], real, state.cache)
        return _choose(state._replace(cache=cache), logits, keys, lengths > 0, settings)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < settings.limit) & jnp.any((state.end == _OPEN) & (lengths > 0))

    logits, cache = read(prompts, jnp.maximum(place, 0), segment, cache)
    none = jnp.zeros((count,), jnp.int32)
    state = _State(
        jnp.int32(0), none, jnp.zeros((count, new_slots), jnp.int32), none, none + _OPEN, jnp.zeros((count,)), cache
    )
    state = jax.lax.while_loop(unfinished, extend, _choose(state, logits, keys, lengths > 0, settings))
    return _Result(state.tokens, state.length, state.end, state.logp)


def _choose(state: _State, logits: jax.Array, keys: jax.Array, real: jax.Array, settings: _Settings) -> _State:
    """The state with one more token chosen for every row that is real and has not ended."""
    step_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
    token = jax.lax.cond(
        settings.temperature > 0,
        lambda: _draw(logits, step_keys, settings.temperature, settings.top_p),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
    active = real & (state.end == _OPEN)
    ends = active & jnp.any(token[:, None] == settings.end_ids[None, :], axis=-1)
    kept = active & ~ends
    column = jnp.where(kept, token, 0)[:, None]
    return state._replace(
        step=state.step + 1,
        token=token,
        tokens=jax.lax.dynamic_update_slice_in_dim(state.tokens, column, state.step, axis=1),
        length=state.length + kept.astype(jnp.int32),
        end=jnp.where(ends, token, state.end),
        logp=state.logp + jnp.where(active, logps, 0.0),
    )


def _draw(logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array) -> jax.Array:
    """One token id per row [B] of logits [B, V], each by its own key."""
    logits = logits / temperature
    logits = jax.lax.cond(top_p < 1, lambda: nucleus(logits, top_p), lambda: logits)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Logits `[B, V]` with all but the fewest likeliest tokens that hold `top_p` at -inf; equals of the last stay.

    The least probability that stays is found by bisection: a sort of the vocabulary takes several times as long.
    """
    probabilities = jax.nn.softmax(logits, axis=-1)
    ordered = jax.lax.bitcast_convert_type(probabilities, jnp.int32)  # floats from 0 up are ordered as their bits
    above_one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        enough, too_little = bounds
        middle = enough + (too_little - enough) // 2
        mass = jnp.sum(jnp.where(ordered >= middle, probabilities, 0.0), axis=-1, keepdims=True)
        return jnp.where(mass >= top_p, middle, enough), jnp.where(mass >= top_p, too_little, middle)

    start = jnp.zeros((logits.shape[0], 1), jnp.int32)
    least, _ = jax.lax.fori_loop(0, 30, halve, (start, start + above_one))
    return jnp.where(ordered >= least, logits, -jnp.inf)


def _logits(decoder: Decoder, head: jax.Array, hidden: jax.Array) -> jax.Array:
    """Float32 logits [B, V] of hidden states [B, D]."""
    logits = jnp.einsum('bd,vd->bv', hidden, head, preferred_element_type=jnp.float32)
    logits = logits[:, : decoder.architecture.vocabulary]  # its padding is no token
    cap = decoder.architecture.final_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _job_key(seed: jax.Array, index: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), number)
