"""Adapters of the PEFT library in and out: values, names, and everything it would compute otherwise refused."""

import json
import math
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny_meshes
from flax.traverse_util import flatten_dict
from tiny_adapters import MODULES, peft_config, peft_tensors, write_peft
from tiny_checkpoints import hugging_face_tensors, on_one_device, raw_tensors, write_directory
from tiny_decoders import CONFIGS, loud_params, tokens_of

from jaxpo import sharding
from jaxpo.errors import InputError
from jaxpo.models import lora, peft
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.checkpoint import load_params, write_hugging_face
from jaxpo.models.decoder import Decoder, abstract_params, head_weight
from jaxpo.models.source import open_model

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden' / 'peft_logits.json').read_text())
TOLERANCE = 1e-4
LLAMA = from_hugging_face(CONFIGS['llama'])


def jaxpo_logits(name, params, settings=None):
    """Float32 logits [1, 40, V] of one plain row."""
    architecture, tokens = from_hugging_face(CONFIGS[name]), tokens_of(CONFIGS[name], 1, 40)
    positions, ones = np.arange(40, dtype=np.int32)[None], np.ones_like(tokens)

    @jax.jit
    def logits(params):
        hidden = Decoder(architecture, lora=settings).apply({'params': params}, tokens, positions, ones, 0 * ones)
        logits = jnp.einsum('rtd,vd->rtv', hidden, head_weight(params))
        cap = architecture.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    return np.asarray(logits(params))


def short(modules):
    return tuple(name.split('.')[-1] for name in modules)


@pytest.mark.parametrize('name', GOLDEN['models'])
def test_logits_equal_those_that_peft_computed(tmp_path, name):
    """The committed logits of PEFT, its own adapter_config.json read, with adapters live and merged."""
    golden = GOLDEN['models'][name]
    assert golden['tokens'] == tokens_of(CONFIGS[name], 1, 40).tolist()
    settings, modules = golden['adapter_config'], short(golden['adapter_config']['target_modules'])
    tensors = peft_tensors(CONFIGS[name], settings['r'], modules)
    directory = write_peft(tmp_path / 'adapter', settings, tensors)
    form, adapter = peft.read_adapter(directory, from_hugging_face(CONFIGS[name]))
    both = lora.combined(loud_params(CONFIGS[name]), adapter)
    live = jaxpo_logits(name, both, form)
    np.testing.assert_allclose(live[:, golden['at']], golden['logits'], atol=TOLERANCE, rtol=0)
    merged = jaxpo_logits(name, lora.merged(both, form))
    np.testing.assert_allclose(merged[:, golden['at']], golden['logits'], atol=TOLERANCE, rtol=0)
    assert np.abs(live - jaxpo_logits(name, both)).max() > 0.1


@pytest.mark.parametrize('name', ['llama', 'gemma2', 'qwen3'])
def test_peft_opens_what_is_written_and_computes_the_same(tmp_path, name):
    pytest.importorskip('torch', reason='logits of PEFT need torch')
    theirs = pytest.importorskip('peft', reason='needs peft: pip install --no-deps peft accelerate psutil')
    from golden.make_decoder_golden import logits_of, torch_model

    architecture, params = from_hugging_face(CONFIGS[name]), loud_params(CONFIGS[name])
    settings = lora.Lora(3, 16 / 3, ('query', 'output', 'gate', 'down'), 'a')
    rng = np.random.default_rng(0)
    shapes = lora.abstract_adapter(architecture, settings)
    adapter = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    peft.write_adapter(tmp_path / 'adapter', jax.device_put(adapter), settings, architecture, 'our/base')
    base = torch_model(CONFIGS[name], params)
    tokens = tokens_of(CONFIGS[name], 1, 40)
    plain = logits_of(base, tokens)
    model = theirs.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()
    config = model.peft_config['default']
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (3, 16, 'our/base')
    assert sum('lora_' in key for key in theirs.get_peft_model_state_dict(model)) == len(
        raw_tensors(tmp_path / 'adapter')
    )
    logits = logits_of(model, tokens)
    ours = jaxpo_logits(name, lora.combined(params, adapter), settings)
    np.testing.assert_allclose(ours, logits, atol=TOLERANCE, rtol=0)
    assert np.abs(logits - plain).max() > 0.1


def test_leaves_hold_the_named_tensors_transposed_and_stacked(tmp_path):
    tensors = peft_tensors(CONFIGS['llama'])
    settings, adapter = peft.read_adapter(write_peft(tmp_path / 'adapter', peft_config(), tensors), LLAMA)
    assert settings == lora.Lora(4, 1.5, ('query', 'value', 'down'))
    stem = 'base_model.model.model.layers.{}.self_attn.v_proj.lora_{}.weight'
    for factor in 'AB':
        leaf = adapter['layers']['attention'][f'value_lora_{factor.lower()}']
        np.testing.assert_array_equal(leaf, [tensors[stem.format(layer, factor)].T for layer in range(3)])
    assert flatten_dict(adapter).keys() == {path for name in settings.targets for path in lora.factor_paths(name)}


@pytest.mark.parametrize('name', CONFIGS)
def test_writing_and_reading_gives_the_same_bits(tmp_path, name):
    architecture = from_hugging_face(CONFIGS[name])
    source = write_peft(
        tmp_path / 'source', peft_config(target_modules=list(MODULES)), peft_tensors(CONFIGS[name], 4, MODULES)
    )
    settings, adapter = peft.read_adapter(source, architecture)
    peft.write_adapter(tmp_path / 'written', jax.device_put(adapter), settings, architecture, 'base')
    assert raw_tensors(tmp_path / 'written') == raw_tensors(source)
    written = json.loads((tmp_path / 'written' / peft.CONFIG).read_text())
    assert (written['r'], written['lora_alpha'], written['target_modules']) == (4, 6, list(MODULES))
    again, tree = peft.read_adapter(str(tmp_path / 'written'), architecture)
    assert again == settings
    jax.tree.map(np.testing.assert_array_equal, tree, adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['source', 'written']


@pytest.mark.parametrize(
    ('changes', 'scale'),
    [
        ({'use_rslora': True}, 6 / math.sqrt(4)),
        ({'lora_alpha': 1}, 0.25),
        ({'lora_alpha': None}, 2.0),
        ({'lora_alpha': 2.5}, 0.625),
    ],
)
def test_the_scale_is_that_of_peft_and_survives_writing(tmp_path, changes, scale):
    directory = write_peft(tmp_path / 'adapter', peft_config(**changes), peft_tensors(CONFIGS['llama']))
    settings, adapter = peft.read_adapter(directory, LLAMA)
    assert settings.scale == scale
    peft.write_adapter(tmp_path / 'written', jax.device_put(adapter), settings, LLAMA, 'base')
    assert peft.read_adapter(tmp_path / 'written', LLAMA)[0].scale == pytest.approx(scale, rel=1e-15)


@pytest.mark.parametrize(
    ('changes', 'named'),
    [
        ({'peft_type': 'IA3'}, "'peft_type' is 'IA3'"),
        ({'peft_type': None}, "'peft_type' is None"),
        ({'task_type': 'SEQ_CLS'}, "'task_type' is 'SEQ_CLS'"),
        ({'bias': 'lora_only'}, "'bias' is 'lora_only'"),
        ({'init_lora_weights': 'pissa'}, "'init_lora_weights' is 'pissa'"),
        ({'use_dora': True}, "'use_dora' is True"),
        ({'fan_in_fan_out': True}, "'fan_in_fan_out' is True"),
        ({'lora_bias': True}, "'lora_bias' is True"),
        ({'modules_to_save': ['lm_head']}, "'modules_to_save'"),
        ({'rank_pattern': {'q_proj': 8}}, "'rank_pattern'"),
        ({'alpha_pattern': {'q_proj': 8}}, "'alpha_pattern'"),
        ({'layers_to_transform': [0]}, "'layers_to_transform'"),
        ({'layers_to_transform': 1}, "'layers_to_transform'"),
        ({'layer_replication': [[0, 2], [1, 3]]}, "'layer_replication'"),
        ({'exclude_modules': ['o_proj']}, "'exclude_modules'"),
        ({'a_future_invention': {'on': True}}, "'a_future_invention'"),
        ({'r': 0}, "'r' is a whole number"),
        ({'r': 2.0}, "'r' is a whole number"),
        ({'lora_alpha': 'many'}, "'lora_alpha' is a finite number"),
        ({'lora_alpha': float('inf')}, "'lora_alpha' is a finite number"),
        ({'target_modules': None}, "'target_modules' is a list"),
        ({'target_modules': []}, "'target_modules' is a list"),
        ({'target_modules': '.*_proj'}, "'target_modules' is a list"),
        ({'target_modules': ['q_proj', 'embed_tokens']}, "'embed_tokens'"),
        ({'target_modules': ['q_proj', 'lm_head']}, "'lm_head'"),
        ({'target_modules': ['q_prj']}, "Did you mean 'q_proj'"),
    ],
)
def test_what_peft_computes_otherwise_is_refused_by_name(tmp_path, changes, named):
    directory = write_peft(tmp_path / 'adapter', peft_config(**changes), peft_tensors(CONFIGS['llama']))
    with pytest.raises(InputError, match=named):
        peft.read_adapter(directory, LLAMA)


def test_every_fault_of_the_tensors_is_named(tmp_path):
    tensors = peft_tensors(CONFIGS['llama'])
    stem = 'base_model.model.model.layers'
    del tensors[f'{stem}.1.self_attn.v_proj.lora_A.weight']
    tensors[f'{stem}.0.mlp.down_proj.lora_B.weight'] = np.zeros((24, 5), np.float32)
    tensors[f'{stem}.2.self_attn.q_proj.lora_A.weight'] = np.zeros((24, 4), np.float32)
    tensors['base_model.model.lm_head.weight'] = np.zeros((61, 24), np.float32)
    with pytest.raises(InputError) as raised:
        peft.read_adapter(write_peft(tmp_path / 'adapter', peft_config(), tensors), LLAMA)
    for fault in (
        'missing base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight [4, 24]',
        'misshaped base_model.model.model.layers.0.mlp.down_proj.lora_B.weight: [24, 5], expected [24, 4]',
        'misshaped base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight: [24, 4], expected [4, 24]',
        'unexpected base_model.model.lm_head.weight [61, 24]',
    ):
        assert fault in str(raised.value)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    directory = write_peft(tmp_path / 'adapter', peft_config(), peft_tensors(CONFIGS['llama']))
    with pytest.raises(InputError, match='layers.3.mlp.down_proj.lora_A'):
        peft.open_adapter(directory, from_hugging_face({**CONFIGS['llama'], 'num_hidden_layers': 4}))


def test_files_that_are_missing_or_unsafe_are_refused(tmp_path):
    with pytest.raises(InputError, match='No adapter at'):
        peft.read_adapter(tmp_path / 'nowhere', LLAMA)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError, match='adapter_config.json does not exist'):
        peft.read_adapter(tmp_path / 'empty', LLAMA)
    directory = write_peft(tmp_path / 'adapter', peft_config(), peft_tensors(CONFIGS['llama']))
    weights = directory / peft.WEIGHTS
    moved = shutil.move(weights, tmp_path / 'elsewhere.safetensors')
    with pytest.raises(InputError, match='has no adapter_model.safetensors'):
        peft.read_adapter(directory, LLAMA)
    (directory / 'adapter_model.bin').write_bytes(b'anything')
    with pytest.raises(InputError, match=r'pickle \(adapter_model.bin\)'):
        peft.read_adapter(directory, LLAMA)
    os.symlink(moved, weights)
    with pytest.raises(InputError, match='leads out of its directory'):
        peft.read_adapter(directory, LLAMA)
    weights.unlink()
    weights.write_bytes(b'\x10\0\0\0\0\0\0\0{"broken')
    with pytest.raises(InputError, match='not a whole safetensors file'):
        peft.read_adapter(directory, LLAMA)


def test_values_that_are_not_finite_are_neither_read_nor_written(tmp_path):
    tensors = peft_tensors(CONFIGS['llama'])
    tensors['base_model.model.model.layers.1.mlp.down_proj.lora_A.weight'][0, 0] = np.nan
    with pytest.raises(InputError, match='layers/mlp/down_lora_a has values that are not finite'):
        peft.read_adapter(write_peft(tmp_path / 'adapter', peft_config(), tensors), LLAMA)
    settings = lora.Lora(2, 1.0, ('up',), 'a')
    adapter = lora.init_adapter(LLAMA, settings, jax.random.key(0))
    adapter['layers']['mlp']['up_lora_b'] = adapter['layers']['mlp']['up_lora_b'].at[2, 0, 0].set(jnp.inf)
    with pytest.raises(InputError, match=r'layers.2.mlp.up_proj.lora_B.weight has values that are not finite'):
        peft.write_adapter(tmp_path / 'written', adapter, settings, LLAMA, 'base')
    assert not (tmp_path / 'written').exists()


def test_writing_refuses_a_tree_that_is_not_the_adapter_and_a_directory_in_use(tmp_path):
    settings = lora.Lora(2, 1.0, ('query', 'up'), 'a')
    adapter = lora.init_adapter(LLAMA, settings, jax.random.key(0))
    for wrong in (
        lora.Lora(3, 1.0, settings.targets, 'a'),
        lora.Lora(2, 1.0, ('up',), 'a'),
        lora.Lora(2, 1.0, ('key',)),
    ):
        with pytest.raises(InputError, match='The parameter'):
            peft.write_adapter(tmp_path / 'written', adapter, wrong, LLAMA, 'base')
    (tmp_path / 'used').mkdir()
    (tmp_path / 'used' / 'file').touch()
    with pytest.raises(InputError, match='not empty'):
        peft.write_adapter(tmp_path / 'used', adapter, settings, LLAMA, 'base')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['used']


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    settings = lora.Lora(2, 1.0, ('query',), 'a')

    def interrupted(tensors, path, metadata):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.numpy, 'save_file', interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter = lora.init_adapter(LLAMA, settings, jax.random.key(0))
        peft.write_adapter(tmp_path / 'written', adapter, settings, LLAMA, 'base')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_a_model_is_read_with_its_adapter_merged(tmp_path, dtype):
    """Against float64 sums of the tensors as they are named on disk; sharded equals whole."""
    tensors, factors = hugging_face_tensors(CONFIGS['qwen3'], dtype), peft_tensors(CONFIGS['qwen3'])
    source = open_model(str(write_directory(tmp_path / 'model', CONFIGS['qwen3'], tensors)))
    directory = write_peft(tmp_path / 'adapter', peft_config(), factors)
    architecture = source.architecture
    params = load_params(source, on_one_device(architecture), adapter=str(directory))
    plain = load_params(source, on_one_device(architecture))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.float32.dtype}
    changed = {('attention', 'query'): 'self_attn.q_proj', ('mlp', 'down'): 'mlp.down_proj'}
    for (block, name), module in changed.items():
        for layer in range(3):
            a, b = (
                factors[f'base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight'].astype(np.float64)
                for factor in 'AB'
            )
            expected = tensors[f'model.layers.{layer}.{module}.weight'].astype(np.float64) + 1.5 * b @ a
            np.testing.assert_allclose(params['layers'][block][name][layer], expected.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params['layers']['mlp']['up'], plain['layers']['mlp']['up'])
    mesh = tiny_meshes.mesh(1, 8)
    shardings = sharding.parameter_shardings(abstract_params(architecture), mesh)
    split = load_params(source, shardings, adapter=directory)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == shardings
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), split, params)


def test_random_weights_take_an_adapter_too(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(CONFIGS['llama']))
    source = open_model(f'random:{tmp_path / "config.json"}')
    directory = write_peft(tmp_path / 'adapter', peft_config(), peft_tensors(CONFIGS['llama']))
    placed = on_one_device(LLAMA)
    settings, adapter = peft.read_adapter(directory, LLAMA)
    expected = lora.merged(lora.combined(load_params(source, placed, 7), adapter), settings)
    params = load_params(source, placed, 7, directory)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), params, expected)


def test_a_merged_export_speaks_as_the_adapted_model(tmp_path):
    """transformers decodes the exported model greedily, token for token what the adapted one finds likeliest."""
    torch = pytest.importorskip('torch', reason='decoding by transformers needs torch')
    import transformers

    name = 'qwen2-windowed'
    source = open_model(str(write_directory(tmp_path / 'model', CONFIGS[name])))
    directory = write_peft(tmp_path / 'adapter', peft_config(), peft_tensors(CONFIGS[name]))
    merged = load_params(source, on_one_device(source.architecture), adapter=directory)
    write_hugging_face(tmp_path / 'merged', merged, source.hugging_face_config, None, dtype='float32')
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'merged', attn_implementation='eager')
    tokens = tokens_of(CONFIGS[name], 1, 40)
    with torch.no_grad():
        logits = model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    settings, adapter = peft.read_adapter(directory, source.architecture)
    base = load_params(source, on_one_device(source.architecture))
    adapted = jaxpo_logits(name, lora.combined(base, adapter), settings)
    np.testing.assert_array_equal(logits.argmax(-1), adapted.argmax(-1))
    np.testing.assert_allclose(logits, adapted, atol=TOLERANCE, rtol=0)
    assert (jaxpo_logits(name, base).argmax(-1) != adapted.argmax(-1)).mean() > 0.1
