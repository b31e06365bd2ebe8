"""What makes a model another model, and what does not."""

import dataclasses
import json
import pathlib
import shutil

import huggingface_hub
import jax
import pytest
from tiny_checkpoints import hugging_face_tensors, write_directory
from tiny_decoders import CONFIGS

from jaxpo.errors import InputError
from jaxpo.models import lora, peft
from jaxpo.models.identity import directory_digest, weights_identity
from jaxpo.models.lora import Lora
from jaxpo.models.source import open_model

CONFIG = CONFIGS['llama']


@pytest.fixture
def directory(tmp_path):
    return write_directory(tmp_path / 'tiny', CONFIG)


@pytest.fixture
def adapter(directory, tmp_path):
    architecture, settings = open_model(str(directory)).architecture, Lora(rank=2, scale=2.0, targets=('query', 'up'))
    tree = lora.init_adapter(architecture, settings, jax.random.key(0))
    peft.write_adapter(tmp_path / 'adapter', tree, settings, architecture, 'owner/base')
    return tmp_path / 'adapter'


def identity(source, **settings):
    return weights_identity(open_model(str(source)), **settings)


def flip(path, place=-1):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_identity_is_json_and_says_no_path(directory):
    found = identity(directory)
    written = json.dumps(found)
    assert set(found) == {'architecture', 'weights'}
    assert found['architecture'] == dataclasses.asdict(open_model(str(directory)).architecture)
    assert not any(part in written for part in (str(directory.parent), 'tiny', 'model.safetensors'))


@pytest.mark.parametrize('shards', [1, 3])
def test_the_same_bytes_elsewhere_are_the_same_model(tmp_path, shards):
    here = write_directory(tmp_path / 'here', CONFIG, shards=shards)
    there = tmp_path / 'other' / 'there'
    shutil.copytree(here, there)
    rewrite(there / 'config.json', _name_or_path='elsewhere', transformers_version='1')
    (there / 'README.md').write_text('of no account')
    assert identity(here) == identity(there)


@pytest.mark.parametrize('shards', [1, 3])
def test_one_bit_of_any_weight_file_makes_another_model(tmp_path, shards):
    directory = write_directory(tmp_path / 'tiny', CONFIG, shards=shards)
    seen = [identity(directory)]
    for path in sorted(directory.glob('*.safetensors')):
        flip(path)
        seen.append(identity(directory))
    assert len(seen) == shards + 1
    assert not any(one == other for place, one in enumerate(seen) for other in seen[:place])


def test_what_the_config_computes_makes_another_model(directory):
    before = identity(directory)
    rewrite(directory / 'config.json', rope_theta=CONFIG.get('rope_theta', 10000.0) * 2, rope_parameters=None)
    assert identity(directory)['weights'] == before['weights']
    assert identity(directory) != before


def test_other_weights_of_the_same_shapes_are_another_model(tmp_path):
    seeds = [write_directory(tmp_path / str(seed), CONFIG, hugging_face_tensors(CONFIG, seed=seed)) for seed in (0, 1)]
    assert identity(seeds[0]) != identity(seeds[1])


def test_a_seed_counts_where_the_weights_are_random_alone(directory):
    source = f'random:{directory}/config.json'
    assert identity(source, seed=1) == identity(source, seed=1) != identity(source, seed=2)
    assert identity(source) != identity(directory)
    assert identity(directory, seed=1) == identity(directory, seed=2)


def test_a_hub_model_is_its_commit(directory, monkeypatch):
    commits = {}

    def download(repository, revision=None, **_):
        snapshot = directory.parent / 'snapshots' / commits.setdefault(revision, f'c0ffee{len(commits)}')
        if not snapshot.exists():
            shutil.copytree(directory, snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
    one, other = (weights_identity(open_model('owner/model', revision)) for revision in ('v1', 'v2'))
    assert (one['hub'], one['revision']) == ('owner/model', 'c0ffee0')
    assert one != other and one == weights_identity(open_model('owner/model', 'v1'))


def test_an_adapter_makes_another_model_by_what_it_computes(directory, adapter, tmp_path):
    bare, adapted = identity(directory), identity(directory, adapter=adapter)
    assert adapted != bare and {**bare, 'adapter': adapted['adapter']} == adapted
    moved = tmp_path / 'moved'
    shutil.copytree(adapter, moved)
    rewrite(moved / 'adapter_config.json', base_model_name_or_path='c/d', inference_mode=True, revision='x')
    (moved / 'README.md').write_text('of no account')
    assert identity(directory, adapter=moved) == adapted
    rewrite(moved / 'adapter_config.json', lora_alpha=5)
    assert identity(directory, adapter=moved) != adapted
    rewrite(moved / 'adapter_config.json', lora_alpha=4)
    flip(moved / 'adapter_model.safetensors')
    assert identity(directory, adapter=moved) != adapted


@pytest.mark.parametrize('name', ['adapter_config.json', 'adapter_model.safetensors'])
def test_half_an_adapter_is_refused(directory, adapter, name):
    (adapter / name).unlink()
    with pytest.raises(InputError, match=name):
        identity(directory, adapter=adapter)


def test_a_digest_goes_by_the_order_of_names_and_by_where_files_end(tmp_path):
    def digest(**contents):
        paths = [tmp_path / name for name in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            path.write_bytes(content)
        forward, backward = directory_digest(paths), directory_digest(iter(paths[::-1]))
        assert forward == backward
        return forward

    assert digest(a=b'12', b=b'3') == digest(c=b'12', d=b'3')
    assert len({digest(a=b'12', b=b'3'), digest(a=b'1', b=b'23'), digest(a=b'3', b=b'12'), digest(a=b'123')}) == 4
    with pytest.raises(FileNotFoundError):
        directory_digest([pathlib.Path(tmp_path / 'none')])
