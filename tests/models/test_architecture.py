"""What a config.json may say, and how it is refused."""

import pytest
from tiny_decoders import CONFIGS

from jaxpo.errors import InputError
from jaxpo.models.architecture import Llama3Scaling, from_hugging_face


def changed(name, **changes):
    """The architecture of a tiny config with some keys changed, or left out where the value is `...`."""
    config = {**CONFIGS[name], **changes}
    return from_hugging_face({key: value for key, value in config.items() if value is not ...})


def test_both_spellings_of_the_rotary_embeddings():
    scaling = CONFIGS['llama3']['rope_scaling']
    expected = Llama3Scaling(8.0, 1.0, 4.0, 32)
    old = from_hugging_face(CONFIGS['llama3'])
    new = changed('llama', rope_theta=..., rope_parameters={**scaling, 'rope_theta': 1000.0})
    older = changed('llama', rope_scaling={**scaling, 'rope_type': 'llama3', 'type': 'llama3'})
    assert old == new == older
    assert old.rope_scaling == expected and old.rope_theta == 1000.0
    plain = changed('llama', rope_theta=..., rope_parameters={'rope_type': 'default', 'rope_theta': 5.0})
    assert plain.rope_scaling is None and plain.rope_theta == 5.0
    assert changed('llama', rope_theta=...).rope_theta == 10000.0


@pytest.mark.parametrize(
    ('name', 'changes', 'windows'),
    [
        ('llama', {'sliding_window': 5}, (None, None, None)),
        ('mistral', {}, (5, 5, 5)),
        ('mistral', {'sliding_window': None}, (None, None, None)),
        ('mistral', {'sliding_window': ...}, (None, None, None)),
        ('qwen2', {}, (None, None, None)),
        ('qwen2-windowed', {}, (None, 5, 5)),
        ('qwen2-windowed', {'max_window_layers': 3}, (None, None, None)),
        ('qwen3-windowed', {'layer_types': ['sliding_attention'] + ['full_attention'] * 2}, (5, None, None)),
        ('gemma2', {}, (5, None, 5)),
        ('gemma2-untied', {}, (None, 5, 5)),
    ],
)
def test_windows(name, changes, windows):
    assert changed(name, **changes).windows == windows


def test_what_a_config_leaves_out():
    llama = changed('llama', head_dim=..., num_key_value_heads=..., tie_word_embeddings=...)
    assert (llama.head_dim, llama.key_value_heads, llama.tied) == (6, 4, False)
    gemma = changed('gemma2', tie_word_embeddings=..., hidden_act=...)
    assert gemma.tied and gemma.activation == 'gelu_pytorch_tanh'
    assert gemma.query_scale == pytest.approx(11**-0.5) and gemma.embedding_scale == pytest.approx(24**0.5)
    assert changed('gemma2', attn_logit_softcapping=None).attention_softcap is None
    assert hash(gemma) == hash(changed('gemma2', tie_word_embeddings=..., hidden_act=...))


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('llama', {'model_type': 'lama'}, "Did you mean 'llama'"),
        ('llama', {'model_type': ...}, "no 'model_type'.*gemma2, llama, mistral, qwen2, qwen3"),
        ('llama', {'hidden_size': ...}, "no 'hidden_size'"),
        ('llama', {'vocab_size': '61'}, "'vocab_size'.*positive integer, not '61'"),
        ('llama', {'num_hidden_layers': 0}, "'num_hidden_layers'"),
        ('llama', {'rms_norm_eps': ...}, "no 'rms_norm_eps'"),
        ('llama', {'hidden_act': 'relu'}, "activation in config.json 'relu'"),
        ('llama', {'mlp_bias': True}, "'mlp_bias'"),
        ('mistral', {'attention_bias': True}, "'attention_bias'"),
        ('gemma2', {'use_bidirectional_attention': True}, "'use_bidirectional_attention'"),
        ('gemma2', {'query_pre_attn_scalar': ...}, "no 'query_pre_attn_scalar'"),
        ('gemma2', {'final_logit_softcapping': ...}, "no 'final_logit_softcapping'"),
        ('qwen3', {'head_dim': ...}, "no 'head_dim'"),
        ('llama', {'head_dim': 7}, 'head_dim 7'),
        ('llama', {'head_dim': ..., 'hidden_size': 26}, 'hidden_size 26'),
        ('llama', {'num_key_value_heads': 3}, 'num_attention_heads 4'),
        ('llama', {'rope_scaling': {'type': 'linear', 'factor': 2.0}}, "'linear'.*Known: default, llama3"),
        ('llama', {'rope_scaling': {'rope_type': 'llama3', 'factor': 8.0}}, "no 'low_freq_factor'"),
        ('llama', {'partial_rotary_factor': 0.5}, "'partial_rotary_factor'"),
        ('qwen2-windowed', {'max_window_layers': ...}, "no 'max_window_layers'"),
        ('gemma2', {'layer_types': ['full_attention']}, '1 layers of 3'),
        ('gemma2', {'layer_types': ['full_attn'] * 3}, "Did you mean 'full_attention'"),
    ],
)
def test_what_is_refused(name, changes, message):
    with pytest.raises(InputError, match=message):
        changed(name, **changes)
