"""Tiny studies of language models, and what they say without timings."""

import contextlib
import dataclasses
import pathlib

import jax
import tiny_runs

from jaxpo.config import Mesh, Rows, Train
from jaxpo.study import language_model, programs
from jaxpo.study.bundles import bundles
from jaxpo.study.design import Method, Study, expand
from jaxpo.study.workshop import Workshop


def base(folder: pathlib.Path, **changes):
    """The config that all cells share: 3 steps, on all devices."""
    settings = {'mesh': Mesh(), 'rows': Rows(lengths=(64,), microbatch=8, pairs_per_row=2)}
    settings |= {'train': Train(batch_pairs=6, steps=3), 'tables': str(folder / 'tables')}
    made = tiny_runs.experiment(folder, **settings | changes).config
    if not (folder / 'held_out.jsonl').exists():
        tiny_runs.write_pairs(folder / 'held_out.jsonl', 12, seed=1)
    data = dataclasses.replace(made.data, evaluation=str(folder / 'held_out.jsonl'))
    return dataclasses.replace(made, data=data)


@contextlib.contextmanager
def cell_mesh_of(count: int):
    """The mesh of cells has this many devices."""
    whole = programs.cell_mesh
    programs.cell_mesh = lambda devices=None: whole(jax.devices()[:count])
    try:
        yield
    finally:
        programs.cell_mesh = whole


def run(study: Study, devices: int = 8, only=lambda cell: True):
    """What came of every cell, by method, setting and repeat; nothing is written but tables."""
    workshop, found = Workshop(study, pathlib.Path('experiment.py'), None, lambda filled: None), {}
    with cell_mesh_of(devices):
        for bundle in bundles(study, [cell for cell in expand(study) if only(cell)], devices):
            workshop.check(bundle)
            for cell, outcome in language_model.run_bundle(workshop, bundle, lambda step: None):
                found[cell.method, str(cell.setting), cell.repeat] = cell, outcome
    return found


def small(folder: pathlib.Path) -> Study:
    """Three cells, one after the other, in the directory `study` of a folder that is made where it is not."""
    folder.mkdir(exist_ok=True)
    shared = base(folder, output=str(folder / 'study'))
    return Study(shared, {'dpo': Method({'dpo': {}}), 'ipo': Method({'ipo': {}})}, seeds=(0,))
