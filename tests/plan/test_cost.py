"""Arithmetic of a step, against counting token by token and against what XLA counts of one layer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_plans import TINY

from jaxpo.config import Config, Data, Mesh, Model, Reference, Rows, Train
from jaxpo.experiment import Experiment
from jaxpo.models.decoder import Decoder, abstract_params
from jaxpo.objective import spelled_out
from jaxpo.plan import cost
from jaxpo.plan.chips import parse_topology
from jaxpo.plan.program import example_batch, example_pair
from jaxpo.run import prepare

WIDTH, HEADS, KEY_HEADS, HEAD_DIM, HIDDEN, LAYERS, VOCABULARY = 256, 4, 4, 64, 512, 2, 1024


def run_of(folder, layers=LAYERS, layout='shared', table=False, **mesh):
    (folder / 'config.json').write_text(json.dumps(TINY | {'num_hidden_layers': layers}))
    config = Config(
        output='runs/planned',
        model=Model(source=f'random:{folder / "config.json"}', dtype='bfloat16', attention='xla'),
        references={'initial': Reference(table=table)},
        objective=spelled_out({'dpo': {}}, ('initial',)),
        data=Data(max_prompt_tokens=20, max_completion_tokens=12),
        rows=Rows(layout=layout, lengths=(64,), microbatch=8, pairs_per_row=1),
        mesh=Mesh(**mesh),
        train=Train(batch_pairs=16),
    )
    return prepare(Experiment(folder / 'experiment.py', config, None), planned=True)


def counted(prompt, completion, prompts):
    """Multiplications and additions of one forward pass over one pair, token by token."""
    kernels = WIDTH * HEADS * HEAD_DIM * 2 + WIDTH * KEY_HEADS * HEAD_DIM * 2 + 3 * WIDTH * HIDDEN
    total = 0
    for copy in range(prompts):
        places = range(prompt if copy < prompts else 0)
        for place in places:
            total += LAYERS * (2 * kernels + 2 * 2 * HEADS * HEAD_DIM * (place + 1))
    for _ in range(2):
        for place in range(completion):
            total += LAYERS * (2 * kernels + 2 * 2 * HEADS * HEAD_DIM * (prompt + place + 1))
            total += 2 * WIDTH * VOCABULARY
    return total


@pytest.mark.parametrize('layout, prompts', [('shared', 1), ('padded', 2)])
def test_model_flops_are_those_of_tokens_and_what_they_see(tmp_path, layout, prompts):
    for table, passes in ((False, 4), (True, 3)):
        run = run_of(tmp_path, layout=layout, table=table)
        pair, batch = example_pair(run), example_batch(run)
        assert (pair.prompt.size, pair.chosen.size) == (20, 12)
        done = cost.work(run, batch, pair)
        assert done.model_flops == passes * 16 * counted(20, 12, prompts)
        assert done.tokens == 16 * (prompts * 20 + 24)
        assert done.executed_flops > done.model_flops  # padding, remat, and the head's logits twice


def test_a_layer_is_counted_as_the_compiler_counts_it(tmp_path):
    """One layer: the compiler counts a loop's body once, whatever its rounds."""
    run = run_of(tmp_path, layers=1)
    architecture = run.pretrained.architecture
    rows = [jax.ShapeDtypeStruct((2, 64), jnp.int32)] * 4
    decoder = Decoder(architecture, dtype=jnp.bfloat16)
    lowered = jax.jit(lambda params, *rows: decoder.apply({'params': params}, *rows)).lower(
        abstract_params(architecture), *rows
    )
    theirs = lowered.cost_analysis()['flops']
    ours = cost.layers(architecture, 2 * 64, 2 * 64 * 64)
    assert ours < theirs < 1.2 * ours  # the rest is norms, rotations and softmax


def test_bounds_are_what_they_say(tmp_path):
    run = run_of(tmp_path, fsdp=8)
    done = cost.work(run, example_batch(run), example_pair(run))
    bounds = cost.times(parse_topology('v5e:2x4'), done, 8, 400e9)
    assert bounds.compute == pytest.approx(done.executed_flops / (8 * 197e12))
    assert bounds.links == pytest.approx(2.0) and bounds.roofline == bounds.links
    two = cost.times(parse_topology('tpu7x:2x2x1'), done, 8, 600e9)  # two devices share a chip
    assert two.links == pytest.approx(2.0)


def test_what_is_held_and_sent_falls_as_the_mesh_says(tmp_path):
    whole, split = run_of(tmp_path, data=8), run_of(tmp_path, data=1, fsdp=8)
    for part, size in cost.state_bytes(whole).items():
        assert cost.state_bytes(split)[part] == pytest.approx(size / 8, rel=0.02)
    batch = example_batch(whole)
    gradients = 4 * 2 * cost.parameters(whole) * 7 / 8
    assert cost.received_bytes(whole, batch) == pytest.approx(gradients)
    microbatches = batch.tokens.shape[0]
    weights = 2 * cost.parameters(split) * microbatches * 7 / 8
    assert cost.received_bytes(split, batch) == pytest.approx(6 * weights)  # five passes, and gradients back
    assert np.isfinite(cost.work(split, batch, example_pair(split)).memory_bytes)
