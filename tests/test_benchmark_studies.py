"""The studies that are timed: as many cells as is said of them, and all of them in one program."""

import dataclasses
import pathlib

import pytest

from jaxpo.experiment import import_module
from jaxpo.study.bundles import bundles
from jaxpo.study.design import expand

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / 'benchmarks'


@pytest.mark.parametrize(
    ('module', 'seeds', 'count'),
    [('stories_study.py', (0, 1), 16), ('smollm2_study.py', (0, 1), 8), ('smollm2_study.py', (0, 1, 2), 12)],
)
def test_cells_share_one_program(module, seeds, count):
    study = dataclasses.replace(import_module(str(BENCHMARKS / module)).get_study(), seeds=seeds)
    cells = expand(study)
    for devices in (1, 2):
        (bundle,) = bundles(study, cells, devices)
        assert len(bundle.cells) == len(cells) == bundle.at_once == count
