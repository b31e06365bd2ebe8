"""Experiments to plan: their models are configs alone, for nothing of a model is read but its sizes."""

import json
import os
import pathlib
import subprocess
import sys

LLAMA_8B = {
    'model_type': 'llama',
    'vocab_size': 128256,
    'hidden_size': 4096,
    'num_hidden_layers': 32,
    'num_attention_heads': 32,
    'num_key_value_heads': 8,
    'intermediate_size': 14336,
    'max_position_embeddings': 131072,
    'rms_norm_eps': 1e-5,
    'rope_theta': 500000.0,
    'hidden_act': 'silu',
    'tie_word_embeddings': False,
}
LLAMA_70B = LLAMA_8B | {
    'hidden_size': 8192,
    'num_hidden_layers': 80,
    'num_attention_heads': 64,
    'intermediate_size': 28672,
}
TINY = LLAMA_8B | {
    'vocab_size': 1024,
    'hidden_size': 256,
    'num_hidden_layers': 2,
    'num_attention_heads': 4,
    'num_key_value_heads': 4,
    'intermediate_size': 512,
}

MODULE = """\
from jaxpo.config import Config, Data, Mesh, Model, Rows, Train

def get_config():
    return Config(
        output='runs/planned',
        model=Model(source='random:{config}', dtype='bfloat16'),
        data=Data(max_prompt_tokens={prompt}, max_completion_tokens={completion}),
        rows=Rows(lengths=({length},), microbatch={devices}, pairs_per_row=1),
        mesh=Mesh(fsdp={devices}),
        train=Train(batch_pairs={devices}),
    )
"""


def write_module(folder: pathlib.Path, config: dict, devices: int, length: int = 2048) -> pathlib.Path:
    """An experiment of one pair a device, its rows full: a quarter prompt, the rest two completions."""
    (folder / 'config.json').write_text(json.dumps(config))
    path, prompt = folder / 'experiment.py', length // 4
    sizes = {'prompt': prompt, 'completion': (length - prompt) // 2, 'length': length, 'devices': devices}
    path.write_text(MODULE.format(config=folder / 'config.json', **sizes))
    return path


def jaxpo(*arguments, **environment) -> subprocess.CompletedProcess:
    """The command in a process of its own: planning decides what JAX runs on."""
    command = [sys.executable, '-m', 'jaxpo', *map(str, arguments)]
    settings = {'COLUMNS': '120', 'JAX_ENABLE_COMPILATION_CACHE': 'false', **environment}
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | settings)
