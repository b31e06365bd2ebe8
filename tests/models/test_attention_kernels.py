"""Every attention kernel answers as dense attention does, and what one cannot do is refused before it runs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_meshes
import tiny_runs
from jax.sharding import NamedSharding
from tiny_decoders import CONFIGS, loud_params

from jaxpo import config, report, run
from jaxpo.data.rows import fill_rows
from jaxpo.errors import InputError
from jaxpo.models import attention_choice, attention_kernels
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.attention import visible
from jaxpo.models.attention_kernels import mix, segment_views, sight, within
from jaxpo.models.cache import empty_cache
from jaxpo.models.decoder import Decoder
from jaxpo.sharding import ROWS
from jaxpo.types import Pair, Sequence

pytestmark = pytest.mark.usefixtures('compiled_quickly')
NEAR = {'atol': 2e-5, 'rtol': 2e-5}
T = 256
CONFIG = {**CONFIGS['gemma2'], 'head_dim': 64, 'sliding_window': T, 'vocab_size': 62}
GEMMA = from_hugging_face(CONFIG)
NARROW = dataclasses.replace(GEMMA, windows=(40, None, 40))


@pytest.fixture
def interpreted(monkeypatch):
    """Splash as the program it is, run by XLA, in blocks so small that a row has four."""
    monkeypatch.setattr(attention_kernels, 'LARGEST_BLOCK', 128)
    monkeypatch.setattr(attention_kernels, 'splash', functools.partial(attention_kernels.splash, interpret=True))


def pairs(count, longest=40):
    """Pairs with a companion each."""
    random = np.random.default_rng(0)

    def ids():
        return random.integers(0, 61, random.integers(1, longest)).astype(np.int32)

    return [Pair(ids(), ids(), ids(), index, companions={'other': Sequence(ids(), ids())}) for index in range(count)]


def rows_of(layout):
    """Tokens, positions, segment and branch `[8, T]` of pairs in rows, the last ones without any."""
    settings = config.Rows(layout=layout, lengths=(T,), microbatch=8)
    batch = fill_rows(pairs(7 if layout == 'padded' else 12), settings, row_multiple=8)
    batch = jax.tree.map(lambda x: x[0], batch)
    return np.stack([batch.tokens, batch.positions, batch.segment, batch.branch])


def heads_of(architecture, rows, seed=0):
    """Queries, keys, values, and a cotangent that is 0 on padding."""
    random = np.random.default_rng(seed)
    counts = (architecture.heads, architecture.key_value_heads, architecture.key_value_heads, architecture.heads)
    *heads, weight = (
        random.normal(size=(*rows.shape[1:], count, architecture.head_dim)).astype(np.float32) for count in counts
    )
    weight = weight.reshape(*rows.shape[1:], -1) * (rows[2] > 0)[:, :, None]
    return heads, weight


def mixed(kernel, architecture, rows, heads, weight, *, branches, window=None, mesh=None):
    """Mixed values of real tokens, and the derivatives of their weighted sum by queries, keys and values."""
    sharding = None if mesh is None else NamedSharding(mesh, ROWS)

    @jax.jit
    def both(heads, rows, weight, window):
        def total(heads):
            query, *own = heads
            seen = within(sight(kernel, tuple(rows[1:]), None, branches), window)
            values = mix(kernel, query, tuple(own), None, seen, architecture, sharding)
            return jnp.sum(values * weight), values

        (_, values), gradient = jax.value_and_grad(total, has_aux=True)(heads)
        return values, gradient

    values, gradient = both(heads, rows, weight, window)
    assert np.isfinite(values).all()
    return np.where(rows[2][:, :, None] > 0, values, 0), gradient


def assert_near(got, wanted):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **NEAR), got, wanted)


@pytest.mark.parametrize('layout', ['shared', 'packed', 'padded'])
def test_views_of_rows_say_what_positions_and_branches_say(layout):
    """Causal by place within a view is `visible`, and where one view does, places are as far apart as positions."""
    rows = rows_of(layout)
    _, positions, segment, branch = rows
    branches = 2 if layout == 'shared' else 1
    ids = np.asarray(segment_views(segment, branch, branches))
    view = np.clip(branch - 1, 0, branches - 1)[:, None]
    mine = np.take_along_axis(ids, view, axis=1)[:, 0, :, None]
    keys = np.take_along_axis(ids[:, :, None, :], view[..., None], axis=1)[:, 0]
    seen = np.tri(T, dtype=bool) & (mine == keys)
    real = segment > 0
    wanted = np.asarray(visible((positions, segment, branch), (positions, segment, branch)))
    np.testing.assert_array_equal(seen[real], wanted[real])
    assert seen.any(axis=2).all() and real.any(axis=1).sum() > 2 and not real.all()
    if branches == 1:
        apart = positions[:, :, None] - positions[:, None, :]
        places = np.arange(T)[:, None] - np.arange(T)
        np.testing.assert_array_equal(np.where(wanted, apart, 0), np.where(wanted, places, 0))


def test_splash_is_dense_attention_where_rows_share_prompts(interpreted):
    """On a mesh that splits rows and heads; grouped heads, soft-cap, companions, padding and a row of nothing else."""
    rows = rows_of('shared')
    heads, weight = heads_of(GEMMA, rows)
    assert not rows[2][-1].any()
    wanted = mixed('xla', GEMMA, rows, heads, weight, branches=2)
    got = mixed('splash', GEMMA, rows, heads, weight, branches=2, mesh=tiny_meshes.mesh(data=2, tensor=2))
    assert_near(got, wanted)
    assert all(np.abs(leaf).max() > 0.1 for leaf in jax.tree.leaves(wanted))


def test_a_decoder_with_splash_is_the_decoder(interpreted):
    """Layers with and without a sliding window in one scan, each rematerialised, parameters split too."""
    rows = rows_of('packed')
    params = loud_params(CONFIG)
    mesh = tiny_meshes.mesh(fsdp=2, tensor=2)

    def gradient(**options):
        decoder = Decoder(NARROW, remat='full', branches=1, **options)

        @jax.jit
        def loss(params, rows):
            hidden = decoder.apply({'params': params}, *rows)
            return jnp.mean(jnp.where(rows[2][:, :, None] > 0, hidden, 0) ** 3)

        return jax.value_and_grad(loss)(params, rows)

    (value, by_params), (dense, dense_by_params) = (
        gradient(attention='splash', rows=NamedSharding(mesh, ROWS)),
        gradient(attention='xla'),
    )
    np.testing.assert_allclose(value, dense, rtol=1e-5)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), by_params, dense_by_params)


def test_cudnn_is_told_the_mask_the_scale_and_the_groups(monkeypatch):
    """Its arguments, answered by JAX's own dense attention."""
    dense = jax.nn.dot_product_attention

    def answered(*heads, mask, scale, implementation):
        assert implementation == 'cudnn'
        return dense(*heads, mask=mask, scale=scale)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', answered)
    plain = dataclasses.replace(NARROW, attention_softcap=None)
    rows = rows_of('shared')
    heads, weight = heads_of(plain, rows)
    wanted = mixed('xla', plain, rows, heads, weight, branches=2, window=40)
    got = mixed('cudnn', plain, rows, heads, weight, branches=2, window=40, mesh=tiny_meshes.mesh(data=2, tensor=2))
    assert_near(got, wanted)


def test_cudnn_is_dense_attention():
    if jax.default_backend() != 'gpu':
        pytest.skip('cuDNN needs an NVIDIA GPU.')
    plain = dataclasses.replace(NARROW, attention_softcap=None)
    rows = rows_of('shared')
    heads, weight = heads_of(plain, rows)
    heads = [head.astype(jnp.bfloat16) for head in heads]
    wanted = mixed('xla', plain, rows, heads, weight, branches=2, window=40)
    got = mixed('cudnn', plain, rows, heads, weight, branches=2, window=40)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=0.05, rtol=0.05), got, wanted)


def test_a_cache_is_read_by_dense_attention():
    decoder = Decoder(GEMMA, attention='splash')
    params = jax.eval_shape(lambda: loud_params(CONFIG))
    place = np.ones((4, 2, 1), np.int32)

    def generated(params, place, cache):
        return decoder.apply({'params': params}, *place, cache)

    program = jax.make_jaxpr(generated)(params, place, empty_cache(GEMMA, 2, 8, jnp.float32))
    assert 'pallas_call' not in str(program)
    scored = jax.make_jaxpr(lambda params: decoder.apply({'params': params}, *rows_of('shared')))(params)
    assert 'pallas_call' in str(scored)


ASKED = {'platform': 'tpu', 'dtype': 'bfloat16', 'lengths': (T, 512), 'branches': 2}
LLAMA = dataclasses.replace(from_hugging_face(CONFIGS['llama']), head_dim=64)


@pytest.mark.parametrize(
    ('kernel', 'architecture', 'changes', 'message'),
    [
        ('splash', LLAMA, {'platform': 'gpu'}, 'runs on tpu devices, not on gpu'),
        ('cudnn', LLAMA, {}, 'runs on gpu devices, not on tpu'),
        ('splash', LLAMA, {'lengths': (512, 1000)}, 'rows.lengths 1000 would have to be 1024'),
        ('splash', dataclasses.replace(LLAMA, head_dim=12), {}, 'multiples of 8, up to 256 wide, not 12'),
        ('splash', dataclasses.replace(LLAMA, head_dim=264), {}, 'up to 256 wide'),
        ('splash', NARROW, {}, 'gemma2 of 3 layers: .* window of 40 positions in rows of 512 tokens that share'),
        ('splash', GEMMA, {}, 'set rows.layout to packed, or rows.lengths to no more than the window'),
        ('cudnn', LLAMA, {'platform': 'gpu', 'dtype': 'float32'}, 'model.dtype is float32'),
        ('cudnn', GEMMA, {'platform': 'gpu'}, 'no soft-cap'),
        ('cudnn', dataclasses.replace(LLAMA, head_dim=256), {'platform': 'gpu'}, 'up to 128 wide'),
        ('flash', LLAMA, {}, "Did you mean 'splash'"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(kernel, architecture, changes, message):
    with pytest.raises(InputError, match=message):
        attention_choice.choose(kernel, architecture, **ASKED | changes)
    if 'platform' not in changes and kernel == 'splash':
        assert attention_choice.choose('auto', architecture, **ASKED | changes).kernel == 'xla'


def test_what_a_kernel_can_do_is_given():
    def choose(kernel, architecture, **changes):
        return tuple(attention_choice.choose(kernel, architecture, **ASKED | changes))

    assert choose('auto', LLAMA) == ('splash', 'auto: on tpu')
    assert choose('auto', LLAMA, platform='gpu') == ('xla', 'auto: on gpu')
    assert choose('auto', NARROW, branches=1)[0] == 'splash'
    assert choose('auto', GEMMA, lengths=(T,))[0] == 'splash'
    assert 'sliding window' in choose('auto', NARROW)[1]
    assert choose('cudnn', LLAMA, platform='gpu') == ('cudnn', 'as asked')
    assert choose('xla', NARROW, lengths=(17,)) == ('xla', 'as asked')


def test_a_run_says_its_kernel_and_refuses_another_before_weights_are_read(tmp_path, capsys):
    experiment = tiny_runs.experiment(tmp_path)
    prepared = run.prepare(experiment)
    pairs_ = run.read_pairs(prepared)
    report.print_header(prepared, pairs_, run.Schedule(prepared.config.train, len(pairs_.train)))
    assert 'attention xla (auto: on cpu)' in ' '.join(capsys.readouterr().out.split())
    assert (prepared.decoder.attention, prepared.decoder.branches) == ('xla', 2)
    settings = dataclasses.replace(
        experiment.config, model=dataclasses.replace(experiment.config.model, attention='splash')
    )
    with pytest.raises(InputError, match='not on cpu'):
        run.prepare(dataclasses.replace(experiment, config=settings))


def test_a_decoder_refuses_rows_that_its_kernel_cannot_take():
    params = jax.eval_shape(lambda: loud_params(CONFIG))
    for decoder, length, message in (
        (Decoder(GEMMA, attention='splash'), 200, 'would have to be 256'),
        (Decoder(NARROW, attention='splash'), T, 'sliding window of 40'),
        (Decoder(GEMMA, attention='splish'), T, "Did you mean 'splash'"),
    ):
        with pytest.raises(InputError, match=message):
            jax.eval_shape(decoder.apply, {'params': params}, *np.zeros((4, 1, length), np.int32))
