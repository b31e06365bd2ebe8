"""What is kept of cells in training, every `train.checkpoint_every` steps, for whoever goes on with them.

    unfinished/BUNDLE/checkpoints/      the states of its cells, by Orbax
    unfinished/BUNDLE/STEP.json         what was found of each cell up to that step

A bundle that ended leaves nothing.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath

from jaxpo import processes, storage
from jaxpo.checkpoint import Checkpoints, open_checkpoints
from jaxpo.console import console
from jaxpo.state import TrainState
from jaxpo.study.programs import SHARED

KEEP = 2


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """Where the states of one bundle's cells are kept; nowhere, where it has no checkpoints."""

    directory: storage.Path
    checkpoints: Checkpoints | None

    def save(self, step: int, state: TrainState, progress: Sequence[dict[str, Any]]) -> None:
        """Keeps the cells' states after `step`, and what was found of each until then, as JSON has it."""
        if jax.process_index() == 0:
            storage.write_text(self.directory / f'{step}.json', json.dumps(progress))
        self.checkpoints.save(step, state)

    def resumed(self, state: TrainState) -> tuple[int, TrainState, list[dict[str, Any]]]:
        """The newest step that was kept, with the cells' states and what was found of them; else 0 and `state`.

        Args:
          state: the cells before their first step, on their devices.
        """
        done = processes.agree(self.checkpoints.latest()) or 0 if self.checkpoints is not None else 0
        if not done:
            return 0, state, []
        console().print(f'Going on after step {done}.')
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = self.checkpoints.restore(done, shapes, {name: getattr(state, name) for name in SHARED})
        text = processes.decide(lambda: (self.directory / f'{done}.json').read_text(encoding='utf-8'))
        return done, state, json.loads(text)


@contextlib.contextmanager
def kept(root: storage.Path, bundle: str, every: int | None) -> Iterator[Unfinished]:
    """What is kept of a bundle while its cells are trained, in the study's directory `root`; deleted at the end."""
    directory = root / 'unfinished' / bundle
    if every is None:
        yield Unfinished(directory, None)
        return
    with open_checkpoints(directory / 'checkpoints', KEEP) as checkpoints:
        yield Unfinished(directory, checkpoints)
    processes.wait_for_all('bundle ended')
    if jax.process_index() == 0:
        epath.Path(str(directory)).rmtree()
