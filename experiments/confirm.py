"""A hypothesis of methods.py on seeds that it has not seen: do rewards that are means over tokens lead DPO?

    jaxpo study experiments/confirm.py
    jaxpo report runs/confirm

The four methods that led there and DPO, each at the setting that was chosen for it there, with twenty new seeds and
nothing left to choose. Model, pairs and budget are those of methods.py, the held-out pairs too: what is confirmed is
confirmed of them.
"""

import dataclasses
import pathlib

from jaxpo.experiment import import_module
from jaxpo.study.design import Method, Study

methods = import_module(str(pathlib.Path(__file__).parent / 'methods.py'))
CHOSEN = {
    'dpo': ('beta', 0.1, 3e-4),
    'simpo': ('beta', 0.667, 1e-3),
    'alpha_dpo': ('beta', 2.5, 1e-3),
    'alpha_po': ('beta', 0.833, 1e-3),
    'rainbow_po': ('beta', 10.0, 1e-3),
}
"""The strength and the learning rate of each."""


def get_study() -> Study:
    explored = methods.get_study()
    return dataclasses.replace(
        explored,
        base=dataclasses.replace(explored.base, output='runs/confirm'),
        methods={
            name: Method({name: {field: value}}, settings={'optimizer.learning_rate': rate})
            for name, (field, value, rate) in CHOSEN.items()
        },
        seeds=tuple(range(100, 120)),
        cells_per_program=20,
        question='Do rewards that are means over tokens tell held-out pairs better than DPO, on seeds not seen before?',
    )
