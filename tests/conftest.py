"""Strict JAX for every test: 8 virtual CPU devices, no silent broadcasting of ranks."""

import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import jax
import pytest

# XLA's emitters of fused loops take three quarters of the time in which a small program is compiled for a CPU. Where
# it still has the older ones, tests compile by those; `XLA_FLAGS= pytest` leaves the choice to it.
if jax.__version_info__ < (0, 11):
    os.environ.setdefault('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1')

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# A run that is stopped and goes on, here or in a process of its own, compiles the programs of the first again.
PROGRAMS = tempfile.TemporaryDirectory(prefix='programs-', ignore_cleanup_errors=True)
KEPT = {
    'jax_compilation_cache_dir': PROGRAMS.name,
    'jax_persistent_cache_min_compile_time_secs': 0.1,
    'jax_persistent_cache_min_entry_size_bytes': -1,
}
for name, value in KEPT.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)

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
