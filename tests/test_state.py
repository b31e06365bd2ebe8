"""Optimizers equal their papers, whole and split, take the memory they promise, and train, stop and go on."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_decoders
import tiny_meshes
import tiny_runs
from test_train import logged, saved_state

from jaxpo import settings, sharding, state, train
from jaxpo.config import Config, Data, Lora, Mesh, Model, Optimizer, Train
from jaxpo.errors import InputError
from jaxpo.models import lora
from jaxpo.models.architecture import from_hugging_face
from jaxpo.models.decoder import abstract_params

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CONFIG = tiny_decoders.CONFIGS['qwen2'] | {'num_hidden_layers': 2, 'num_key_value_heads': 4, 'vocab_size': 64}
ADAPTER = lora.of(Lora(rank=2, targets=('query', 'down')))
RATE = 0.01
KINDS = {
    'adamw': Optimizer(weight_decay=0.1),
    'bfloat16': Optimizer(moment_dtype='bfloat16', weight_decay=0.1, clip_norm=None),
    'adafactor': Optimizer(kind='adafactor', weight_decay=0.1),
}


def named(tree):
    """Leaves by path, on the host."""
    return {path: np.asarray(leaf) for path, leaf in items(tree)}


def items(tree):
    """Leaves and their paths."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator='/'), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def trained_of(config=CONFIG, with_adapter=False):
    """What a state trains: a policy, or its adapter, and parts of a method of all ranks."""
    policy = jax.tree.map(jnp.asarray, tiny_decoders.loud_params(config))
    if with_adapter:
        policy = lora.init_adapter(from_hugging_face(config), ADAPTER, jax.random.key(3))
    method = {'loss': {'scale': jnp.float32(1.5), 'bias': jnp.arange(5.0), 'head': jnp.ones((24, 1))}}
    return {'policy': policy, 'method': method}


def gradients_of(trained, steps=3):
    """Gradients whose size differs by leaf, layer, row and step, some of them exactly 0."""
    random = np.random.default_rng(5)

    def draw(name, leaf):
        values = random.normal(0, 10 ** random.uniform(-4, 1), leaf.shape)
        if 'layers' in name:
            values *= 10.0 ** np.arange(-len(values), 0).reshape(-1, *[1] * (values.ndim - 1))
        if name.endswith('embedding'):
            values *= 10 ** random.uniform(-2, 1, (len(values), 1))
            values[-3:] = 0
        return values.astype(np.float32)

    tree = jax.tree.structure(trained)
    return [jax.tree.unflatten(tree, [draw(*item) for item in named(trained).items()]) for _ in range(steps)]


def shapes_of(options, with_adapter=False, config=CONFIG):
    """A whole state, as shapes."""
    architecture = from_hugging_face(config)
    params = lora.abstract_adapter(architecture, ADAPTER) if with_adapter else abstract_params(architecture)
    return jax.eval_shape(lambda params: state.create(params, {}, state.make_optimizer(options)), params)


def make_update(optimizer):
    """`(trained, opt_state, gradient) -> updates, trained, opt_state`, as a step makes them."""

    def update(trained, opt_state, gradient):
        updates, opt_state = optimizer.update(gradient, opt_state, trained)
        return updates, jax.tree.map(lambda p, u: p - RATE * u, trained, updates), opt_state

    return update


def descend(optimizer, trained, gradients):
    """Updates by each of the gradients, the parameters following them."""
    update, opt_state, found = jax.jit(make_update(optimizer)), optimizer.init(trained), []
    for gradient in gradients:
        updates, trained, opt_state = update(trained, opt_state, gradient)
        found.append(named(updates))
    return found


def oracle(trained, gradients, options):
    """The updates in float64, layer by layer: Loshchilov and Hutter 2019, algorithm 2; Shazeer and Stern 2018,
    algorithms 4 (matrices) and 5 (vectors)."""
    found = [{} for _ in gradients]
    for part, decay in (('policy', options.weight_decay), ('method', options.method_weight_decay)):
        seen = []
        for gradient in gradients:
            leaves = {name: leaf.astype(np.float64) for name, leaf in named(gradient[part]).items()}
            norm = np.sqrt(sum((leaf**2).sum() for leaf in leaves.values()))
            seen.append({name: leaf * min(1, (options.clip_norm or np.inf) / norm) for name, leaf in leaves.items()})
        for name, leaf in named(trained[part]).items():
            value, updates = leaf.astype(np.float64), [np.zeros(leaf.shape) for _ in gradients]
            for piece in range(len(value)) if 'layers' in name else [...]:
                own = [leaves[name][piece] for leaves in seen]
                decayed = decay if part == 'method' or value[piece].ndim == 2 else 0
                for update, plain in zip(updates, adamw(own, options) if options.kind == 'adamw' else adafactor(own)):
                    update[piece] = plain + decayed * value[piece]
                    value[piece] -= RATE * update[piece]
            for step, update in zip(found, updates):
                step[f'{part}/{name}'] = update
    return found


def adamw(gradients, options):
    first, second = 0, 0
    for step, gradient in enumerate(gradients, 1):
        first = options.beta1 * first + (1 - options.beta1) * gradient
        second = options.beta2 * second + (1 - options.beta2) * gradient**2
        unbiased = first / (1 - options.beta1**step), second / (1 - options.beta2**step)
        yield unbiased[0] / (np.sqrt(unbiased[1]) + options.epsilon)
        if options.moment_dtype == 'bfloat16':
            first = first.astype(ml_dtypes.bfloat16).astype(np.float64)


def adafactor(gradients):
    rows, columns, second = 0, 0, 0
    for step, gradient in enumerate(gradients, 1):
        kept = 1 - step**-0.8
        square = gradient**2 + 1e-30
        if gradient.ndim == 2:
            rows = kept * rows + (1 - kept) * square.sum(axis=1)
            columns = kept * columns + (1 - kept) * square.sum(axis=0)
            second = np.outer(rows, columns) / rows.sum()
        else:
            second = kept * second + (1 - kept) * square
        update = gradient / np.sqrt(second)
        yield update / max(1, np.sqrt((update**2).mean()))


@pytest.mark.parametrize('kind', KINDS)
def test_updates_equal_the_paper(kind):
    trained = trained_of()
    gradients = gradients_of(trained)
    updates = descend(state.make_optimizer(KINDS[kind]), trained, gradients)
    far, compared = 0, 0
    for ours, theirs in zip(updates, oracle(trained, gradients, KINDS[kind]), strict=True):
        assert ours.keys() == theirs.keys()
        for name, update in ours.items():
            near = np.isclose(update, theirs[name], rtol=2e-5, atol=2e-6)
            np.testing.assert_allclose(update[~near], theirs[name][~near], atol=2**-7, err_msg=name)
            far, compared = far + (~near).sum(), compared + near.size
    # A moment half-way between two numbers of bfloat16 may go to either.
    assert far <= (compared / 1000 if kind == 'bfloat16' else 0)


@pytest.mark.parametrize('kind, with_adapter', [('bfloat16', False), ('adafactor', False), ('adafactor', True)])
def test_split_updates_equal_whole_ones(kind, with_adapter):
    trained, optimizer = trained_of(with_adapter=with_adapter), state.make_optimizer(KINDS[kind])
    gradients = gradients_of(trained)
    whole = descend(optimizer, trained, gradients)
    mesh = tiny_meshes.mesh(data=2, fsdp=2, tensor=2)
    made = state.create(trained['policy'], {}, optimizer, method_params=trained['method'])
    placed = sharding.parameter_shardings(made, mesh)
    current = jax.device_put(made, placed)
    gradients = [jax.device_put(gradient, placed.trained) for gradient in gradients]
    update = jax.jit(make_update(optimizer), out_shardings=(placed.trained, placed.trained, placed.opt_state))
    update = update.lower(current.trained, current.opt_state, gradients[0]).compile()
    # Rows, columns and norms meet; no matrix does.
    gathered = re.findall(r'= \w+\[([\d,]*)\][^=]* (?:all-gather|all-to-all|collective-permute)', update.as_text())
    largest = max((int(np.prod([int(size) for size in shape.split(',')])) for shape in gathered), default=0)
    assert largest <= 64 + (3 * 40 if kind == 'adafactor' else 0)
    here, opt_state = current.trained, current.opt_state
    for gradient, theirs in zip(gradients, whole):
        ours, here, opt_state = update(here, opt_state, gradient)
        for name, leaf in named(ours).items():
            np.testing.assert_allclose(leaf, theirs[name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize('sizes', [{'fsdp': 8}, {'tensor': 4, 'replica': 2}, {'data': 2, 'fsdp': 2, 'tensor': 2}])
@pytest.mark.parametrize('with_adapter', [False, True])
def test_every_mesh_holds_the_moments(sizes, with_adapter):
    """Adam's as their parameters; Adafactor's rows, columns and vectors whole."""
    mesh = tiny_meshes.mesh(**sizes)
    for kind, options in KINDS.items():
        shapes = shapes_of(options, with_adapter)
        placed = sharding.parameter_shardings(shapes, mesh)
        for name, one in items(placed.opt_state):
            parameter = next((p for path, p in items(placed.trained) if name.endswith(path)), None)
            whole = kind == 'adafactor' or parameter is None
            assert one.spec == (jax.P() if whole else parameter.spec), name


@pytest.mark.parametrize('kind, expected', [('adamw', 12), ('bfloat16', 10), ('adafactor', 4)])
def test_bytes_of_a_parameter(kind, expected):
    """Of the master weight and its moments; Adafactor adds less than one in a hundred."""
    wide = CONFIG | {'hidden_size': 896, 'intermediate_size': 4864, 'vocab_size': 50_000, 'head_dim': 224}
    shapes = shapes_of(KINDS[kind], config=wide)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((shapes.params, shapes.opt_state)))
    assert expected <= held / size < expected + 0.04


def test_moments_have_the_dtype_asked_for():
    names = dict(items(shapes_of(KINDS['bfloat16']).opt_state))
    first = {leaf.dtype.name for name, leaf in names.items() if '/mu/' in name}
    second = {leaf.dtype.name for name, leaf in names.items() if '/nu/' in name}
    assert (first, second) == ({'bfloat16'}, {'float32'})


def test_a_run_with_factored_moments_learns_and_resumes_bit_for_bit(tmp_path):
    options = dataclasses.replace(KINDS['adafactor'], learning_rate=1e-2)
    steps = Train(batch_pairs=6, steps=4, checkpoint_every=2)
    tiny_runs.experiment(tmp_path)
    data = Data(train=str(tmp_path / 'train.jsonl'))
    made = tiny_runs.experiment(tmp_path, optimizer=options, data=data, train=steps, mesh=Mesh(data=2, fsdp=4))
    train.train(made)
    (last, first), lines = saved_state(made), logged(made)
    assert last == 4 and lines[-1]['loss'] < lines[0]['loss']
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '4')
    train.train(made)
    last, again = saved_state(made)
    assert last == 4 and logged(made) == lines
    jax.tree.map(np.testing.assert_array_equal, again, first)


@pytest.mark.parametrize(
    'changes, message',
    [
        ({'kind': 'adafactor', 'beta1': 0.8}, 'optimizer.beta1 has no effect'),
        ({'kind': 'adafactor', 'beta2': 0.99}, 'optimizer.beta2 has no effect'),
        ({'kind': 'adafactor', 'epsilon': 1e-6}, 'optimizer.epsilon has no effect'),
        ({'kind': 'adafactor', 'moment_dtype': 'bfloat16'}, 'optimizer.moment_dtype has no effect'),
        ({'kind': 'adam'}, "Unknown optimizer.kind 'adam'. Did you mean 'adamw'"),
        ({'epsilon': 0.0}, 'optimizer.epsilon must be positive'),
        ({'beta2': 1.0}, 'optimizer.beta2 must be 0 or more and below 1'),
    ],
)
def test_settings_that_say_nothing_are_refused(changes, message):
    config = Config(output='run', model=Model(source='model'), optimizer=Optimizer(**changes))
    with pytest.raises(InputError, match=message):
        settings.check_settings(config)


def test_matrices_decay_and_vectors_do_not():
    decayed = state.matrices(tiny_decoders.loud_params(tiny_decoders.CONFIGS['qwen2']))
    assert decayed['embedding'] and decayed['layers']['mlp']['up'] and decayed['layers']['attention']['query']
    assert not decayed['final_norm'] and not decayed['layers']['mlp_norm']
    assert not decayed['layers']['attention']['query_bias']


@pytest.mark.parametrize('name, expected', [('constant', 1.0), ('linear', 0.55), ('cosine', 0.55)])
def test_schedules_warm_up_and_decay(name, expected):
    options = Optimizer(learning_rate=2.0, schedule=name, warmup_steps=4, final_learning_rate_ratio=0.1)
    rate = state.learning_rate_schedule(options, 14, options.learning_rate)
    np.testing.assert_allclose([rate(s) for s in range(4)], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    np.testing.assert_allclose([rate(4), rate(9)], [2.0, 2.0 * expected], rtol=1e-6)
    if name != 'constant':
        np.testing.assert_allclose(rate(14), 0.2, rtol=1e-5)
