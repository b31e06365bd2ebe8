"""What settings that save memory save: the train step compiled ahead of time for a TPU, one change at a time.

    pip install -e '.[plan]' && python benchmarks/memory.py

Nothing is run, so nothing is said of time. Qwen2.5-0.5B's sizes, 4 pairs of up to 1024 tokens on each of 4 v5e chips.
"""

import dataclasses
import json
import pathlib
import tempfile

from jaxpo.config import Config, Data, Lora, Mesh, Model, Optimizer, Reference, Rows, Train
from jaxpo.console import bytes_text
from jaxpo.errors import InputError
from jaxpo.experiment import Experiment
from jaxpo.objective import spelled_out
from jaxpo.plan.chips import parse_topology
from jaxpo.plan.hardware import describe
from jaxpo.plan.program import Program, compile_step, example_batch
from jaxpo.run import prepare

SIZES = {
    'model_type': 'qwen2',
    'vocab_size': 151936,
    'hidden_size': 896,
    'num_hidden_layers': 24,
    'num_attention_heads': 14,
    'num_key_value_heads': 2,
    'intermediate_size': 4864,
    'max_position_embeddings': 32768,
    'rms_norm_eps': 1e-6,
    'rope_theta': 1000000.0,
    'hidden_act': 'silu',
    'tie_word_embeddings': True,
}
TOPOLOGY = 'v5e:2x2'
CHANGES = {
    'as it is: remat full, splash, AdamW, live reference, fsdp 4': {},
    'attention xla': {'model': {'attention': 'xla'}},
    'remat dots': {'model': {'remat': 'dots'}},
    'remat none': {'model': {'remat': 'none'}},
    'reference from a table': {'reference': {'table': True}},
    'reference in pinned host memory': {'reference': {'memory': 'pinned_host'}},
    'AdamW, first moment in bfloat16': {'optimizer': {'moment_dtype': 'bfloat16'}},
    'Adafactor': {'optimizer': {'kind': 'adafactor'}},
    'adapters of rank 16': {'lora': {'rank': 16}},
    'microbatches of 1 row a chip': {'rows': {'microbatch': 4}},
    'fsdp 2, tensor 2': {'mesh': {'fsdp': 2, 'tensor': 2}},
    'data 4: parameters whole on each chip': {'mesh': {'fsdp': 1}},
}


def experiment(source: str, change: dict) -> Experiment:
    """The experiment with one change."""
    config = Config(
        output='runs/memory',
        model=Model(source=source, dtype='bfloat16'),
        references={'initial': Reference(**change.get('reference', {}))},
        objective=spelled_out({'dpo': {}}, ('initial',)),
        data=Data(max_prompt_tokens=256, max_completion_tokens=384),
        rows=Rows(lengths=(1024,), microbatch=16, pairs_per_row=1),
        optimizer=Optimizer(),
        mesh=Mesh(fsdp=4),
        train=Train(batch_pairs=16),
    )
    for section in ('model', 'optimizer', 'rows', 'mesh'):
        changed = dataclasses.replace(getattr(config, section), **change.get(section, {}))
        config = dataclasses.replace(config, **{section: changed})
    return Experiment(pathlib.Path('memory.py'), dataclasses.replace(config, lora=Lora(**change.get('lora', {}))), None)


def main() -> None:
    devices = describe(parse_topology(TOPOLOGY))
    print(f'| Qwen2.5-0.5B on {TOPOLOGY} | arguments | temporaries | all at once |\n|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        config = pathlib.Path(folder) / 'config.json'
        config.write_text(json.dumps(SIZES))
        for name, change in CHANGES.items():
            print(f'| {name} | {row(f"random:{config}", change, devices)} |', flush=True)


def row(source: str, change: dict, devices) -> str:
    try:
        run = prepare(experiment(source, change), devices, planned=True)
    except InputError as problem:
        return f'refused: {problem} | | '
    found = compile_step(run, example_batch(run))
    if not isinstance(found, Program):
        needed = f'{bytes_text(found.needed)} asked for' if found.needed else 'no room'
        return f'| | does not fit: {needed}'
    memory = found.memory
    return ' | '.join(map(bytes_text, (memory.arguments, memory.temporaries, memory.total)))


if __name__ == '__main__':
    main()
