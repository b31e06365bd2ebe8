"""Generation against loops without a cache, without a batch and without a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from tiny_decoders import CONFIGS, loud_params, tokens_of

from jaxpo import sampling
from jaxpo.config import Mesh
from jaxpo.errors import InputError
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import Decoder, head_weight
from jaxpo.sampling import generate, nucleus
from jaxpo.sharding import ROWS, make_mesh, parameter_shardings

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CONFIG = CONFIGS['gemma2-untied']  # windows, post-norms and both soft-caps
DECODER = Decoder(from_hugging_face(CONFIG))
PARAMS = loud_params(CONFIG, seed=3)
LENGTHS = (1, 3, 9, 20, 5)
PROMPTS = [tokens_of(CONFIG, length, seed=length) for length in LENGTHS]
NEW = 12


@jax.jit
def _full_logits(params, tokens):
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    ones = jnp.ones_like(tokens)
    hidden = DECODER.apply({'params': params}, tokens, positions, ones, 0 * ones)
    logits = hidden @ head_weight(params).T
    return 3.0 * jnp.tanh(logits / 3.0)


def next_log_probabilities(sequence):
    """float64 [V], from one forward pass over the whole sequence (padded on the right to one shape)."""
    padded = np.zeros((1, 40), np.int32)
    padded[0, : len(sequence)] = sequence
    logits = np.asarray(_full_logits(PARAMS, padded)[0, len(sequence) - 1], np.float64)
    return logits - np.log(np.sum(np.exp(logits - logits.max()))) - logits.max()


def greedy(prompt, end_ids):
    """(tokens, ended, logp) of the plain loop."""
    sequence, logp = list(prompt), 0.0
    for _ in range(NEW):
        logps = next_log_probabilities(sequence)
        token = int(np.argmax(logps))
        logp += logps[token]
        if token in end_ids:
            return sequence[len(prompt) :], True, logp
        sequence.append(token)
    return sequence[len(prompt) :], False, logp


def run(prompts=PROMPTS, **options):
    settings = {'end_ids': [7], 'max_new_tokens': NEW, 'batch_size': 4} | options
    return generate(settings.pop('decoder', DECODER), settings.pop('params', PARAMS), prompts, **settings)


def flat(results):
    return [(one.tokens.tolist(), one.ended) for many in results for one in many]


def test_greedy_equals_the_loop_without_cache():
    unended = [greedy(prompt, ())[0] for prompt in PROMPTS]
    end_ids = [unended[0][4], unended[2][0]]  # two of them
    expected = [greedy(prompt, end_ids) for prompt in PROMPTS]
    assert {0, NEW} < {len(tokens) for tokens, _, _ in expected}  # ended at once, later and never
    results = run(end_ids=end_ids, temperature=0.0)
    assert flat(results) == [(tokens, ended) for tokens, ended, _ in expected]
    np.testing.assert_allclose([many[0].logp for many in results], [logp for *_, logp in expected], atol=1e-4)


def test_a_draw_depends_on_seed_index_and_number_only():
    together = run(temperature=1.0, top_p=0.9, completions=2, seed=5, batch_size=10)
    reordered = [4, 0]
    alone = run([PROMPTS[at] for at in reordered], indices=reordered, top_p=0.9, completions=3, seed=5, batch_size=1)
    for results, at in zip(alone, reordered):
        assert flat([results[:2]]) == flat([together[at]])
        np.testing.assert_allclose([one.logp for one in results[:2]], [one.logp for one in together[at]], atol=1e-4)
    assert flat([together[2][:1]]) != flat([together[2][1:]])
    assert flat(run(temperature=1.0, top_p=0.9, completions=2, seed=6, batch_size=10)) != flat(together)
    same_prompt = run([PROMPTS[1], PROMPTS[1]], top_p=0.9, batch_size=1)
    assert flat(same_prompt[:1]) != flat(same_prompt[1:])


def test_logp_is_that_of_the_untempered_policy():
    (result,) = run(PROMPTS[2:3], temperature=0.7, top_p=0.8, end_ids=[])[0]
    sequence, expected = list(PROMPTS[2]), 0.0
    for token in result.tokens:
        expected += next_log_probabilities(sequence)[token]
        sequence.append(token)
    assert len(result.tokens) == NEW and not result.ended
    assert result.logp == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(('temperature', 'top_p'), [(1.0, 1.0), (0.6, 1.0), (1.3, 0.7)])
def test_first_tokens_are_distributed_as_asked(temperature, top_p):
    """Frequencies of 4000 draws against the tempered nucleus, worked out in NumPy."""
    draws = 4000
    results = run(
        PROMPTS[1:2],
        temperature=temperature,
        top_p=top_p,
        completions=draws,
        max_new_tokens=1,
        batch_size=draws,
        end_ids=[],
    )
    counts = np.bincount([one.tokens[0] for one in results[0]], minlength=CONFIG['vocab_size'])
    probabilities = np.exp(next_log_probabilities(PROMPTS[1]) / temperature)
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(-probabilities)
        kept = order[: 1 + np.searchsorted(np.cumsum(probabilities[order]), top_p)]
        assert 1 < len(kept) < len(order)
        tail = np.delete(np.arange(len(order)), kept)
        assert counts[tail].sum() == 0
        probabilities[tail] = 0
        probabilities /= probabilities.sum()
    deviation = np.sqrt(draws * probabilities * (1 - probabilities))
    assert np.all(np.abs(counts - draws * probabilities) <= 5 * deviation + 1e-9)


@pytest.mark.parametrize('top_p', [1e-6, 0.3, 0.9, 0.999])
def test_nucleus_equals_the_sorted_one(top_p):
    logits = np.random.default_rng(0).normal(0, 3, (5, 300)).astype(np.float32)
    logits[0, 7] = 100.0  # all the mass
    kept = np.isfinite(np.asarray(nucleus(logits, jnp.float32(top_p))))
    for row, mask in zip(np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)), kept):
        order = np.argsort(-row)
        count = 1 + np.searchsorted(np.cumsum(row[order] / row.sum()), top_p)
        assert np.flatnonzero(mask).tolist() == sorted(order[:count].tolist())


def test_nucleus_keeps_the_fewest_tokens_that_hold_top_p():
    probabilities = np.array([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]], np.float32)
    kept = np.isfinite(np.asarray(nucleus(jnp.log(probabilities), jnp.float32(0.7))))
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]


def test_a_mesh_changes_nothing():
    mesh = make_mesh(Mesh(data=4, fsdp=2))
    params = jax.device_put(PARAMS, parameter_shardings(PARAMS, mesh))
    decoder = DECODER.clone(rows=NamedSharding(mesh, ROWS))
    for options in ({'temperature': 0.0}, {'temperature': 1.0, 'top_p': 0.9}):
        whole = run(**options)
        split = run(decoder=decoder, params=params, mesh=mesh, batch_size=5, **options)
        assert flat(split) == flat(whole)
        np.testing.assert_allclose([many[0].logp for many in split], [many[0].logp for many in whole], atol=1e-4)


def test_settings_compile_nothing():
    run(temperature=0.8, top_p=0.9, seed=1, max_new_tokens=9)
    compiled = sampling._generate_batch._cache_size()
    run(temperature=0.0, top_p=1.0, seed=2, max_new_tokens=11)
    assert sampling._generate_batch._cache_size() == compiled


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'temperature': -0.1}, 'temperature'),
        ({'temperature': float('nan')}, 'temperature'),
        ({'top_p': 0.0}, 'top_p'),
        ({'top_p': 1.01}, 'top_p'),
        ({'max_new_tokens': 0}, 'max_new_tokens'),
        ({'completions': 0}, 'completions'),
        ({'batch_size': 0}, 'batch_size'),
        ({'end_ids': [61]}, 'End id 61'),
        ({'indices': [1]}, '1 indices'),
        ({'prompts': [np.zeros(0, np.int32)]}, 'Prompt 0 is empty'),
        ({'prompts': [np.array([61])]}, 'Prompt 0 has token 61'),
        ({'prompts': [np.zeros(120, np.int32)]}, 'room for 116'),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        run(**options)
