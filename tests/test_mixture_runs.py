"""Mixing weights that validation pairs choose or judge, through the whole run: by hand, saved, resumed, refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoints
import tiny_runs
from test_train import logged, saved_state, stop_after

from jaxpo import evaluate, loading, run, sharding, state, step, train, weighing
from jaxpo.config import Data, Evaluate, Optimizer, Reference, Train
from jaxpo.data import sampler
from jaxpo.errors import InputError, Interrupted
from jaxpo.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures('compiled_quickly')

TWO = ('initial', 'other')
LENGTH = 32


def experiment(folder, mixture, validation=True, losses=None, **changes):
    """The tiny experiment with another model as its second reference, and validation pairs for its mixture."""
    folder.mkdir(exist_ok=True)
    other = folder / 'other'
    if not other.exists():
        tiny_checkpoints.write_directory(
            other, tiny_runs.CONFIG, tiny_checkpoints.hugging_face_tensors(tiny_runs.CONFIG, seed=5)
        )
        tiny_runs.write_pairs(folder / 'validation.jsonl', 11, seed=2)
    data = {name: str(folder / f'{name}.jsonl') for name in ('train', 'evaluation', *['validation'] * validation)}
    changes = {'train': Train(batch_pairs=6, steps=4, checkpoint_every=2), **changes}
    return tiny_runs.experiment(
        folder,
        references={'initial': Reference(), 'other': Reference(str(other))},
        objective={'mixture': mixture, **(losses or {'dpo': {}})},
        data=Data(**data),
        **changes,
    )


@functools.lru_cache
def log_softmax_of(architecture):
    decoder = Decoder(architecture)

    @jax.jit
    def logps(params, tokens):
        places = jnp.arange(LENGTH, dtype=jnp.int32)[None]
        ones = jnp.ones((1, LENGTH), jnp.int32)
        hidden = decoder.apply({'params': params}, tokens[None], places, ones, jnp.zeros_like(ones))
        return jax.nn.log_softmax(hidden[0] @ params['head'].T)

    return logps


def mean_logp(architecture, params, prompt, completion):
    """Of a completion's tokens, by plain logits of its sequence alone."""
    tokens = np.zeros(LENGTH, np.int32)
    tokens[: prompt.size + completion.size] = [*prompt, *completion]
    table = np.asarray(log_softmax_of(architecture)(params, tokens))
    first = prompt.size - 1
    return np.mean([table[first + place, token] for place, token in enumerate(completion)], dtype=np.float64)


def margins(run_, params, pairs):
    """Mean token log-probability of chosen less that of rejected, of each pair."""
    of = functools.partial(mean_logp, run_.pretrained.architecture, jax.device_get(params))
    return np.array([of(pair.prompt, pair.chosen) - of(pair.prompt, pair.rejected) for pair in pairs])


def by_numpy(run_, pairs, weights):
    start = loading.load_state(run_)
    apart = np.stack([margins(run_, start.reference_params[name], pairs) for name in TWO])
    assert np.abs(apart).min() > 1e-4
    shares = np.abs(apart).sum(axis=1) if weights == 'vdw' else (apart > 0).sum(axis=1)
    return shares / shares.sum()


@pytest.mark.parametrize('weights', ['vdw', 'vaw'])
def test_validation_pairs_choose_the_weights(tmp_path, weights):
    made = experiment(tmp_path, {'weights': weights})
    prepared = run.prepare(made)
    pairs = run.read_pairs(prepared).validation
    assert 6 < len(pairs) < 12
    expected = by_numpy(prepared, pairs, weights)
    assert np.abs(expected - 0.5).max() > 0.02
    weighed = weighing.weigh(prepared, loading.load_state(prepared), pairs)
    np.testing.assert_allclose(weighed.method_state['mixture']['weights'], expected, rtol=1e-5)


def test_weights_chosen_before_training_stay_through_it(tmp_path, monkeypatch):
    made = experiment(tmp_path, {'weights': 'vdw'})
    prepared = run.prepare(made)
    weighed = weighing.weigh(prepared, loading.load_state(prepared), run.read_pairs(prepared).validation)
    expected = np.asarray(weighed.method_state['mixture']['weights'])
    assert np.abs(expected - 0.5).max() > 0.02
    with monkeypatch.context() as patched:
        stop_after(1, patched)
        with pytest.raises(Interrupted):
            train.train(made)
    # A run that goes on neither weighs again nor needs to.
    monkeypatch.setattr(weighing, 'weigh', None)
    train.train(made)
    number, saved = saved_state(made)
    assert number == 4
    np.testing.assert_array_equal(saved.method_state['mixture']['weights'], expected)
    for line in logged(made):
        prefix = 'eval/' * ('loss' not in line)
        found = [line[f'{prefix}references/{name}/weight'] for name in TWO]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize('weights', ['vdw', 'vaw', 'tsw'])
def test_a_mixture_that_validation_pairs_choose_needs_some(tmp_path, weights):
    with pytest.raises(InputError, match=f'weights {weights} .*data.validation'):
        run.prepare(experiment(tmp_path, {'weights': weights}, validation=False))


def test_validation_pairs_that_choose_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match='data.validation is set'):
        run.prepare(experiment(tmp_path, {'weights': 'swcw'}))


TSW = {'weights': 'tsw', 'prior': 1.0}
SUBSETS = Evaluate(validation_pairs=4)


def test_a_step_is_rewarded_where_accuracy_rose_on_its_subset(tmp_path):
    """The loop's own parts, one by one; accuracies by plain logits."""
    made = experiment(tmp_path, TSW, evaluate=SUBSETS, optimizer=Optimizer(learning_rate=3e-3, schedule='constant'))
    prepared = run.prepare(made)
    pairs = run.read_pairs(prepared)
    judge = weighing.make_judge(prepared, pairs.validation)
    schedule = run.Schedule(made.config.train, len(pairs.train))
    train_step = jax.jit(step.make_train_step(prepared.models, prepared.objective, prepared.optimizer))
    rates = state.learning_rates(made.config.optimizer, 8)
    current, rewards, arms, subsets = loading.load_state(prepared), [], [], []
    for number in range(8):
        subset = sampler.subset(0, number, len(pairs.validation), 4)
        chosen = [pairs.validation[place] for place in subset]
        accuracies = [(margins(prepared, current.params, chosen) > 0).mean()]
        before = judge.accuracy(current, number)
        batch = run.make_batch(prepared, [pairs.train[i] for i in schedule.pairs_of(number % 4)])
        counts = current.method_state['mixture']
        current, metrics = train_step(current, batch, prepared.traced | rates(number))
        accuracies.append((margins(prepared, current.params, chosen) > 0).mean())
        np.testing.assert_allclose([before, judge.accuracy(current, number)], accuracies, rtol=1e-6)
        current = judge.credit(current, number, before)
        drawn = np.array([metrics[f'references/{name}/weight'] for name in TWO])
        reward = float(accuracies[1] > accuracies[0])
        after = current.method_state['mixture']
        np.testing.assert_allclose(after['successes'] - counts['successes'], reward * drawn, atol=1e-6)
        np.testing.assert_allclose(after['failures'] - counts['failures'], (1 - reward) * drawn, atol=1e-6)
        rewards.append(reward)
        arms.append(int(drawn.argmax()))
        subsets.append(tuple(subset))
    assert set(rewards) == {0, 1} and set(arms) == {0, 1} and len(set(subsets)) > 4


def test_resumed_rewards_equal_uninterrupted_ones_bit_for_bit(tmp_path, monkeypatch):
    whole, halved = (experiment(tmp_path / name, TSW, evaluate=SUBSETS) for name in ('whole', 'halved'))
    train.train(whole)
    with monkeypatch.context() as patched:
        stop_after(2, patched)
        with pytest.raises(Interrupted):
            train.train(halved)
    train.train(halved)
    ours, theirs = saved_state(halved), saved_state(whole)
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    assert logged(halved) == logged(whole)
    counts = ours[1].method_state['mixture']
    assert sum(counts['successes']) + sum(counts['failures']) == 4


@pytest.mark.parametrize('best', [0, 1])
def test_evaluation_takes_the_best_reference_and_draws_none(tmp_path, best):
    prepared = run.prepare(experiment(tmp_path, TSW, evaluate=SUBSETS))
    pairs = run.read_pairs(prepared)
    counts = {'successes': jnp.arange(2.0) if best else 1 - jnp.arange(2.0), 'failures': jnp.ones(2)}
    start = loading.load_state(prepared)
    counts = jax.device_put(counts, sharding.replicated(prepared.mesh))
    start = start.replace(method_state={'mixture': counts}, opt_state=())
    evaluator = evaluate.make_evaluator(prepared, pairs.evaluation)
    found = evaluate.evaluate(evaluator, start.replace(step=start.step + 5)).metrics
    assert [found[f'eval/references/{name}/weight'] for name in TWO] == pytest.approx([1 - best, best])
    # Against itself, which `initial` is, the policy has no margin.
    assert (found['eval/rewards/margins'] == 0) == (best == 0)
