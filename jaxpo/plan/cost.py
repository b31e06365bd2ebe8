"""What a step costs by arithmetic: a compiled program does not tell, for it counts the body of a loop once.

One unit is a forward pass. A backward pass is two more; what is computed again for it (remat, and the head's logits
always) counts as executed, never as the model's own.
"""

from typing import NamedTuple

import jax
import numpy as np

from jaxpo import sharding
from jaxpo.loading import abstract_state
from jaxpo.models.architecture import Architecture
from jaxpo.plan.chips import Topology
from jaxpo.run import Run
from jaxpo.types import Batch, Pair

_TRAINED = {'none': 3.0, 'dots': 3.0, 'full': 4.0}  # units of the policy's layers, by remat
_HEAD_TRAINED = 4.0  # logits, logits again, and the two products of their derivative


class Work(NamedTuple):
    """One optimizer step, over all devices."""

    tokens: float  # of pairs, as they lie in rows: a shared prompt once
    pairs: int
    model_flops: float  # of forward and backward passes over these tokens, of references' forward passes
    executed_flops: float  # padding and what is computed twice included
    memory_bytes: float  # of one device: what its products and its optimizer read and write


class Times(NamedTuple):
    """Lower bounds on a step, in seconds, were each of these all there is to do."""

    compute: float
    memory: float
    links: float

    @property
    def roofline(self) -> float:
        return max(self)


def work(run: Run, batch: Batch, pair: Pair) -> Work:
    """The work of a step on a batch (its shapes) of `train.batch_pairs` pairs like `pair`.

    FLOPs are those of matrix products, 2 for each multiply and add, attention counted at what tokens see
    (model) or at the whole of their rows (executed, where the kernel computes it so).
    """
    pairs = run.config.train.batch_pairs
    prompts = 1 if run.config.rows.layout == 'shared' else 2
    lengths = (pair.prompt.size, pair.chosen.size, pair.rejected.size)
    tokens = pairs * (prompts * lengths[0] + lengths[1] + lengths[2])
    microbatches, rows, width = batch.tokens.shape
    slots, scored = microbatches * rows * width, microbatches * rows * batch.source.shape[-1]
    twice = 1.0 if run.objective.couples_batch and microbatches > 1 else 0.0

    ours = run.pretrained.architecture
    seen = pairs * _seen(*lengths, prompts)
    model = 3 * _forward(ours, tokens, seen, pairs * (lengths[1] + lengths[2]))
    executed = (_TRAINED[run.config.model.remat] + twice) * layers(ours, slots, _computed(run, slots, width))
    executed += (_HEAD_TRAINED + twice) * head(ours, scored)
    for name in _live(run):
        theirs = run.pretrained_of(name).architecture
        model += _forward(theirs, tokens, seen, pairs * (lengths[1] + lengths[2]))
        executed += (1 + twice) * (layers(theirs, slots, _computed(run, slots, width)) + head(theirs, scored))
    return Work(tokens, pairs, model, executed, _memory_bytes(run, microbatches, slots))


def times(topology: Topology, done: Work, devices: int, received: float) -> Times:
    """The bounds on a topology, of `devices` devices of which each takes in `received` bytes from others."""
    chip, share = topology.chip, topology.chips / devices
    return Times(
        done.executed_flops / (chip.flops * topology.chips),
        done.memory_bytes / (chip.memory_bandwidth * share),
        received / (chip.link_bandwidth * share),
    )


def _live(run: Run) -> list[str]:
    """Frozen models that the step runs itself."""
    read = {*run.objective.models, *(run.objective.references if run.objective.runs_references else ())}
    return [name for name, model in run.models.frozen.items() if name in read and model.weights != 'table']


def _seen(prompt: int, chosen: int, rejected: int, prompts: int) -> float:
    """Pairs of a query and a key that it sees, in one pair."""

    def own(tokens):
        return tokens * (tokens + 1) / 2

    return prompts * own(prompt) + own(chosen) + own(rejected) + prompt * (chosen + rejected)


def _computed(run: Run, slots: int, width: int) -> float:
    """Pairs of a query and a key that the kernel computes: all of a row, or half of it once for each view."""
    if run.attention_of(run.pretrained).kernel != 'splash':
        return slots * width
    return slots * width / 2 * (2 if run.config.rows.layout == 'shared' else 1)


def _forward(architecture: Architecture, tokens: float, seen: float, scored: float) -> float:
    return layers(architecture, tokens, seen) + head(architecture, scored)


def layers(architecture: Architecture, tokens: float, seen: float) -> float:
    """FLOPs of one pass through the layers: the products with kernels, and queries with keys, then with values."""
    attention = 4 * architecture.heads * architecture.head_dim * seen
    return architecture.layers * (2 * sum(a * b for a, b in kernels(architecture)) * tokens + attention)


def head(architecture: Architecture, scored: float) -> float:
    return 2 * (architecture.vocabulary + architecture.padding) * architecture.width * scored


def kernels(architecture: Architecture) -> list[tuple[int, int]]:
    """Inputs and outputs of each kernel of a layer."""
    width, hidden = architecture.width, architecture.hidden
    query = architecture.heads * architecture.head_dim
    key = architecture.key_value_heads * architecture.head_dim
    return [
        (width, query),
        (width, key),
        (width, key),
        (query, width),
        (width, hidden),
        (width, hidden),
        (hidden, width),
    ]


def _memory_bytes(run: Run, microbatches: int, slots: int) -> float:
    """Bytes that one device moves in a step: each product reads its factors and writes its result, each pass again;
    the optimizer reads and writes what it keeps, and reads a gradient."""
    shapes, shardings = abstract_state(run)
    kept = sharding.bytes_per_device((shapes.params, shapes.opt_state), (shardings.params, shardings.opt_state))
    gradient = sharding.bytes_per_device(shapes.params, shardings.params)
    item, tensor = np.dtype(run.dtype).itemsize, run.mesh.shape['tensor']
    share = slots / sharding.row_multiple(run.mesh)

    def passes(architecture, units):
        factors = sum(a * b for a, b in kernels(architecture)) * architecture.layers / tensor * item * microbatches
        values = sum(a + b for a, b in kernels(architecture)) * architecture.layers / tensor * item * share
        return units * (factors + values)

    moved = passes(run.pretrained.architecture, _TRAINED[run.config.model.remat])
    moved += sum(passes(run.pretrained_of(name).architecture, 1.0) for name in _live(run))
    return 2 * kept + gradient + moved


def received_bytes(run: Run, batch: Batch) -> float:
    """Bytes that one device takes in by a step, by arithmetic: weights gathered over fsdp for each pass, gradients
    scattered over it and summed over copies, hidden states summed over tensor twice a layer and pass."""
    mesh, item = run.mesh.shape, np.dtype(run.dtype).itemsize
    microbatches, rows, width = batch.tokens.shape
    units = _TRAINED[run.config.model.remat] + len(_live(run))
    weights = parameters(run) / mesh['tensor'] * item * microbatches
    gathered = weights * (units + 1) * (1 - 1 / mesh['fsdp'])
    copies = mesh['replica'] * mesh['data']
    summed = 2 * 4 * parameters(run) / mesh['tensor'] / mesh['fsdp'] * (1 - 1 / copies)
    hidden = microbatches * rows * width / sharding.row_multiple(run.mesh) * run.pretrained.architecture.width * item
    shared = 2 * 2 * units * run.pretrained.architecture.layers * hidden * (1 - 1 / mesh['tensor'])
    return gathered + summed + shared


def state_bytes(run: Run) -> dict[str, int]:
    """Bytes on one device by part of the state."""
    shapes, shardings = abstract_state(run)
    parts = {
        'policy': 'params',
        'optimizer': 'opt_state',
        'references': 'reference_params',
        'frozen base': 'base_params',
        'averages': 'average_params',
    }
    found = {
        name: sharding.bytes_per_device(getattr(shapes, part), getattr(shardings, part)) for name, part in parts.items()
    }
    return {name: size for name, size in found.items() if size}


def parameters(run: Run) -> int:
    """Parameters of the policy."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_state(run)[0].params))
