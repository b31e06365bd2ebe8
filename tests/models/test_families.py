"""The key table against hand-written names, against the decoder's own tree and against transformers."""

import copy

import pytest
from tiny_checkpoints import hugging_face_shapes
from tiny_decoders import CONFIGS

from jaxpo.errors import InputError
from jaxpo.models import families
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import abstract_params


@pytest.mark.parametrize('name', CONFIGS)
def test_names_and_shapes_are_those_written_by_hand(name):
    keys = families.keys(from_hugging_face(CONFIGS[name]))
    assert {tensor: key.shape for key in keys for tensor in key.names} == hugging_face_shapes(CONFIGS[name])


@pytest.mark.parametrize('name', CONFIGS)
def test_leaves_are_those_of_the_decoder(name):
    architecture = from_hugging_face(CONFIGS[name])
    ours = families.nest({key.path: key.leaf_shape for key in families.keys(architecture)})

    def shapes(tree):
        return shapes_of_dict(tree) if isinstance(tree, dict) else tree.shape

    def shapes_of_dict(tree):
        return {name: shapes(branch) for name, branch in tree.items()}

    assert ours == shapes(abstract_params(architecture))


@pytest.mark.parametrize('name', CONFIGS)
def test_names_and_shapes_are_those_of_transformers(name):
    torch = pytest.importorskip('torch', reason='the real state dict needs torch')
    import transformers

    settings = copy.deepcopy(CONFIGS[name])  # transformers writes into what it is given
    config = transformers.AutoConfig.for_model(settings.pop('model_type'), **settings)
    with torch.device('meta'):
        model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    if settings['tie_word_embeddings']:
        del theirs['lm_head.weight']
    assert theirs == hugging_face_shapes(CONFIGS[name])


def _hugging_face_name(family, *path):
    (key,) = [key for key in families.keys(from_hugging_face(CONFIGS[family])) if key.path == ('layers', *path)]
    return key.names[0].removeprefix('model.layers.0.').removesuffix('.weight')


def test_the_same_name_is_another_norm_in_gemma():
    assert _hugging_face_name('llama', 'mlp_norm') == 'post_attention_layernorm'
    assert _hugging_face_name('gemma2', 'attention_post_norm') == 'post_attention_layernorm'
    assert _hugging_face_name('gemma2', 'mlp_norm') == 'pre_feedforward_layernorm'
    assert _hugging_face_name('gemma2', 'mlp_post_norm') == 'post_feedforward_layernorm'


def test_one_error_names_every_fault():
    shapes = hugging_face_shapes(CONFIGS['llama'])
    del shapes['model.norm.weight'], shapes['model.layers.1.mlp.up_proj.weight']
    shapes['model.layers.3.mlp.up_proj.weight'] = (40, 24)
    shapes['model.layers.0.self_attn.q_proj.weight'] = (24, 48)
    with pytest.raises(InputError) as error:
        families.check_tensors(from_hugging_face(CONFIGS['llama']), shapes, 'here')
    assert str(error.value) == (
        'here does not fit its config.json: misshaped model.layers.0.self_attn.q_proj.weight: [24, 48], config.json '
        'says [32, 24]; missing model.layers.1.mlp.up_proj.weight [40, 24]; missing model.norm.weight [24]; '
        'unexpected model.layers.3.mlp.up_proj.weight [40, 24].'
    )


def test_a_tied_model_may_store_its_head_and_old_buffers_but_an_untied_one_needs_the_head():
    tied, untied = from_hugging_face(CONFIGS['llama-tied']), from_hugging_face(CONFIGS['llama'])
    shapes = hugging_face_shapes(CONFIGS['llama-tied'])
    with pytest.raises(InputError, match='missing lm_head.weight'):
        families.check_tensors(untied, shapes, 'here')
    shapes['model.layers.0.self_attn.rotary_emb.inv_freq'] = (4,)
    shapes['lm_head.weight'] = (61, 24)
    families.check_tensors(tied, shapes, 'here')
    shapes['lm_head.weight'] = (62, 24)
    with pytest.raises(InputError, match='misshaped lm_head.weight'):
        families.check_tensors(tied, shapes, 'here')


def test_a_missing_leaf_is_named():
    with pytest.raises(InputError, match='no leaf layers/mlp/up'):
        families.leaf({'layers': {'mlp': {'down': 0}}}, ('layers', 'mlp', 'up'))
