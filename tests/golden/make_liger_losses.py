"""Writes liger_losses.json: losses and gradients of Liger's fused linear preference losses.

Run from the repository root in an environment of its own: pip install torch==2.13.0, then
pip install liger-kernel==0.8.5 --no-deps, then python tests/golden/make_liger_losses.py

All of `liger_kernel.chunked_loss` is PyTorch and runs on a CPU, here without torch.compile. Inputs are hidden states
and a head; gradients are by both. Everything is float64, but Liger casts the logits to float32 for the log-softmax, so
its numbers are good to float32. Left out as no preference losses: the distillation losses (JSD, cosine similarity) and
GRPO. Liger's kernels outside of `chunked_loss` are Triton's and need a GPU; none of them is a preference loss.
"""

import importlib.metadata

import numpy as np
import peer_inputs
import torch
from liger_kernel import chunked_loss

torch.set_default_dtype(torch.float64)
WIDTH = 5


def problem(seed):
    """The tokens of peer_inputs, shifted (target t is token t + 1), with hidden states and heads for two models."""
    random = np.random.default_rng(seed)
    batch = peer_inputs.pairs(seed)
    tokens, attention, completion = (
        np.array(batch[name])[:, 1:] for name in ('tokens', 'attention_mask', 'completion_mask')
    )

    def normal(*shape):
        return (np.round(random.normal(0.0, 1.0, shape) * 64) / 64).tolist()

    shape = (*tokens.shape, WIDTH)
    return {
        'target': np.where(completion, tokens, -100).tolist(),
        'target_with_prompt': np.where(attention, tokens, -100).tolist(),
        'hidden': normal(*shape),
        'head': normal(peer_inputs.VOCABULARY, WIDTH),
        'reference_hidden': normal(*shape),
        'reference_head': normal(peer_inputs.VOCABULARY, WIDTH),
    }


def case(kind, inputs, call=(), **settings):
    """One case. `call` are names of optional arguments of the loss's forward."""
    made = getattr(chunked_loss, kind)(compiled=False, **settings)
    hidden, head = (torch.tensor(inputs[name]).requires_grad_() for name in ('hidden', 'head'))
    known = {
        'ref_input': torch.tensor(inputs['reference_hidden']),
        'ref_weight': torch.tensor(inputs['reference_head']),
        'nll_target': torch.tensor(inputs['target_with_prompt']),
        'preference_labels': torch.tensor(LABELS),
        'kl': torch.tensor(KL),
    }
    loss, _ = made(
        _input=hidden,
        lin_weight=head,
        target=torch.tensor(inputs['target']),
        **{name: known[name] for name in call},
    )
    gradients = torch.autograd.grad(loss, (hidden, head))
    assert torch.isfinite(loss) and all(torch.isfinite(gradient).all() for gradient in gradients)
    name = ' '.join([kind, *(f'{key}={value}' for key, value in settings.items()), *call])
    print(f'{name:100} {loss.item():.6f}')
    return {
        'name': name,
        'peer': kind,
        'settings': {
            name: getattr(made, name) for name in vars(made) if not name.startswith('_') and name != 'training'
        },
        'call': call,
        'loss': loss.item(),
        'hidden_gradient': gradients[0].tolist(),
        'head_gradient': gradients[1].tolist(),
    }


LABELS = [True, False, True, True, False, True, False, True]
KL = 0.4


def cases(inputs):
    dpo, with_reference = 'LigerFusedLinearDPOLoss', ('ref_input', 'ref_weight')
    for loss_type in sorted(chunked_loss.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES):
        smoothing = {'label_smoothing': 0.1} if loss_type in ('robust', 'exo_pair') else {}
        yield case(dpo, inputs, with_reference, loss_type=loss_type, **smoothing)
    yield case(dpo, inputs, with_reference, loss_type='sigmoid', beta=0.5, chunk_size=2)
    yield case(dpo, inputs, with_reference, loss_type='sigmoid', label_smoothing=0.1)
    yield case(dpo, inputs, with_reference, loss_type='sigmoid', beta=2.0, average_log_prob=True)
    yield case(dpo, inputs, with_reference, loss_type='sigmoid', compute_nll_loss=True, alpha=0.3)
    yield case(dpo, inputs, loss_type='sigmoid', use_ref_model=False)
    for settings in ({}, {'label_smoothing': 0.1}, {'compute_nll_loss': False, 'beta': 0.5}):
        yield case('LigerFusedLinearCPOLoss', inputs, **settings)
        yield case('LigerFusedLinearSimPOLoss', inputs, **settings)
    yield case('LigerFusedLinearSimPOLoss', inputs, compute_nll_loss=False, beta=2.0, gamma=1.0)
    yield case('LigerFusedLinearORPOLoss', inputs)
    yield case('LigerFusedLinearORPOLoss', inputs, ('nll_target',), beta=0.5)
    kto, labelled = 'LigerFusedLinearKTOLoss', ('preference_labels', *with_reference)
    yield case(kto, inputs, (*labelled, 'kl'), use_ref_model=True)
    yield case(kto, inputs, labelled, use_ref_model=True, beta=0.5)


def main():
    inputs = problem(4)
    made_by = f'liger-kernel {importlib.metadata.version("liger-kernel")}, torch {torch.__version__}'
    content = {
        'made_by': made_by,
        'loss_types': sorted(chunked_loss.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES),
        'inputs': {**inputs, 'preference_labels': LABELS, 'kl': KL},
        'cases': [*cases(inputs)],
    }
    peer_inputs.write('liger_losses.json', content)


if __name__ == '__main__':
    main()
