"""Models that answer TRL's trainers with given logits."""

import types

import peer_inputs
import torch
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

FUSED_OUTPUTS = ('log_probs', 'entropy', 'mean_logits', 'is_top1', 'log_sum_sq_probs')


class Standin(torch.nn.Module):
    """A model that knows the logits of the batches it will be asked for."""

    is_gradient_checkpointing = False

    def __init__(self, batches):
        super().__init__()
        self.batches = batches  # (tokens, logits)

    def logits_of(self, input_ids):
        return next(logits for tokens, logits in self.batches if torch.equal(tokens, input_ids))

    def forward(self, input_ids, labels=None, fused_lm_head=False, **kwargs):
        logits = self.logits_of(input_ids)
        if not fused_lm_head:
            return types.SimpleNamespace(logits=logits)
        logps = logits[:, :-1].log_softmax(-1)
        target, known = labels[:, 1:].clamp(min=0), labels[:, 1:] != -100
        fields = {
            'log_probs': logps.gather(-1, target[..., None])[..., 0],
            'entropy': -(logps.exp() * logps).sum(-1),
            'log_sum_sq_probs': (2 * logps).logsumexp(-1).detach(),
            'mean_logits': logits[:, :-1].mean(-1),
        }
        fields = {name: value.masked_fill(~known, 0) for name, value in fields.items()}
        return FusedCausalLMOutput(is_top1=(logits[:, :-1].argmax(-1) == target) & known, **fields)


class Backbone(Standin):
    """The same, as hidden states in front of an identity head, for TRL's fused one."""

    config = types.SimpleNamespace(get_text_config=lambda: types.SimpleNamespace())

    def __init__(self, batches):
        super().__init__(batches)
        self.head = torch.nn.Linear(peer_inputs.VOCABULARY, peer_inputs.VOCABULARY, bias=False, dtype=torch.float32)
        self.head.weight.data = torch.eye(peer_inputs.VOCABULARY, dtype=torch.float32)
        add_fused_lm_head(self, outputs=FUSED_OUTPUTS)

    def base_model(self, input_ids, **kwargs):
        return types.SimpleNamespace(last_hidden_state=self.logits_of(input_ids))

    def get_output_embeddings(self):
        return self.head
