"""What a compiled program sends between devices: read from its text, loops counted as often as they run."""

import collections
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'bf16': 2, 'f16': 2, 's16': 2, 'u16': 2, 'f32': 4, 's32': 4, 'u32': 4}
_BYTES |= {'f64': 8, 's64': 8, 'u64': 8}
_HEADER = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(')
_ARRAY = re.compile(r'([a-z]+\d*)\[([\d,]*)\]')
_CALLED = re.compile(r'(?:calls|to_apply|body|condition|called_computations=\{|branch_computations=\{)=?%?([\w.\-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


class Collective(NamedTuple):
    """One instruction that devices take part in together."""

    kind: str  # of KINDS
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dimensions of each array of its result
    group: int  # devices that exchange with one another
    times: int  # that a step runs it
    source: str  # the operation of the program it came from, as JAX names it

    @property
    def result_bytes(self) -> int:
        return sum(_BYTES.get(dtype, 4) * math.prod(shape) for dtype, shape in self.shapes)

    @property
    def received_bytes(self) -> float:
        """Bytes that a device takes in, each time, by the best known algorithm on a ring."""
        others = (self.group - 1) / self.group if self.group else 0.0
        factor = {'reduce-scatter': self.group * others, 'all-reduce': 2 * others, 'collective-permute': 1.0}
        return self.result_bytes * factor.get(self.kind, others)


def collectives(text: str) -> list[Collective]:
    """The collectives of an optimised HLO program, in its order. A loop whose count is not written counts once.

    One that runs beside other work is written in several pieces (its start, its middle, its end) with one channel: it
    is one collective.
    """
    computations, entry = _computations(text)
    times: dict[str, int] = collections.defaultdict(int)
    _count(entry, 1, computations, times)
    found, channels = [], set()
    for name, lines in computations.items():
        for line in lines:
            one, channel = _collective(line, times[name]), _channel(line)
            if one is not None and one.times and (one.kind, channel) not in channels:
                found.append(one)
                channels |= {(one.kind, channel)} if channel else set()
    return found


def by_kind(found: list[Collective]) -> dict[str, tuple[int, int, float]]:
    """Kind -> instructions, times that a step runs them, and bytes that a device takes in by them in a step."""
    totals = {}
    for kind in KINDS:
        ours = [one for one in found if one.kind == kind]
        if ours:
            totals[kind] = (
                len(ours),
                sum(one.times for one in ours),
                sum(one.times * one.received_bytes for one in ours),
            )
    return totals


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = '', None
    for line in text.splitlines():
        if lines is None:
            header = _HEADER.match(line)
            if header and '->' in line:
                lines = computations.setdefault(header[2], [])
                entry = header[2] if header[1] else entry
        elif line.rstrip() == '}':  # a kernel's own metadata may go over several lines, which begin with one too
            lines = None
        else:
            lines.append(line)
    return computations, entry


def _count(name: str, times: int, computations: Mapping[str, list[str]], totals: dict[str, int]) -> None:
    """Adds to each computation how often a run of `name`, `times` over, runs it."""
    totals[name] += times
    for line in computations.get(name, ()):
        loop = re.search(r' while\(.*condition=%?([\w.\-]+).*body=%?([\w.\-]+)', line)
        if loop:
            _count(loop[2], times * _trips(line, computations.get(loop[1], ())), computations, totals)
            continue
        for called in _called(line):
            if called in computations:
                _count(called, times, computations, totals)


def _called(line: str) -> list[str]:
    names = re.findall(r'(?:calls|true_computation|false_computation)=%?([\w.\-]+)', line)
    branches = _BRANCHES.search(line)
    return names + (re.findall(r'%?([\w.\-]+)', branches[1]) if branches else [])


def _trips(line: str, condition) -> int:
    """How often a loop's body runs: as the compiler noted it, or the constant that its counter is compared with."""
    known = re.search(r'known_trip_count[^\d]*(\d+)', line)
    if known:
        return int(known[1])
    constants = dict(re.findall(r'%([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)', '\n'.join(condition)))
    for compared in re.findall(r'compare\(([^)]*)\), direction=LT', '\n'.join(condition)):
        for operand in re.findall(r'%([\w.\-]+)', compared):
            if operand in constants:
                return int(constants[operand])
    return 1


def _channel(line: str) -> str | None:
    found = re.search(r'channel_id=(\d+)', line)
    return found[1] if found else None


def _collective(line: str, times: int) -> Collective | None:
    instruction = _INSTRUCTION.match(line)
    if instruction is None:
        return None
    opcode = instruction[3].removesuffix('-start')
    if opcode not in KINDS:
        return None
    arrays = [(dtype, tuple(int(n) for n in dims.split(',') if n)) for dtype, dims in _ARRAY.findall(instruction[2])]
    if instruction[3].endswith('-start') and opcode != 'all-reduce':
        arrays = [array for array in arrays if array[1]]  # without what it keeps of its own progress
        arrays = arrays[len(arrays) // 2 :]  # a start's result holds its operands too
    source = re.search(r'op_name="([^"]*)"', line)
    return Collective(opcode, tuple(arrays), _group(line), times, source[1] if source else '')


def _group(line: str) -> int:
    """Devices in one replica group, in any of the ways a program writes them."""
    listed = re.search(r'replica_groups=\{\{([\d,]+)\}', line)
    if listed:
        return listed[1].count(',') + 1
    counted = re.search(r'replica_groups=\[(\d+),(\d+)\]<=', line)
    if counted:
        return int(counted[2])
    named = re.search(r'replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}', line)
    if named:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", named[1])}
        return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", named[2]))
    return 2 if 'source_target_pairs' in line else 1
