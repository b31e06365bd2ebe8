"""References with weights of their own, through the whole loop: where they lie, in what dtype, and that they stay."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_adapters
import tiny_checkpoints
import tiny_runs
from test_averages import assert_equal, differ
from test_step import CONFIG, PADDED, PAIRS, parameters
from test_train import logged, saved_state, stop_after

from jaxpo import commands, evaluate, loading, objective, run, scoring, step, train
from jaxpo.config import Evaluate, Lora, Model, Reference, Train
from jaxpo.data.rows import fill_rows
from jaxpo.errors import InputError, Interrupted
from jaxpo.models import lora
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures('compiled_quickly')

THREE = ('initial', 'one', 'two')
TOKENS = 32  # of a prompt with a sample of it, at most


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The tiny experiment, and two other models."""
    folder = tmp_path_factory.mktemp('held')
    tiny_runs.experiment(folder)
    for seed, name in enumerate(('one', 'two'), 5):
        write_model(folder / name, seed)
    return folder


def write_model(path, seed):
    tiny_checkpoints.write_directory(
        path, tiny_runs.CONFIG, tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG, seed=seed)
    )


def experiment(folder, output='run', **changes):
    """Four steps against three live references."""
    references = {name: Reference('policy' if name == 'initial' else str(folder / name)) for name in THREE}
    settings = {
        'output': str(folder / output),
        'references': references,
        'train': Train(batch_pairs=6, steps=4),
        'tables': str(folder / 'tables'),
    }
    settings |= changes
    several = len(settings['references']) > 1
    settings.setdefault('objective', {**({'mixture': {'mix': 'geometric'}} if several else {}), 'dpo': {}})
    return tiny_runs.experiment(folder, **settings)


def train_keeping(made):
    """Trains, and returns the states that the loop begins and ends with; the first of them as memory kinds."""
    kept, loop = [], train._loop

    def watched(run_, pairs, schedule, state, *arguments):
        kept.append(memory_kinds(state))
        kept.append(loop(run_, pairs, schedule, state, *arguments))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, '_loop', watched)
        train.train(made)
    return kept


def memory_kinds(state):
    return {
        name: {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)}
        for name, params in state.reference_params.items()
    }


@pytest.fixture(scope='module')
def on_device(folder):
    made = experiment(folder)
    return made, *train_keeping(made)


def test_references_are_bit_identical_after_training(on_device):
    made, _, state = on_device
    start = loading.load_start(run.prepare(made))
    assert set(state.reference_params) == set(THREE)
    assert_equal(jax.device_get(state.reference_params), jax.device_get(start.reference_params))
    assert_equal(jax.device_get(start.reference_params['initial']), jax.device_get(start.params))
    assert differ(start.reference_params['one'], start.reference_params['two'])
    assert differ(state.params, start.params)


def test_references_in_the_hosts_memory_train_and_resume_bit_for_bit(on_device, folder, monkeypatch):
    made, kinds, state = on_device
    assert kinds == memory_kinds(state) == dict.fromkeys(THREE, {'device'})
    references = made.config.references
    moved = {name: dataclasses.replace(references[name], memory='pinned_host') for name in ('initial', 'two')}
    hosted = experiment(folder, output='hosted', references={**references, **moved})
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(Interrupted):
            train.train(hosted)
    kinds, state = train_keeping(hosted)
    expected = {'initial': {'pinned_host'}, 'one': {'device'}, 'two': {'pinned_host'}}
    assert kinds == memory_kinds(state) == expected
    assert_equal(saved_state(hosted), saved_state(made))
    assert logged(hosted) == logged(made)
    assert_equal(jax.device_get(state.reference_params), jax.device_get(on_device[2].reference_params))


def ratios_of(made, names):
    """Log-ratios at the start, `[chosen, rejected]` of the training pairs, by reference."""
    prepared = run.prepare(made)
    start = loading.load_start(prepared)
    batch = run.make_batch(prepared, run.read_pairs(prepared).train)
    found = jax.device_get(jax.jit(step.make_score_step(prepared.models, names))(start.params, start.frozen, batch))
    return {name: np.stack([found[side][:, place] for side in found]) for place, name in enumerate(names)}


def bytes_of(made, capsys):
    """The dry run's table of bytes."""
    commands.dry_run(made)
    units = {'B': 1, 'KiB': 2**10, 'MiB': 2**20}
    found = re.findall(r'│ (\S[^│]*?) +│ +([\d.]+) (B|KiB|MiB) │', capsys.readouterr().out)
    return {name: float(value) * units[unit] for name, value, unit in found}


def test_storage_in_bfloat16_halves_the_bytes_and_rounds(folder, capsys):
    full, halved = Reference(str(folder / 'one')), Reference(str(folder / 'one'), dtype='bfloat16')
    made = experiment(folder, references={'full': full, 'halved': halved})
    sizes = bytes_of(made, capsys)
    # All but norms, which stay float32.
    start = loading.load_start(run.prepare(made)).reference_params
    vectors = sum(leaf.nbytes for path, leaf in jax.tree.leaves_with_path(start['full']) if 'norm' in str(path))
    whole = sizes['reference full (float32)']
    assert sizes['reference halved (bfloat16)'] == pytest.approx((whole - vectors) / 2 + vectors, rel=1e-3)
    held = {leaf.dtype for path, leaf in jax.tree.leaves_with_path(start['halved']) if 'norm' not in str(path)}
    assert held == {jnp.dtype('bfloat16')}
    ratios = ratios_of(made, ('full', 'halved'))
    difference = np.abs(ratios['full'] - ratios['halved'])
    size = np.abs(ratios['full']).max()
    assert 0 < difference.max() < 0.05 * size


def test_a_dry_run_says_what_every_kind_takes(folder, capsys):
    references = {
        'off': Reference(),
        'moving': Reference(update_every=2),
        'hosted': Reference(str(folder / 'one'), memory='pinned_host'),
        'tabled': Reference(str(folder / 'two'), table=True),
    }
    sizes = bytes_of(experiment(folder, references=references, lora=Lora(rank=2)), capsys)
    base = sizes['policy beneath its adapter (float32)']
    assert sizes['reference hosted (float32), fetched from the host for each step'] == base
    adapter = sizes['policy (float32)']
    assert sizes['reference moving (float32, follows the policy)'] == adapter < base / 4
    assert sizes['optimizer'] == pytest.approx(2 * adapter, rel=0.01)
    assert not any('off' in name or 'tabled' in name for name in sizes)


@pytest.mark.parametrize('spec', [{'dpo': {}}, {'tdpo2': {}}, {'tis_dpo': {}}], ids=lambda spec: next(iter(spec)))
def test_no_gradient_reaches_any_reference(spec):
    decoder = Decoder(from_hugging_face(CONFIG))
    names = ('one', 'two', 'positive', 'negative')  # roles, where the loss has them
    made = objective.make({'mixture': {'mix': 'harmonic', 'weights': 'arwc', 'clip': 'adaptive'}, **spec}, names)
    frozen_models = dict.fromkeys(names, scoring.FrozenModel(decoder, 'own'))
    models = scoring.Models(decoder, frozen_models, None)
    trained = {'policy': parameters(), 'method': {}}
    references = {name: parameters(seed=seed) for seed, name in enumerate(names, 1)}
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), fill_rows(PAIRS, PADDED))
    counts = objective.counts_of(batch.chosen.weights, batch.rejected.weights)

    def loss(trained, references):
        pairs = scoring.sides(models, made, trained, {'base': {}, 'references': references}, batch)
        weight = batch.pair_weight.reshape(-1)
        return objective.evaluate(made, made.hyperparameters, *pairs, weight, counts)[0]

    by_policy, by_reference = jax.jit(jax.grad(loss, argnums=(0, 1)))(trained, references)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(by_policy))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_reference))


def test_no_gradient_reaches_an_average_of_an_adapter():
    architecture = from_hugging_face(CONFIG)
    settings = lora.Lora(2, 1.0, ('query', 'down'), 'a')
    decoder = Decoder(architecture, lora=settings)
    frozen_models = {
        'moving': scoring.FrozenModel(decoder, 'adapter'),
        'off': scoring.FrozenModel(Decoder(architecture), 'base'),
    }
    models = scoring.Models(decoder, frozen_models, None)
    made = objective.make({'mixture': {'mix': 'geometric'}, 'dpo': {}}, tuple(frozen_models))
    base, shapes = parameters(), lora.abstract_adapter(architecture, settings)
    random = np.random.default_rng(2)
    policy, average = (jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape), shapes) for _ in range(2))
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), fill_rows(PAIRS, PADDED))
    counts = objective.counts_of(batch.chosen.weights, batch.rejected.weights)

    def loss(policy, average):
        frozen = {'base': base, 'references': {'moving': average}}
        pairs = scoring.sides(models, made, {'policy': policy, 'method': {}}, frozen, batch)
        weight = batch.pair_weight.reshape(-1)
        return objective.evaluate(made, made.hyperparameters, *pairs, weight, counts)[0]

    by_policy, by_average = jax.jit(jax.grad(loss, argnums=(0, 1)))(policy, average)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(by_policy))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(by_average))


def merged_by_hand(tensors, adapter, scale):
    """W + scale * B @ A of Hugging Face's kernels [out, in]."""
    found = dict(tensors)
    for name in tensors:
        stem = 'base_model.model.' + name.removesuffix('.weight')
        if f'{stem}.lora_A.weight' in adapter:
            found[name] = tensors[name] + scale * adapter[f'{stem}.lora_B.weight'] @ adapter[f'{stem}.lora_A.weight']
    return found


@pytest.mark.parametrize('source', ['policy', 'one'])
def test_an_adapter_is_merged_into_a_reference(tmp_path, source):
    tiny_runs.experiment(tmp_path)
    write_model(tmp_path / 'one', 5)
    tensors = tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG, seed=0 if source == 'policy' else 5)
    factors = tiny_adapters.peft_tensors(tiny_runs.CONFIG)
    adapter = tiny_adapters.write_peft(tmp_path / 'adapter', tiny_adapters.peft_config(), factors)
    tiny_checkpoints.write_directory(tmp_path / 'merged', tiny_runs.CONFIG, merged_by_hand(tensors, factors, 6 / 4))
    where = source if source == 'policy' else str(tmp_path / source)
    references = {
        'bare': Reference(where),
        'adapted': Reference(where, adapter=str(adapter)),
        'by_hand': Reference(str(tmp_path / 'merged')),
    }
    start = jax.device_get(loading.load_start(run.prepare(experiment(tmp_path, references=references))))
    held = start.reference_params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), held['adapted'], held['by_hand'])
    assert np.abs(held['adapted']['layers']['mlp']['down'] - held['bare']['layers']['mlp']['down']).max() > 0.1


def test_an_adapter_on_a_policy_that_has_one_is_refused(tmp_path):
    model = Model(str(tmp_path / 'model'), adapter='one')
    references = {'initial': Reference(adapter='other')}
    with pytest.raises(InputError, match=r'references.initial.adapter cannot be merged into a policy'):
        run.prepare(experiment(tmp_path, model=model, references=references))


@pytest.fixture(scope='module')
def evaluated(folder):
    """The start of a run that samples, against a table and two live references, in this order."""
    references = {
        'tabled': Reference(table=True),
        'one': Reference(str(folder / 'one')),
        'two': Reference(str(folder / 'two')),
    }
    made = experiment(folder, output='evaluated', references=references, evaluate=Evaluate(sample_prompts=4))
    prepared = run.prepare(made)
    state = loading.load_start(prepared)
    return prepared, state, evaluate.evaluate(evaluate.make_evaluator(prepared, []), state)


def test_the_kl_is_measured_to_each_live_reference(evaluated):
    _, _, found = evaluated
    for name in ('one', 'two'):
        ratios = [sample.log_ratios[name] for sample in found.samples]
        assert len(ratios) == 8 and found.metrics[f'eval/kl/{name}'] == pytest.approx(np.mean(ratios))
        by_prompt = np.reshape(ratios, (4, 2)).mean(axis=1)
        error = found.metrics[f'eval/kl/{name}_standard_error']
        assert error == pytest.approx(by_prompt.std(ddof=1) / 2)
    assert found.metrics['eval/kl/one'] != found.metrics['eval/kl/two']
    assert 'eval/kl' not in found.metrics and 'eval/kl/tabled' not in found.metrics
    assert all(set(sample.log_ratios) == {'one', 'two'} for sample in found.samples)


def test_log_ratios_of_samples_are_those_of_whole_logits(evaluated):
    prepared, state, found = evaluated
    end = prepared.tokenizer.eos_token_id
    prompts = evaluate.prompt_files.read_prompts(
        prepared.config.data.evaluation, prepared.config.data, prepared.tokenizer
    )
    checked = 0
    for place, sample in enumerate(found.samples):
        words = prepared.tokenizer(sample.completion, add_special_tokens=False)['input_ids']
        completion = [*words, *([end] if sample.ended else [])]
        if len(completion) != sample.tokens:
            continue  # its text leaves out special tokens
        checked += 1
        prompt = list(prompts[place // 2].ids)
        policy = sequence_logp(prepared.decoder, state.params, prompt, completion)
        for name, ratio in sample.log_ratios.items():
            reference = sequence_logp(prepared.decoder, state.reference_params[name], prompt, completion)
            assert ratio == pytest.approx(policy - reference, abs=1e-3)
    assert checked > 2


def sequence_logp(decoder, params, prompt, completion):
    ids = prompt + completion
    tokens = np.array([ids + [0] * (TOKENS - len(ids))], np.int32)
    logps = log_softmax(Decoder(decoder.architecture), jax.device_get(params), tokens)
    return sum(float(logps[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))


@functools.partial(jax.jit, static_argnums=0)
def log_softmax(decoder, params, tokens):
    positions, ones = jnp.arange(TOKENS, dtype=jnp.int32)[None], jnp.ones_like(tokens)
    hidden = decoder.apply({'params': params}, tokens, positions, ones, 0 * ones)[0]
    return jax.nn.log_softmax(hidden @ params['head'].T)


def test_the_kl_to_a_first_live_reference_has_no_name(folder):
    single = {'one': Reference(str(folder / 'one'))}
    several = {**single, 'two': Reference(str(folder / 'two'))}
    found = {}
    for references in (single, several):
        made = experiment(folder, references=references, evaluate=Evaluate(sample_prompts=2))
        prepared = run.prepare(made)
        evaluator = evaluate.make_evaluator(prepared, [])
        found[len(references)] = evaluate.evaluate(evaluator, loading.load_start(prepared)).metrics
    assert 'eval/kl/one' not in found[1]
    assert found[2]['eval/kl'] == found[2]['eval/kl/one'] == pytest.approx(found[1]['eval/kl'], rel=1e-5)
    assert found[2]['eval/kl/two'] != found[2]['eval/kl']
