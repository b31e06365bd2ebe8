"""Accelerators as their makers describe them, one line each, and the groups of them that a plan is for."""

import dataclasses
import math
import re

from jaxpo.errors import InputError, unknown

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. Peaks are those of the data sheet: no program reaches them."""

    platform: str  # JAX's: tpu or cuda
    flops: float  # per second, dense bfloat16
    memory: float  # bytes of HBM
    memory_bandwidth: float  # bytes per second
    link_bandwidth: float  # bytes per second into the chip from its neighbours (half of what counts both directions)
    source: str  # where the numbers stand, and when they were read


CHIPS = {
    'v4': Chip('tpu', 275e12, 32 * GIB, 1200e9, 270e9, 'RECALLED'),
    'v5e': Chip('tpu', 197e12, 16 * GIB, 819e9, 200e9, 'docs.cloud.google.com/tpu/docs/v5e, read 2026-11-21'),
    'v5p': Chip('tpu', 459e12, 95 * GIB, 2765e9, 600e9, 'docs.cloud.google.com/tpu/docs/v5p, read 2026-11-21'),
    'v6e': Chip('tpu', 918e12, 32 * GIB, 1638e9, 400e9, 'docs.cloud.google.com/tpu/docs/v6e, read 2026-11-21'),
    'tpu7x': Chip(
        'tpu',
        2307e12,
        192 * GIB,
        7380e9,
        600e9,
        'docs.cloud.google.com/tpu/docs/tpu7x, read 2026-11-21; rates RECALLED',
    ),
    'h200': Chip('cuda', 989e12, 141e9, 4800e9, 450e9, 'RECALLED from the data sheet of the H200 SXM'),
}
PLANAR = ('v5e', 'v6e')  # a torus of two dimensions
PLANAR_TOPOLOGIES = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
LONGEST_SIDE = 24


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips that work together: `slices` groups of them, each connected by fast links."""

    name: str  # as the user wrote it: v5e:16x16
    chip: Chip
    kind: str  # a key of CHIPS
    sides: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        return math.prod(self.sides) * self.slices


def parse_topology(name: str, slices: int = 1) -> Topology:
    """`KIND:SIDES` as a Topology: v5e:16x16, v5p:4x4x4, h200:1x1x8 (the last: partitions x hosts x GPUs of a host).

    InputError for a kind that is not in CHIPS or a shape that its kind does not come in.
    """
    kind, _, shape = name.partition(':')
    if kind not in CHIPS:
        raise unknown('accelerator', kind, CHIPS)
    if slices < 1:
        raise InputError(f'--slices must be at least 1, not {slices}.')
    if CHIPS[kind].platform == 'cuda' and slices > 1:
        raise InputError(f'--slices is for TPUs: write the hosts of {kind} into the topology, as {kind}:1x{slices}x8.')
    if kind in PLANAR:
        if shape not in PLANAR_TOPOLOGIES:
            raise unknown(f'topology of {kind}', shape, PLANAR_TOPOLOGIES)
    elif not re.fullmatch(r'\d+x\d+x\d+', shape):
        raise InputError(f'--topology {name}: {kind} has three sides, as in {kind}:2x2x1 or {kind}:4x4x4.')
    sides = tuple(map(int, shape.split('x')))
    if CHIPS[kind].platform == 'tpu':
        for side in sides:
            if side not in (1, 2) and (side % 4 or not 0 < side <= LONGEST_SIDE):
                raise InputError(
                    f'--topology {name}: a side is 1, 2 or a multiple of 4 up to {LONGEST_SIDE}, not {side}.'
                )
    elif min(sides) < 1:
        raise InputError(f'--topology {name}: sides are at least 1.')
    return Topology(name, CHIPS[kind], kind, sides, slices)
