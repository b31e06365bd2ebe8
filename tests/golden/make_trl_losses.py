"""Writes trl_dpo.json, trl_f_divergences.json and trl_other.json: losses and gradients of TRL's own loss methods.

Run from the repository root in an environment of its own: pip install torch==2.13.0 trl==1.16.0, then
python tests/golden/make_trl_losses.py

A trainer is made without its `__init__`, with the attributes that its loss reads, from TRL's own configuration; its
model is a stand-in that answers with given logits. So gradients are by the policy's logits. Two precisions:

float64: the stand-in answers with log-probabilities in float64, in place of TRL's fused head, which casts to float32.
float32: the stand-in is a backbone with an identity head that TRL's own `add_fused_lm_head` wraps. The alpha divergence
  runs only so: TRL's clamp knows no float64.

TRL rounds to float32 in ORPO's odds whatever the inputs are. Losses that need generation (online DPO) are left out;
theirs are DPO's `sigmoid` and a summed `ipo`.
"""

import ast
import collections
import itertools
import re
import tempfile

import accelerate
import peer_inputs
import torch
import trl
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl_standins import Backbone, Standin

torch.set_default_dtype(torch.float64)  # or TRL would make some constants float32


def trainer(kind, args, **attributes):
    """A trainer of this kind with what its loss reads, and no model, data or optimizer of its own."""
    made = object.__new__(kind)
    made.args, made.accelerator = args, accelerate.Accelerator(cpu=True)
    made.aux_loss_enabled = made.precompute_ref_logps = made.is_encoder_decoder = False
    made._peft_has_been_casted_to_bf16 = False
    made._metrics = made._stored_metrics = collections.defaultdict(lambda: collections.defaultdict(list))
    made._total_train_tokens, made._tp_size = 0, 1
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def config(kind, **settings):
    return kind(output_dir=tempfile.gettempdir(), bf16=False, use_cpu=True, **settings)


def models(batches, dtype):
    """Stand-ins for policy and reference, and the policy's logits of the first batch: the leaf."""
    kind = {'float64': Standin, 'float32': Backbone}[dtype]
    made = {
        role: [(torch.tensor(b['tokens']), torch.tensor(b[role], dtype=getattr(torch, dtype))) for b in batches]
        for role in ('policy', 'reference')
    }
    leaf = made['policy'][0][1].requires_grad_()
    return kind(made['policy']), kind(made['reference']), leaf


def masks_of(batch, prefix=''):
    return {
        f'{prefix}input_ids': torch.tensor(batch['tokens']),
        f'{prefix}attention_mask': torch.tensor(batch['attention_mask']),
        f'{prefix}completion_mask': torch.tensor(batch['completion_mask']),
    }


def case(peer, inputs, dtype, given, settings, loss, leaf):
    """One case of the file. `given` names it; `settings` add the defaults that a reader needs."""
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    words = [f'{key}={value}' for key, value in given.items()]
    name = ' '.join([peer, *words, inputs, dtype])
    print(f'{name:80} {loss.item():.6f} {gradient.abs().max().item():.2e}')
    return {
        'name': name,
        'peer': peer,
        'inputs': inputs,
        'dtype': dtype,
        'settings': settings,
        'loss': loss.item(),
        'gradient': gradient.tolist(),
    }


def dpo(inputs_name, batch, dtype='float64', **settings):
    """One case of DPOTrainer. `settings` are fields of DPOConfig."""
    args = config(trl.DPOConfig, **settings)
    policy, reference, leaf = models([batch], dtype)
    names = ('beta', 'ld_alpha', 'f_divergence_type', 'f_alpha_divergence_coef', 'label_smoothing', 'use_weighting')
    made = trainer(
        trl.DPOTrainer,
        args,
        model=policy,
        ref_model=reference,
        loss_types=args.loss_type,
        loss_weights=args.loss_weights or [1.0] * len(args.loss_type),
        **{name: getattr(args, name) for name in names},
    )
    loss = made.compute_loss(policy, masks_of(batch))
    full = {'beta': args.beta, **settings, 'loss_type': args.loss_type}
    return case('DPOTrainer', inputs_name, dtype, settings, full, loss, leaf)


def loss_types(batch):
    """DPOTrainer's loss types, which it names where it is asked for one that it does not have."""
    try:
        dpo('random', batch, loss_type='?')
    except ValueError as error:
        return ast.literal_eval(re.search(r'\[.*\]', str(error))[0])


def dpo_cases(inputs):
    random, sure = inputs['random'], inputs['sure']
    plain = ('sigmoid', 'hinge', 'ipo', 'nca_pair', 'bco_pair', 'sppo_hard', 'apo_zero', 'apo_down', 'discopop')
    for loss_type in (*plain, 'sigmoid_norm', 'robust', 'aot', 'aot_unpaired', 'sft'):
        yield dpo('random', random, loss_type=loss_type)
    for loss_type in ('sigmoid', 'hinge', 'ipo', 'discopop', 'sigmoid_norm'):
        yield dpo('random', random, loss_type=loss_type, beta=0.5)
    for loss_type in ('sigmoid', 'robust', 'exo_pair', 'aot', 'aot_unpaired'):
        yield dpo('random', random, loss_type=loss_type, label_smoothing=0.1)
    yield dpo('random', random, loss_type='exo_pair', label_smoothing=1e-3)
    yield dpo('random', random, loss_type='discopop', discopop_tau=0.5)
    yield dpo('random', random, loss_type=['sigmoid', 'bco_pair', 'sft'], loss_weights=[0.8, 0.2, 1.0])
    yield dpo('random', random, loss_type=['ipo', 'apo_zero'])
    for ld_alpha in (0.0, 0.5):
        yield dpo('random', random, loss_type='sigmoid', ld_alpha=ld_alpha)
    yield dpo('random', random, loss_type='ipo', ld_alpha=0.5)
    for inputs_name in ('random', 'sure'):
        yield dpo(inputs_name, inputs[inputs_name], loss_type='sigmoid', use_weighting=True)
    yield dpo('sure', sure, loss_type='ipo', use_weighting=True)
    yield dpo('sure', sure, loss_type='sigmoid')
    yield dpo('random', random, 'float32', loss_type='sigmoid')
    yield dpo('sure', sure, 'float32', loss_type='sigmoid', use_weighting=True)


def f_divergence_cases(inputs):
    batch = inputs['random']
    for loss_type, divergence in itertools.product(
        ('sigmoid', 'sigmoid_norm', 'hinge', 'ipo', 'exo_pair', 'robust', 'discopop', 'sft'),
        ('reverse_kl', 'forward_kl', 'js_divergence', 'alpha_divergence'),
    ):
        settings = {'loss_type': loss_type, 'f_divergence_type': divergence}
        if loss_type in ('exo_pair', 'robust'):
            settings['label_smoothing'] = 0.1
        yield dpo('random', batch, 'float32' if divergence == 'alpha_divergence' else 'float64', **settings)
    for coefficient in (0.3, 0.8, 1.0):
        settings = {'f_divergence_type': 'alpha_divergence', 'f_alpha_divergence_coef': coefficient}
        yield dpo('random', batch, 'float32', loss_type='sigmoid', **settings)


def kto(inputs_name, batch, labels, **settings):
    """One case of KTOTrainer: the rows one by one, `labels` saying which are desirable."""
    args = config(trl.KTOConfig, **settings)
    kl_batch = batch['mismatched']
    policy, reference, leaf = models([batch, kl_batch], 'float64')
    names = ('beta', 'loss_type', 'desirable_weight', 'undesirable_weight')
    made = trainer(
        trl.KTOTrainer,
        args,
        model=policy,
        ref_model=reference,
        calculate_KL=args.loss_type != 'apo_zero_unpaired',  # as its __init__ does
        **{name: getattr(args, name) for name in names},
    )
    loss = made.compute_loss(policy, {**masks_of(batch), **masks_of(kl_batch, 'KL_'), 'label': torch.tensor(labels)})
    named = {**settings, 'desirable': sum(labels)}
    full = {name: getattr(args, name) for name in names} | {'labels': labels, 'kl': made._metrics['train']['kl'][-1]}
    return case('KTOTrainer', inputs_name, 'float64', named, full, loss, leaf)


def concatenated(batch):
    """The batch as the older trainers take it: labels are -100 outside the completions."""
    tokens, completion = torch.tensor(batch['tokens']), torch.tensor(batch['completion_mask'])
    whole = {
        'input_ids': tokens,
        'attention_mask': torch.tensor(batch['attention_mask']),
        'labels': tokens.masked_fill(completion == 0, -100),
    }
    return {
        f'{side}_{name}': value
        for name, values in whole.items()
        for side, value in zip(('chosen', 'rejected'), values.chunk(2))
    }


def cpo(inputs_name, batch, **settings):
    args = config(CPOConfig, **settings)
    policy, _, leaf = models([batch], 'float64')
    names = ('beta', 'label_smoothing', 'loss_type', 'cpo_alpha', 'simpo_gamma', 'alpha')
    made = trainer(CPOTrainer, args, pad_token_id=0, **{name: getattr(args, name) for name in names})
    loss = made.compute_loss(policy, concatenated(batch))
    # CPOConfig turns `alphapo` into `simpo` without the likelihood term: the case keeps the word that was given.
    full = {name: getattr(args, name) for name in names} | settings
    return case('CPOTrainer', inputs_name, 'float64', settings, full, loss, leaf)


def orpo(inputs_name, batch, **settings):
    args = config(ORPOConfig, **settings)
    policy, _, leaf = models([batch], 'float64')
    loss = trainer(ORPOTrainer, args, padding_value=0, beta=args.beta).compute_loss(policy, concatenated(batch))
    return case('ORPOTrainer', inputs_name, 'float64', settings, {'loss_type': 'orpo', 'beta': args.beta}, loss, leaf)


def tpo(inputs_name, batch, **settings):
    """One case of TPOTrainer. Its gold completions are the first four mismatched ones."""
    args = config(TPOConfig, **settings)
    if args.tpo_alpha:
        batch = {name: [*rows, *batch['mismatched'][name][:4]] for name, rows in batch.items() if name != 'mismatched'}
    policy, _, leaf = models([batch], 'float64')
    names = ('beta', 'label_smoothing', 'loss_type', 'tpo_alpha', 'tpo_l_gamma')
    made = trainer(TPOTrainer, args, model=policy, **{name: getattr(args, name) for name in names})
    loss = made.compute_loss(policy, masks_of(batch))
    full = {name: getattr(args, name) for name in names}
    return case('TPOTrainer', inputs_name, 'float64', settings, full, loss, leaf)


def other_cases(inputs):
    mixed = [True, False, True, True, False, True, False, True]
    for inputs_name in ('random', 'sure'):
        yield kto(inputs_name, inputs[inputs_name], mixed, loss_type='kto')
    yield kto('sure', inputs['sure'], mixed, loss_type='kto', beta=0.5, desirable_weight=1.3, undesirable_weight=0.7)
    yield kto('random', inputs['random'], [True] * 8, loss_type='kto')
    yield kto('random', inputs['random'], mixed, loss_type='apo_zero_unpaired')

    batch = inputs['random']
    for loss_type in ('sigmoid', 'hinge', 'ipo', 'simpo', 'alphapo'):
        yield cpo('random', batch, loss_type=loss_type)
    for loss_type in ('sigmoid', 'simpo'):
        yield cpo('random', batch, loss_type=loss_type, label_smoothing=0.1)
    yield cpo('random', batch, loss_type='sigmoid', cpo_alpha=0.0, beta=0.3)
    yield cpo('random', batch, loss_type='hinge', cpo_alpha=0.0, beta=1.0)
    yield cpo('random', batch, loss_type='simpo', cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0)
    yield cpo('random', batch, loss_type='alphapo', beta=2.5, simpo_gamma=0.1, alpha=0.25)

    yield orpo('random', batch)
    yield orpo('sure', inputs['sure'], beta=0.5)

    for loss_type in ('sigmoid', 'hinge', 'ipo', 'tpo-l'):
        yield tpo('random', batch, loss_type=loss_type)
    yield tpo('random', batch, loss_type='tpo-l', tpo_alpha=0.0, label_smoothing=0.1)


def main():
    inputs = peer_inputs.both()
    made_by = f'trl {trl.__version__}, torch {torch.__version__}'
    content = {'made_by': made_by, 'loss_types': loss_types(inputs['random']), 'inputs': inputs}
    for name, cases in (('trl_dpo', dpo_cases), ('trl_f_divergences', f_divergence_cases)):
        peer_inputs.write(f'{name}.json', {**content, 'cases': [*cases(inputs)]})
    inputs = peer_inputs.both(mismatched=True)
    peer_inputs.write('trl_other.json', {'made_by': made_by, 'inputs': inputs, 'cases': [*other_cases(inputs)]})


if __name__ == '__main__':
    main()
