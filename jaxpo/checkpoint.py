"""Checkpoints of a run, written by Orbax in the background and restored onto any mesh.

Saved: step, policy, optimizer, and what the method keeps of its own. References are frozen, so they are read again
from their own sources.
"""

import contextlib
from collections.abc import Iterator

import jax
from orbax.checkpoint import v1 as ocp

from jaxpo import storage
from jaxpo.errors import InputError
from jaxpo.state import TrainState


class Checkpoints:
    """The checkpoints in one directory. A step counts as saved only once it is committed."""

    def __init__(self, checkpointer: ocp.training.Checkpointer):
        self._checkpointer = checkpointer
        self._pending = None

    def latest(self) -> int | None:
        """The newest committed step, or None."""
        self.wait()
        newest = self._checkpointer.latest
        return None if newest is None else newest.step

    def save(self, step: int, state: TrainState) -> None:
        """Starts to write the state at `step`, after the save before it is committed.

        Raises whatever that earlier save raised: an error never waits longer than one save.
        """
        self.wait()
        if self.latest() != step:
            self._pending = self._checkpointer.save_async(step, _saved(state), force=True)

    def wait(self) -> None:
        """Returns once the last save is committed; raises if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def restore(self, step: int, shapes: TrainState, unsaved: dict[str, dict]) -> TrainState:
        """The state saved at `step`.

        Args:
          shapes: a TrainState of ShapeDtypeStructs with the shardings wanted now, of any mesh.
          unsaved: `reference_params` and `base_params`, which are frozen and not in the checkpoint.
        """
        saved = self._checkpointer.load(step, _saved(shapes))
        return TrainState(**saved, **unsaved)

    def restore_without_optimizer(self, step: int, shapes: TrainState, unsaved: dict[str, dict]) -> TrainState:
        """The state saved at `step` as far as evaluation reads it; arguments as for `restore`."""
        wanted = _saved(shapes)
        unread = {'opt_state': jax.tree.map(lambda _: ocp.PLACEHOLDER, wanted['opt_state'])}
        saved = self._checkpointer.load(step, wanted | unread)
        return TrainState(**saved | {'opt_state': ()}, **unsaved)


def _saved(state: TrainState) -> dict:
    names = ('step', 'params', 'opt_state', 'method_state', 'method_params', 'average_params')
    return {name: getattr(state, name) for name in names}


@contextlib.contextmanager
def open_checkpoints(directory: storage.Path, keep: int) -> Iterator[Checkpoints]:
    """The checkpoints of a run; waits on leaving until what was begun is committed. Keeps the newest `keep`."""
    checkpointer = ocp.training.Checkpointer(
        storage.absolute(directory),
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        preservation_policy=ocp.training.preservation_policies.LatestN(keep),
        cleanup_tmp_directories=True,
    )
    checkpoints = Checkpoints(checkpointer)
    try:
        yield checkpoints
        checkpoints.wait()
    finally:
        checkpointer.close()


def check_room(directory: storage.Path, shapes: TrainState, keep: int) -> None:
    """InputError where the disk cannot hold `keep` checkpoints and the one being written, or a bucket takes no file."""
    if storage.is_remote(directory):
        storage.check_writable(directory)
        return
    needed = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_saved(shapes))) * (keep + 1)
    existing, free = storage.free_bytes(directory)
    if needed > free:
        raise InputError(
            f'No room on the disk: {keep} checkpoints and one being written take {needed / 2**30:.1f} GiB, '
            f'{existing} has {free / 2**30:.1f} GiB free. Lower train.keep_checkpoints or change output.'
        )
