"""Writes peft_logits.json: logits of transformers with PEFT adapters on tiny models, all made by NumPy seeds.

Run from the repository root, with torch and peft installed: PYTHONPATH=tests python tests/golden/make_peft_golden.py
"""

import json
import pathlib
import tempfile

import numpy as np
import peft
import torch
import transformers
from golden.make_decoder_golden import AT, logits_of, torch_model
from tiny_adapters import MODULES, peft_tensors
from tiny_decoders import CONFIGS, loud_params, tokens_of

CASES = {
    'llama3': {'r': 4, 'lora_alpha': 6, 'target_modules': list(MODULES)},
    'qwen2': {'r': 2, 'lora_alpha': 3, 'target_modules': ['q_proj', 'v_proj']},
    'qwen3-windowed': {'r': 3, 'lora_alpha': 2, 'target_modules': ['o_proj', 'k_proj', 'up_proj'], 'use_rslora': True},
    'mistral': {'r': 5, 'lora_alpha': 5, 'target_modules': ['self_attn.q_proj', 'gate_proj'], 'lora_dropout': 0.1},
    'gemma2': {'r': 4, 'lora_alpha': 8, 'target_modules': 'all-linear'},
}


def short(modules):
    """The modules of `target_modules`, by the last part of their names."""
    return MODULES if modules == 'all-linear' else tuple(name.split('.')[-1] for name in modules)


def adapted(name, directory):
    """PEFT's model of a case, saved to the directory."""
    settings = CASES[name]
    model = peft.get_peft_model(
        torch_model(CONFIGS[name], loud_params(CONFIGS[name])), peft.LoraConfig(task_type='CAUSAL_LM', **settings)
    )
    tensors = peft_tensors(CONFIGS[name], settings['r'], short(settings['target_modules']))
    loaded = peft.set_peft_model_state_dict(model, {name: torch.tensor(value) for name, value in tensors.items()})
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if 'lora_' in key], loaded
    model.save_pretrained(directory)
    return model.eval()


def main():
    models = {}
    for name in CASES:
        with tempfile.TemporaryDirectory() as folder:
            tokens = tokens_of(CONFIGS[name], 1, 40)
            logits = logits_of(adapted(name, folder), tokens)[:, AT]
            settings = json.loads((pathlib.Path(folder) / 'adapter_config.json').read_text())
            # A set in PEFT: sorted, so that two runs write the same file.
            if isinstance(settings['target_modules'], list):
                settings['target_modules'].sort()
        models[name] = {
            'adapter_config': settings,
            'tokens': tokens.tolist(),
            'at': AT,
            'logits': np.round(logits.astype(np.float64), 6).tolist(),
        }
    made_by = f'peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}'
    path = pathlib.Path(__file__).with_name('peft_logits.json')
    path.write_text(json.dumps({'made_by': made_by, 'models': models}) + '\n')


if __name__ == '__main__':
    main()
