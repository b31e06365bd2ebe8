"""Strict JAX for every test: 8 virtual CPU devices, no silent broadcasting of ranks."""

import os
import tempfile

# A run that is stopped and goes on, here or in a process of its own, compiles the programs of the first again.
PROGRAMS = tempfile.TemporaryDirectory(prefix='programs-', ignore_cleanup_errors=True)

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ['JAX_COMPILATION_CACHE_DIR'] = PROGRAMS.name
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.1'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import jax
import pytest

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


LONGEST_FIRST = ('tests/plan/test_pins.py', 'tests/processes/test_two_processes.py')


def pytest_collection_modifyitems(items):
    """Files whose tests are few and long go first: at the end, one worker would be left alone with them."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST_FIRST))


@pytest.fixture(autouse=True, scope='module')
def compiled_programs_are_freed():
    """Thousands of small programs would otherwise fill gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture(scope='module')
def compiled_quickly():
    """For modules of many large programs that are compared with each other: half the time goes without optimisation."""
    jax.clear_caches()
    jax.config.update('jax_disable_most_optimizations', True)
    yield
    jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture
def compiled_as_usual(compiled_quickly):
    """For a test about optimised programs in such a module."""
    jax.clear_caches()
    jax.config.update('jax_disable_most_optimizations', False)
    yield
    jax.clear_caches()
    jax.config.update('jax_disable_most_optimizations', True)


@pytest.fixture
def registry_as_it_was():
    """Losses that a test registers are gone after it."""
    from jaxpo import losses

    before = dict(losses.LOSSES)
    yield
    losses.LOSSES.clear()
    losses.LOSSES.update(before)
