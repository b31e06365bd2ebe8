"""Topologies by name: what is accepted, and how the rest is refused before a compiler sees it."""

import pytest

from jaxpo.errors import InputError
from jaxpo.plan.chips import CHIPS, parse_topology


@pytest.mark.parametrize(
    'name, slices, chips',
    [('v5e:16x16', 1, 256), ('v6e:4x4', 2, 32), ('v5p:4x4x4', 1, 64), ('v4:2x2x1', 1, 4), ('h200:1x1x8', 1, 8)],
)
def test_chips_are_counted(name, slices, chips):
    assert parse_topology(name, slices).chips == chips


@pytest.mark.parametrize(
    'name, slices, said',
    [
        ('v7x:2x2', 1, 'v4, v5e'),
        ('v5e:1x2', 1, '2x2'),  # the compiler knows none of these
        ('v5e:16x32', 1, '16x16'),  # and would take the whole process down with it
        ('v5p:4x4', 1, 'three sides'),
        ('v5p:4x4x6', 1, 'a multiple of 4'),
        ('v5e', 1, '16x16'),
        ('v5e:2x2', 0, 'at least 1'),
        ('h200:1x1x8', 2, 'h200:1x2x8'),
        ('h200:0x1x8', 1, 'at least 1'),
    ],
)
def test_what_does_not_exist_is_refused(name, slices, said):
    with pytest.raises(InputError, match=said):
        parse_topology(name, slices)


def test_no_chip_is_faster_than_light():
    """Orders of magnitude: a number in the wrong unit shows."""
    for chip in CHIPS.values():
        assert 1e14 < chip.flops < 1e16 and 1e10 < chip.memory < 1e12
        assert 1e11 < chip.link_bandwidth < chip.memory_bandwidth < 1e13
