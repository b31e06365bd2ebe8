"""Tiny PEFT adapters for the configs of tiny_decoders. Names are written out here, apart from the reader's own."""

import json
import pathlib
import re

import numpy as np
import safetensors.numpy
from tiny_checkpoints import hugging_face_shapes

MODULES = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj')


def peft_config(**changes):
    """adapter_config.json of plain LoRA; None as a change leaves the key out."""
    settings = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM',
        'base_model_name_or_path': 'somewhere/else',
        'r': 4,
        'lora_alpha': 6,
        'lora_dropout': 0.05,
        'target_modules': ['q_proj', 'v_proj', 'down_proj'],
        'bias': 'none',
        'fan_in_fan_out': False,
        'inference_mode': True,
        'modules_to_save': None,
    }
    settings |= changes
    return {name: value for name, value in settings.items() if name not in changes or value is not None}


def peft_tensors(config, rank=4, modules=('q_proj', 'v_proj', 'down_proj'), seed=3):
    """Random float32 factors of these modules in all layers, by PEFT's name, loud enough to matter."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in sorted(hugging_face_shapes(config).items()):
        found = re.fullmatch(r'(model\.layers\.\d+\.\w+\.(\w+))\.weight', name)
        if found and found.group(2) in modules:
            outputs, inputs = shape
            for factor, size in {'A': (rank, inputs), 'B': (outputs, rank)}.items():
                values = rng.normal(0, 0.3, size).astype(np.float32)
                tensors[f'base_model.model.{found.group(1)}.lora_{factor}.weight'] = values
    return tensors


def write_peft(path, settings, tensors):
    """The directory that PEFT would write."""
    path.mkdir(parents=True)
    (path / 'adapter_config.json').write_text(json.dumps(settings))
    safetensors.numpy.save_file(tensors, pathlib.Path(path) / 'adapter_model.safetensors', {'format': 'pt'})
    return path
