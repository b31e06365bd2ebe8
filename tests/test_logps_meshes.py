"""The log-prob primitive on meshes of every kind, with padded heads, against the whole vocabulary in float64."""

import jax
import numpy as np
import pytest
import tiny_meshes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_heads import (
    assert_equal,
    cotangents_of,
    inputs,
    naive_values_and_gradients,
    our_values_and_gradients,
    padded,
    reference_of,
)

from jaxpo import sharding
from jaxpo.logps import DIVERGENCES, STATISTICS, Reference, token_statistics

pytestmark = pytest.mark.usefixtures('compiled_quickly')
ALL = ('logps', *STATISTICS)
VOCABULARY, PADDED, SOFTCAPS = 37, 40, (3.0, 2.0)
EVERY_KIND = [
    {'data': 8},
    {'fsdp': 8},
    {'tensor': 8},
    {'replica': 8},
    {'data': 2, 'fsdp': 4},
    {'data': 4, 'tensor': 2},
    {'data': 4, 'replica': 2},
    {'fsdp': 2, 'tensor': 4},
    {'fsdp': 4, 'replica': 2},
    {'tensor': 2, 'replica': 4},
    {'data': 2, 'fsdp': 2, 'tensor': 2},
    {'data': 2, 'fsdp': 2, 'replica': 2},
    {'data': 2, 'tensor': 2, 'replica': 2},
    {'fsdp': 2, 'tensor': 2, 'replica': 2},
]


def on_mesh(shape, vocabulary, rows, names):
    """Values and gradients of heads that are padded to `rows`, by the primitive, on a mesh or (None) one device."""
    hidden, head, targets, _ = inputs(vocabulary)
    reference = reference_of(vocabulary, SOFTCAPS[1])
    mesh = None if shape is None else tiny_meshes.mesh(**shape)

    def put(array, spec):
        return array if mesh is None else jax.device_put(array, NamedSharding(mesh, spec))

    split = P('tensor', 'fsdp')
    frozen = Reference(
        put(reference.hidden, sharding.ROWS), put(padded(reference.head, rows, seed=4), split), SOFTCAPS[1]
    )
    return our_values_and_gradients(
        put(hidden, sharding.ROWS),
        put(padded(head, rows), split),
        put(targets, sharding.ROWS),
        frozen,
        cotangents_of(names),
        softcap=SOFTCAPS[0],
        slab=8,
        vocabulary=vocabulary,
        mesh=mesh,
    )


def whole(vocabulary, names):
    """The same of heads without padding, in float64."""
    hidden, head, targets, _ = inputs(vocabulary)
    reference = reference_of(vocabulary, SOFTCAPS[1])
    return naive_values_and_gradients(hidden, head, reference, cotangents_of(names), SOFTCAPS[0], targets)


def assert_padding_has_no_say(ours, theirs, vocabulary):
    (values, (by_hidden, by_head)), (their_values, their_gradients) = ours, theirs
    assert_equal(values, their_values)
    assert_equal((by_hidden, by_head[:vocabulary]), their_gradients)
    assert not np.any(by_head[vocabulary:])


@pytest.fixture(scope='module')
def all_of_whole():
    return whole(VOCABULARY, ALL)


@pytest.mark.parametrize('shape', [None, *EVERY_KIND], ids=str)
def test_every_mesh_equals_the_whole_vocabulary(shape, all_of_whole):
    assert_padding_has_no_say(on_mesh(shape, VOCABULARY, PADDED, ALL), all_of_whole, VOCABULARY)


def test_devices_may_hold_nothing_but_padding():
    assert_padding_has_no_say(on_mesh({'tensor': 8}, 5, 16, ALL), whole(5, ALL), 5)


@pytest.mark.parametrize('name', STATISTICS)
def test_one_statistic_is_computed_alone(name):
    hidden, head, targets, _ = inputs(37)
    reference, cotangents = reference_of(37), cotangents_of([name])
    given = reference if name in DIVERGENCES else None
    ours = our_values_and_gradients(hidden, head, targets, given, cotangents, softcap=3.0, slab=8)
    assert_equal(ours, naive_values_and_gradients(hidden, head, reference, cotangents, 3.0))
    result = token_statistics(hidden, head, targets, statistics=(name,), reference=given, softcap=3.0, slab=8)
    assert all(getattr(result, other) is None for other in STATISTICS if other != name)
    np.testing.assert_array_equal(result.logps, token_statistics(hidden, head, targets, softcap=3.0, slab=8).logps)


@pytest.mark.parametrize('names', [('logps',), ('forward_kl',)], ids=str)
def test_one_statistic_is_computed_alone_on_a_mesh(names):
    ours = on_mesh({'data': 2, 'fsdp': 2, 'tensor': 2}, VOCABULARY, PADDED, names)
    assert_padding_has_no_say(ours, whole(VOCABULARY, names), VOCABULARY)
