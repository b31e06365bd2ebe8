"""Writes decoder_logits.json: logits of transformers for tiny models whose weights a NumPy seed makes.

Run from the repository root, with torch installed: PYTHONPATH=tests python tests/golden/make_decoder_golden.py
"""

import copy
import json
import pathlib

import numpy as np
import torch
import transformers
from tiny_decoders import CONFIGS, loud_params, tokens_of

AT = [0, 6, 39]  # the positions whose logits are kept: before, within and beyond the sliding windows


def torch_model(config, params):
    """transformers' eager implementation with our parameters, float32."""
    settings = copy.deepcopy(config)  # transformers writes into what it is given
    model_config = transformers.AutoConfig.for_model(settings.pop('model_type'), **settings)
    model = transformers.AutoModelForCausalLM.from_config(model_config, attn_implementation='eager')
    missing, unexpected = model.load_state_dict(_state_dict(config, params), strict=False)
    tied = {'lm_head.weight'} if config['tie_word_embeddings'] else set()
    assert not unexpected and set(missing) <= tied, (missing, unexpected)
    model.tie_weights()
    return model.eval().float()


def logits_of(model, tokens):
    """Float32 logits [R, T, V]."""
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def torch_logits(config, params, tokens):
    """Float32 logits [R, T, V] of transformers' eager implementation with our parameters."""
    return logits_of(torch_model(config, params), tokens)


def _state_dict(config, params):
    """Our tree under transformers' names, written out here on its own so that it can check the readers' map."""
    state = {'model.embed_tokens.weight': params['embedding'], 'model.norm.weight': params['final_norm']}
    if 'head' in params:
        state['lm_head.weight'] = params['head']
    norms = {'attention_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
    if config['model_type'] == 'gemma2':
        norms |= {
            'attention_post_norm': 'post_attention_layernorm',
            'mlp_norm': 'pre_feedforward_layernorm',
            'mlp_post_norm': 'post_feedforward_layernorm',
        }
    projections = {'query': 'q_proj', 'key': 'k_proj', 'value': 'v_proj', 'output': 'o_proj'}
    layers = params['layers']
    for index in range(config['num_hidden_layers']):
        prefix = f'model.layers.{index}'
        for ours, theirs in norms.items():
            state[f'{prefix}.{theirs}.weight'] = layers[ours][index]
        for ours in ('gate', 'up', 'down'):
            state[f'{prefix}.mlp.{ours}_proj.weight'] = layers['mlp'][ours][index].T
        for ours, theirs in projections.items():
            state[f'{prefix}.self_attn.{theirs}.weight'] = layers['attention'][ours][index].T
            if f'{ours}_bias' in layers['attention']:
                state[f'{prefix}.self_attn.{theirs}.bias'] = layers['attention'][f'{ours}_bias'][index]
        for ours, theirs in {'query_norm': 'q_norm', 'key_norm': 'k_norm'}.items():
            if ours in layers['attention']:
                state[f'{prefix}.self_attn.{theirs}.weight'] = layers['attention'][ours][index]
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in state.items()}


def main():
    models = {}
    for name, config in CONFIGS.items():
        tokens = tokens_of(config, 1, 40)
        logits = torch_logits(config, loud_params(config), tokens)[:, AT]
        models[name] = {
            'config': config,
            'tokens': tokens.tolist(),
            'at': AT,
            'logits': np.round(logits.astype(np.float64), 6).tolist(),
        }
    made_by = f'transformers {transformers.__version__}, torch {torch.__version__}'
    path = pathlib.Path(__file__).with_name('decoder_logits.json')
    path.write_text(json.dumps({'made_by': made_by, 'models': models}) + '\n')


if __name__ == '__main__':
    main()
