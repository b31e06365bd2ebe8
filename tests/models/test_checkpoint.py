"""Weights in and out: values, shardings, bytes, and what an export leaves when it fails."""

import dataclasses
import json
import math
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_meshes
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_checkpoints import (
    hugging_face_tensors,
    on_one_device,
    raw_tensors,
    tiny_tokenizer,
    write_directory,
)
from tiny_decoders import CONFIGS

from jaxpo.errors import InputError
from jaxpo.models import checkpoint, families
from jaxpo.models.checkpoint import load_params, write_hugging_face
from jaxpo.models.source import open_model


def load(path, seed=0):
    pretrained = open_model(str(path))
    return load_params(pretrained, on_one_device(pretrained.architecture), seed)


def export(path, source, **settings):
    """Reads a source and writes it again."""
    pretrained = open_model(str(source))
    params = load_params(pretrained, on_one_device(pretrained.architecture))
    settings = {'dtype': pretrained.dtype, 'generation_config': pretrained.generation_config} | settings
    write_hugging_face(path, params, pretrained.hugging_face_config, pretrained.load_tokenizer(), **settings)
    return path


def test_leaves_hold_the_named_tensors_transposed_and_stacked(tmp_path):
    tensors = hugging_face_tensors(CONFIGS['gemma2'], 'bfloat16')
    params = load(write_directory(tmp_path / 'model', CONFIGS['gemma2'], tensors))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.float32.dtype}
    expected = {
        ('embedding',): tensors['model.embed_tokens.weight'],
        ('final_norm',): tensors['model.norm.weight'],
        ('layers', 'attention', 'query'): [tensors[f'model.layers.{i}.self_attn.q_proj.weight'].T for i in range(3)],
        ('layers', 'mlp', 'down'): [tensors[f'model.layers.{i}.mlp.down_proj.weight'].T for i in range(3)],
        ('layers', 'mlp_norm'): [tensors[f'model.layers.{i}.pre_feedforward_layernorm.weight'] for i in range(3)],
    }
    for path, value in expected.items():
        np.testing.assert_array_equal(families.leaf(params, path), np.asarray(value, np.float32))


@pytest.mark.parametrize('spec', [P(), P('fsdp'), P(None, 'fsdp'), P(None, None, 'fsdp'), P(None, 'data', 'fsdp')])
def test_each_device_gets_its_slice_and_nothing_is_read_twice(tmp_path, spec):
    pretrained = open_model(str(write_directory(tmp_path / 'model', {**CONFIGS['llama'], 'num_hidden_layers': 4})))
    mesh = tiny_meshes.mesh(2, 4)

    def sharding(key):
        fits = all(name is None or size % mesh.shape[name] == 0 for name, size in zip(spec, key.leaf_shape))
        return NamedSharding(mesh, spec if fits and len(spec) <= len(key.leaf_shape) else P())

    keys = families.keys(pretrained.architecture)
    read, counted = pretrained.tensors.read, []

    def count(name, index):
        values = read(name, index)
        counted.append(values.size)
        return values

    counting = dataclasses.replace(pretrained, tensors=dataclasses.replace(pretrained.tensors, read=count))
    params = load_params(counting, families.nest({key.path: sharding(key) for key in keys}))
    assert sum(counted) == sum(math.prod(key.leaf_shape) for key in keys)
    assert families.leaf(params, ('layers', 'mlp', 'up')).sharding.spec == spec
    whole = load_params(pretrained, on_one_device(pretrained.architecture))
    jax.tree.map(np.testing.assert_array_equal, params, whole)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('name', CONFIGS)
def test_reading_and_writing_gives_the_same_bytes(tmp_path, name, dtype):
    config = {**CONFIGS[name], 'num_hidden_layers': 3, 'torch_dtype': dtype}
    source = write_directory(tmp_path / 'source', config, hugging_face_tensors(config, dtype), shards=2)
    assert open_model(str(source)).dtype == dtype
    written = export(tmp_path / 'written', source, max_shard_bytes=15_000)
    assert raw_tensors(written) == raw_tensors(source)
    assert ('lm_head.weight' in raw_tensors(written)) == (not config['tie_word_embeddings'])
    settings = json.loads((written / 'config.json').read_text())
    assert {**settings, 'torch_dtype': dtype} == {**config, 'torch_dtype': dtype, 'dtype': dtype}
    assert settings['torch_dtype'] == dtype


@pytest.mark.parametrize('name', ['llama-tied', 'qwen2', 'qwen3', 'gemma2', 'mistral'])
def test_transformers_opens_an_export_and_computes_the_same(tmp_path, name):
    torch = pytest.importorskip('torch', reason='logits of transformers need torch')
    import transformers

    source = write_directory(tmp_path / 'source', CONFIGS[name], shards=2, generation={'eos_token_id': [2, 3]})
    written = export(tmp_path / 'written', source, max_shard_bytes=40_000)
    assert len(list(written.glob('*.safetensors'))) > 1
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    logits = []
    for path in (source, written):
        model, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            logits.append(model(tokens).logits.numpy())
    np.testing.assert_array_equal(*logits)
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [2, 3]


def test_a_tokenizer_survives_and_has_a_class_every_transformers_knows(tmp_path):
    import transformers

    source = write_directory(tmp_path / 'source', CONFIGS['llama'])
    written = export(tmp_path / 'written', source)
    assert json.loads((written / 'tokenizer_config.json').read_text())['tokenizer_class'] == 'PreTrainedTokenizerFast'
    tokenizer = transformers.AutoTokenizer.from_pretrained(written)
    assert tokenizer('word3 word5 </s>').input_ids == tiny_tokenizer()('word3 word5 </s>').input_ids == [6, 8, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_files_stay_within_the_limit_and_the_index_says_where(tmp_path):
    source = write_directory(tmp_path / 'source', CONFIGS['llama'])
    written = export(tmp_path / 'written', source, max_shard_bytes=12_000, extra_metadata={'loss': 'dpo'})
    index = json.loads((written / 'model.safetensors.index.json').read_text())
    files = sorted(written.glob('*.safetensors'))
    assert index['metadata']['total_size'] == sum(len(data) for data, _, _ in raw_tensors(source).values())
    assert set(index['weight_map'].values()) == {file.name for file in files}
    assert [file.name for file in files] == [
        f'model-{i:05d}-of-{len(files):05d}.safetensors' for i in range(1, len(files) + 1)
    ]
    for file in files:
        tensors = safetensors.numpy.load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 12_000
        assert {index['weight_map'][name] for name in tensors} == {file.name}
        with safetensors.safe_open(file, 'np') as opened:
            assert opened.metadata() == {'format': 'pt', 'loss': 'dpo'}
    jax.tree.map(np.testing.assert_array_equal, load(written), load(source))


def test_sharded_parameters_export_as_whole_ones(tmp_path):
    source = write_directory(tmp_path / 'source', CONFIGS['qwen3'])
    pretrained = open_model(str(source))
    mesh = jax.make_mesh((8,), ('fsdp',))

    def sharding(key):
        axis = next((axis for axis, size in enumerate(key.leaf_shape) if size % 8 == 0), None)
        return NamedSharding(mesh, P() if axis is None else P(*[None] * axis, 'fsdp'))

    keys = families.keys(pretrained.architecture)
    params = load_params(pretrained, families.nest({key.path: sharding(key) for key in keys}))
    write_hugging_face(tmp_path / 'written', params, CONFIGS['qwen3'], None, dtype='float32')
    assert raw_tensors(tmp_path / 'written') == raw_tensors(source)
    assert (tmp_path / 'written' / 'model.safetensors').stat().st_mode == (
        tmp_path / 'written' / 'config.json'
    ).stat().st_mode


def test_a_directory_in_use_is_refused_and_left_alone(tmp_path):
    source = write_directory(tmp_path / 'source', CONFIGS['llama'])
    before = raw_tensors(source)
    with pytest.raises(InputError, match='not empty'):
        export(source, source)
    assert raw_tensors(source) == before
    (tmp_path / 'empty').mkdir()
    assert raw_tensors(export(tmp_path / 'empty', source)) == before


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    source = write_directory(tmp_path / 'source', CONFIGS['llama'])
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(InputError, match=r'No room .* 0\.05 GB needed'):
        export(tmp_path / 'written', source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['source']


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    source = write_directory(tmp_path / 'source', CONFIGS['llama'])
    save, saved = safetensors.numpy.save_file, []

    def interrupted(tensors, path, metadata):
        save(tensors, path, metadata)
        saved.append(pathlib.Path(path))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, 'save_file', interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / 'written', source, max_shard_bytes=12_000)
    assert saved and sorted(path.name for path in tmp_path.iterdir()) == ['source']


def test_values_a_dtype_cannot_hold_are_refused_by_name(tmp_path):
    tensors = hugging_face_tensors(CONFIGS['llama'])
    tensors['model.layers.1.mlp.up_proj.weight'][2, 3] = 1e6
    source = write_directory(tmp_path / 'source', CONFIGS['llama'], tensors)
    with pytest.raises(InputError, match=r'layers\.1\.mlp\.up_proj\.weight has values that are not finite in float16'):
        export(tmp_path / 'written', source, dtype='float16')
    assert not (tmp_path / 'written').exists()
    export(tmp_path / 'written', source, dtype='bfloat16')
    with pytest.raises(InputError, match="'float8'"):
        export(tmp_path / 'other', source, dtype='float8')


def test_parameters_that_do_not_fit_the_config_are_refused(tmp_path):
    source = write_directory(tmp_path / 'source', CONFIGS['llama'])
    params = load(source)
    with pytest.raises(InputError, match='leaves that the config knows nothing of'):
        write_hugging_face(tmp_path / 'written', params, CONFIGS['llama-tied'], None, dtype='float32')
    with pytest.raises(InputError, match='embedding has shape'):
        write_hugging_face(tmp_path / 'written', params, {**CONFIGS['llama'], 'vocab_size': 64}, None, dtype='float32')


def test_a_tied_model_may_repeat_its_embedding_but_not_contradict_it(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, 'ROWS_AT_ONCE', 7)
    config, tensors = CONFIGS['llama-tied'], hugging_face_tensors(CONFIGS['llama-tied'])
    tensors['lm_head.weight'] = tensors['model.embed_tokens.weight'].copy()
    load(write_directory(tmp_path / 'same', config, tensors))
    tensors['lm_head.weight'][60, 3] += 1
    with pytest.raises(InputError, match='lm_head.weight differs'):
        load(write_directory(tmp_path / 'other', config, tensors))


PROCESS = """
import pathlib, sys
import jax
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 2)
process, port, source, target = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize(f'localhost:{port}', num_processes=2, process_id=process)
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxpo.errors import InputError
from jaxpo.models import families
from jaxpo.models.checkpoint import load_params, write_hugging_face
from jaxpo.models.source import open_model

pretrained = open_model(source)
mesh = jax.make_mesh((4,), ('fsdp',))
keys = families.keys(pretrained.architecture)
specs = {key.path: P(None, 'fsdp') if key.layers and key.leaf_shape[1] % 4 == 0 else P() for key in keys}
shardings = families.nest({path: NamedSharding(mesh, spec) for path, spec in specs.items()})
params = load_params(pretrained, shardings)
assert not params['layers']['mlp']['up'].is_fully_addressable
export = lambda: write_hugging_face(
    pathlib.Path(target), params, pretrained.hugging_face_config, None, dtype='bfloat16', max_shard_bytes=12_000
)
export()
assert (pathlib.Path(target) / 'config.json').exists()
try:
    export()
except InputError as error:
    assert ('not empty' in str(error)) == (process == 0), error
    print('refused', process)
"""


def test_two_processes_write_one_directory_and_are_refused_together(tmp_path):
    tensors = hugging_face_tensors(CONFIGS['qwen2'], 'bfloat16')
    source = write_directory(tmp_path / 'source', CONFIGS['qwen2'], tensors)
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = str(free.getsockname()[1])
    arguments = [port, str(source), str(tmp_path / 'written')]
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS, str(number), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for number, process in enumerate(processes):
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert f'refused {number}' in output
    assert raw_tensors(tmp_path / 'written') == raw_tensors(source)
