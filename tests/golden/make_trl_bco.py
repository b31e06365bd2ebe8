"""Writes trl_bco.json: two steps of TRL's BCOTrainer, whose reward shift is a running mean.

TRL 1.13.0 is the last version that has this trainer. Run from the repository root in an environment of its own:
pip install torch==2.13.0 trl==1.13.0, then python tests/golden/make_trl_bco.py

Made as make_trl_losses.py makes its cases, in float64; TRL rounds the running mean to float32.
"""

import collections
import tempfile
import types

import accelerate
import peer_inputs
import torch
import trl
from trl.experimental.bco import BCOConfig
from trl.experimental.bco.bco_trainer import BCOTrainer, RunningMoments

torch.set_default_dtype(torch.float64)


def trainer(**settings):
    """A BCOTrainer with what its loss reads, and no data or optimizer."""
    made = object.__new__(BCOTrainer)
    made.args = BCOConfig(output_dir=tempfile.gettempdir(), bf16=False, use_cpu=True, **settings)
    made.accelerator = accelerate.Accelerator(cpu=True)
    made.beta, made.running = made.args.beta, RunningMoments(made.accelerator)
    made.embedding_func = made.embedding_tokenizer = None
    made.aux_loss_enabled = made.is_encoder_decoder = made._peft_has_been_casted_to_bf16 = False
    made._stored_metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    return made


def step(made, batch, labels):
    """-> loss and its gradient by the policy's logits; the trainer's running mean moves on."""
    tokens, completion = torch.tensor(batch['tokens']), torch.tensor(batch['completion_mask'])
    leaf, reference = (torch.tensor(batch[role]) for role in ('policy', 'reference'))
    leaf.requires_grad_()
    made.ref_model = lambda *args, **kwargs: types.SimpleNamespace(logits=reference)
    inputs = {
        'completion_input_ids': tokens,
        'completion_attention_mask': torch.tensor(batch['attention_mask']),
        'completion_labels': tokens.masked_fill(completion == 0, -100),
        'label': labels,
    }
    loss = made.compute_loss(lambda *args, **kwargs: types.SimpleNamespace(logits=leaf), inputs)
    return loss.item(), torch.autograd.grad(loss, leaf)[0].tolist()


def cases(inputs):
    paired = [True] * 4 + [False] * 4
    mixed = [True, False, True, True, False, True, False, True]
    for labels, settings in ((paired, {}), (mixed, {'beta': 0.5})):
        made = trainer(**settings)
        deltas = []
        for number, inputs_name in enumerate(inputs):
            loss, gradient = step(made, inputs[inputs_name], labels)
            deltas.append(made.running.mean)
            words = [f'{key}={value}' for key, value in settings.items()]
            name = ' '.join(['BCOTrainer', *words, f'desirable={sum(labels)}', f'step={number + 1}', 'float64'])
            print(f'{name:80} {loss:.6f}')
            yield {
                'name': name,
                'peer': 'BCOTrainer',
                'inputs': inputs_name,
                'dtype': 'float64',
                # The batches of the steps up to this one, and the running mean after each.
                'settings': {
                    'loss_type': 'bco',
                    'beta': made.beta,
                    'labels': labels,
                    'steps': [*inputs][: number + 1],
                    'deltas': [*deltas],
                },
                'loss': loss,
                'gradient': gradient,
            }


def main():
    inputs = peer_inputs.both()
    made_by = f'trl {trl.__version__}, torch {torch.__version__}'
    peer_inputs.write('trl_bco.json', {'made_by': made_by, 'inputs': inputs, 'cases': [*cases(inputs)]})


if __name__ == '__main__':
    main()
