"""Which attention kernels there are, what each can do, and which of them a model gets.

xla: dense scores, everywhere. splash: Pallas on a TPU, no array by the square of a row's length. cudnn: NVIDIA's
library. What a kernel cannot do is said before anything runs, and none is used in place of another that was named.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxpo.errors import InputError, unknown
from jaxpo.models.architecture import Architecture

KERNELS = {'xla': (), 'splash': ('tpu',), 'cudnn': ('gpu', 'cuda')}  # and their platforms, as devices say; xla has all
BLOCK = 128  # tokens: the least that splash takes at once, and what cuDNN is reported to need for masked gradients
NEAREST = 'Set it to auto, or to xla, which can do it.'
WIDEST_HEADS = {'splash': 256, 'cudnn': 128}


class Choice(NamedTuple):
    """The kernel a model gets, and why."""

    kernel: str
    reason: str


def choose(
    wanted: str, architecture: Architecture, *, platform: str, dtype: Any, lengths: Sequence[int], branches: int
) -> Choice:
    """The kernel for a model whose rows have `lengths` tokens, and up to `branches` completions to a segment.

    Args:
      wanted: a name of `KERNELS`, or `auto`: splash on a TPU where it can do what is asked, else xla.
      platform: that of the mesh's devices, which need not be those of this process.
      dtype: the compute dtype.

    Raises:
      InputError: an unknown name, or a kernel that cannot do what is asked of it.
    """
    if wanted not in ('auto', *KERNELS):
        raise unknown('attention kernel', wanted, ('auto', *KERNELS))
    asked = {'dtype': dtype, 'lengths': lengths, 'branches': branches}
    if wanted == 'auto':
        if platform != 'tpu':
            return Choice('xla', f'auto: on {platform}')
        obstacle = refusal('splash', architecture, **asked)
        return Choice('splash', 'auto: on tpu') if obstacle is None else Choice('xla', f'auto: {obstacle}')
    if KERNELS[wanted] and platform not in KERNELS[wanted]:
        where = KERNELS[wanted][0]
        raise InputError(f'model.attention {wanted}: it runs on {where} devices, not on {platform}. {NEAREST}')
    check(wanted, architecture, **asked)
    return Choice(wanted, 'as asked')


def check(kernel: str, architecture: Architecture, *, dtype: Any, lengths: Sequence[int], branches: int) -> None:
    """InputError for a kernel that is none, or cannot do what is asked of it, whatever it runs on."""
    if kernel not in KERNELS:
        raise unknown('attention kernel', kernel, KERNELS)
    obstacle = refusal(kernel, architecture, dtype=dtype, lengths=lengths, branches=branches)
    if obstacle is not None:
        model = f'{architecture.family} of {architecture.layers} layers'  # a run may have several models
        raise InputError(f'model.attention {kernel}, {model}: {obstacle}. {NEAREST}')


def refusal(
    kernel: str, architecture: Architecture, *, dtype: Any, lengths: Sequence[int], branches: int
) -> str | None:
    """Why a kernel cannot do what is asked of it, whatever it runs on; None where it can."""
    if kernel == 'xla':
        return None
    for length in lengths:
        if length % BLOCK:
            nearest = -(-length // BLOCK) * BLOCK
            return (
                f'{kernel} takes rows of multiples of {BLOCK} tokens: rows.lengths {length} would have to be {nearest}'
            )
    if architecture.head_dim % 8 or architecture.head_dim > WIDEST_HEADS[kernel]:
        return f'{kernel} takes heads of multiples of 8, up to {WIDEST_HEADS[kernel]} wide, not {architecture.head_dim}'
    if kernel == 'splash':
        return _window_refusal(architecture, max(lengths), branches)
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f'{kernel} computes in bfloat16, and model.dtype is {jnp.dtype(dtype)}'
    if architecture.attention_softcap is not None:
        return f'{kernel} has no soft-cap of scores, and the model has one of {architecture.attention_softcap}'
    return None


def _window_refusal(architecture: Architecture, length: int, branches: int) -> str | None:
    """Splash knows places, and behind the first completion of a shared prompt they run ahead of positions."""
    narrowest = min((window for window in architecture.windows if window is not None), default=length)
    if narrowest >= length or branches == 1:
        return None
    return (
        f'splash knows no sliding window of {narrowest} positions in rows of {length} tokens that share prompts: '
        'set rows.layout to packed, or rows.lengths to no more than the window'
    )
