"""requirements-tpu.txt: exact versions of all that jaxpo imports, for each Python, within pyproject.toml's bounds."""

import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parents[2]
LINES = [line for line in (ROOT / 'requirements-tpu.txt').read_text().splitlines() if line and line[0] != '#']
PINS = [Requirement(line) for line in LINES]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
NEEDED = [Requirement(line) for line in (*PROJECT['dependencies'], *PROJECT['optional-dependencies']['gcs'])]


def pinned(python: str) -> dict[str, Requirement]:
    found = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate({'python_version': python})]
    names = [canonicalize_name(pin.name) for pin in found]
    assert len({*names}) == len(names), f'pinned twice for {python}'
    return dict(zip(names, found))


def version_of(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix('==')


def test_every_version_is_exact():
    for pin in PINS:
        assert re.fullmatch(r'==[0-9]+(\.[0-9]+)+', str(pin.specifier)), pin


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.13'])
def test_every_dependency_and_what_buckets_need_is_pinned_within_its_bounds(python):
    pins = pinned(python)
    for dependency in NEEDED:
        pin = pins[canonicalize_name(dependency.name)]
        assert dependency.extras <= pin.extras
        assert dependency.specifier.contains(version_of(pin)), f'{pin} is not {dependency}'


@pytest.mark.parametrize('python, jax', [('3.11', '0.10.2'), ('3.12', '0.12.0.1'), ('3.13', '0.12.0.1')])
def test_jax_brings_its_own_libtpu(python, jax):
    pins = pinned(python)
    assert pins['jax'].extras == {'tpu'} and version_of(pins['jax']) == jax
    assert not {'libtpu', 'jaxlib', 'torch'} & {*pins}
