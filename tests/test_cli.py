"""The command line as a user meets it: help, dry runs, the four commands, and bad input."""

import argparse
import json
import pathlib

import pytest
import safetensors.numpy
import tiny_checkpoints
import tiny_runs

from jaxpo import cli
from jaxpo.study import command

pytestmark = pytest.mark.usefixtures('compiled_quickly')

FAST = ['--mesh.data', '8', '--train.steps', '2']


@pytest.fixture
def module(tmp_path):
    return tiny_runs.write_module(tmp_path)


def error_of(arguments, capsys):
    """The one line that bad input ends with."""
    assert cli.main([str(a) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert 'Traceback' not in captured.err
    return captured.err


def test_help_names_every_command_and_exit_code(capsys):
    assert cli.main(['--help']) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in (*cli.COMMANDS, *cli.TOOLS, '--dry-run', 'exit codes'))


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_each_command_has_help(command, module, capsys):
    assert cli.main([command, '--help']) == 0
    assert 'EXPERIMENT' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, str(module), '--help'])
    assert stopped.value.code == 0
    assert '--objective.dpo.beta' in capsys.readouterr().out


@pytest.mark.parametrize('command', cli.COMMANDS)
def test_dry_run_touches_nothing(command, module, capsys):
    before = sorted(module.parent.rglob('*'))
    assert cli.main([command, str(module), '--dry-run', *FAST, '--references.initial.table', 'True']) == 0
    assert [path for path in sorted(module.parent.rglob('*')) if '__pycache__' not in str(path)] == before
    assert capsys.readouterr().out


def test_dry_run_says_what_the_run_then_does(module, capsys):
    assert cli.main(['train', str(module), '--dry-run', *FAST]) == 0
    text = capsys.readouterr().out
    planned = int(text.split(' of 6 pairs, ')[1].split(' tokens')[0].replace(',', ''))
    assert cli.main(['train', str(module), *FAST]) == 0
    lines = [json.loads(line) for line in (module.parent / 'run' / 'metrics.jsonl').read_text().splitlines()]
    assert [line['num_tokens'] for line in lines if 'num_tokens' in line][-1] == planned


def test_train_evaluate_sample_export(module, capsys):
    folder = module.parent
    assert cli.main(['train', str(module), *FAST, '--evaluate.sample-prompts', '2']) == 0
    assert cli.main(['evaluate', str(module), *FAST, '--evaluate.sample-prompts', '2']) == 0
    trained = [json.loads(line) for line in (folder / 'run' / 'metrics.jsonl').read_text().splitlines()][-1]
    evaluated = json.loads((folder / 'run' / 'evaluation_000002.json').read_text())
    for name in ('eval/loss', 'eval/kl', 'eval/reward'):
        assert evaluated[name] == pytest.approx(trained[name], rel=1e-5)

    pairs = folder / 'pairs.jsonl'
    words = ['--sample.completions', '4', '--sample.pairs', str(pairs), '--sample.output', 'all.jsonl']
    assert cli.main(['sample', str(module), *FAST, *words]) == 0
    samples = [json.loads(line) for line in (folder / 'run' / 'all.jsonl').read_text().splitlines()]
    assert len(samples) == 4 * 6
    for row in map(json.loads, pairs.read_text().splitlines()):
        assert (
            row['chosen_reward'] == len(row['chosen'].split()) > row['rejected_reward'] == len(row['rejected'].split())
        )

    assert cli.main(['export', str(module), *FAST]) == 0
    exported = tiny_checkpoints.raw_tensors(folder / 'run' / 'export')
    source = tiny_checkpoints.raw_tensors(folder / 'model')
    assert {name: entry[1:] for name, entry in exported.items()} == {name: entry[1:] for name, entry in source.items()}
    moved = [name for name in source if exported[name][0] != source[name][0]]
    assert len(moved) == len(source)

    again = ['--model.source', str(folder / 'run' / 'export'), '--output', str(folder / 'other')]
    assert cli.main(['evaluate', str(module), *FAST, *again]) == 0
    reloaded = json.loads((folder / 'other' / 'evaluation_000000.json').read_text())
    assert reloaded['eval/logps/chosen'] == pytest.approx(evaluated['eval/logps/chosen'], rel=1e-5)


def test_the_initial_policy_can_be_sampled_after_training(module, capsys):
    words = ['sample', str(module), *FAST, '--sample.temperature', '0']
    assert cli.main([*words, '--sample.output', 'before.jsonl']) == 0
    assert cli.main(['train', str(module), *FAST, '--output', str(module.parent / 'run2')]) == 0
    words += ['--output', str(module.parent / 'run2')]
    assert cli.main([*words, '--sample.output', 'initial.jsonl', '--sample.policy', 'initial']) == 0
    before = (module.parent / 'run' / 'before.jsonl').read_text()
    assert (module.parent / 'run2' / 'initial.jsonl').read_text() == before


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['trian', 'x.py'], "Did you mean 'train'"),
        (['train', 'experiment.pyy'], 'Unknown Python file'),
        (['train', 'experiment.py', '--model.source', 'modle'], 'No model at'),
        (['train', 'experiment.py', '--objective.dpo.beta', 'nan'], 'objective.dpo.beta is a finite number'),
        (['train', 'experiment.py', '--data.train', 'trian.jsonl'], 'train.jsonl'),
        (['train', 'experiment.py', '--data.revision', 'main'], 'data.revision is only for hub data sets'),
        (['train', 'experiment.py', '--model.revision', 'main'], 'revision is only for hub ids'),
        (['train', 'experiment.py', '--mesh.fsdp', '3'], '8 devices'),
        (['train', 'experiment.py', '--rows.microbatch', '7'], 'multiple of the 8 devices'),
        (['train', 'experiment.py', '--train.steps', '0'], 'train.steps must be positive'),
        (['train', 'experiment.py', '--train.batch-pairs', '0'], 'train.batch_pairs must be positive'),
        (['train', 'experiment.py', '--data.columns', 'margn', 'margin'], "renames 'margn', which no loss"),
        (['train', 'experiment.py', '--references.initial.source', 'nowhere'], 'No model at'),
        (['train', 'experiment.py', '--sample.temperature', '-1', '--evaluate.sample-prompts', '2'], 'temperature'),
        (['sample', 'experiment.py', '--sample.prompts', 'prompts.txt'], 'prompts.txt'),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(arguments, message, module, capsys, monkeypatch):
    monkeypatch.chdir(module.parent)
    assert message in error_of(arguments, capsys)
    assert not (module.parent / 'run' / 'metrics.jsonl').exists()


@pytest.mark.parametrize(
    'words, hint',
    [
        (['--optimizer.learningrate', '1'], '--optimizer.learning-rate'),
        (['--objective.dpo.bet', '1'], '--objective.dpo.beta'),
        (['--rows.layout', 'pakced'], 'packed'),
        (['--train.steps', 'many'], '--train.steps'),
    ],
)
def test_a_wrong_option_names_the_nearest_and_exits_with_2(words, hint, module, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(['train', str(module), *words])
    assert stopped.value.code == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    'text, message',
    [
        ('x = 1', 'defines no get_config'),
        ('import vaderSentimental', "No module named 'vaderSentimental'"),
        ('def get_config(:', 'cannot be imported'),
        ('def get_config(): return {}', 'not a jaxpo.config.Config'),
        (
            'import jaxpo.config as c\ndef get_config(): return c.Config(output="o", objective={"dpoo": {}})',
            "Did you mean 'dpo'",
        ),
    ],
)
def test_a_module_that_is_no_experiment_says_why(text, message, tmp_path, capsys):
    (tmp_path / 'experiment.py').write_text(text)
    assert message in error_of(['train', tmp_path / 'experiment.py'], capsys)


def break_config(folder):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | {'hidden_size': 25}))


def break_shard(folder):
    tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
    (folder / 'model.safetensors').unlink()
    tiny_checkpoints.write_index(folder, dict.fromkeys(tensors, 'model-00001-of-00001.safetensors'))


@pytest.mark.parametrize('damage, message', [(break_config, 'misshaped'), (break_shard, 'model-00001-of-00001')])
def test_a_damaged_model_is_refused_by_name(damage, message, module, capsys):
    damage(module.parent / 'model')
    assert message in error_of(['train', module], capsys)


def test_a_dataset_without_the_columns_and_one_of_messages_without_a_template(module, capsys):
    path = module.parent / 'train.jsonl'
    path.write_text(json.dumps({'question': 'a', 'chosen': 'b', 'rejected': 'c'}) + '\n')
    assert 'prompt' in error_of(['train', module], capsys)
    row = {'prompt': [{'role': 'user', 'content': 'word1'}], 'chosen': 'word2', 'rejected': 'word3'}
    path.write_text(json.dumps(row) + '\n')
    assert 'chat template' in error_of(['train', module], capsys)


def test_pairs_need_a_reward(tmp_path, capsys):
    path = tiny_runs.write_module(tmp_path)
    path.write_text(path.read_text().replace('def reward', 'def other'))
    assert 'defines no reward' in error_of(['sample', path, '--sample.pairs', tmp_path / 'pairs.jsonl'], capsys)


def test_a_loss_of_the_experiments_own_works_like_a_built_in(module, registry_as_it_was):
    readme = (pathlib.Path(__file__).parents[1] / 'README.md').read_text()
    own = next(block.split('```')[0] for block in readme.split('```python\n') if '@loss(' in block)
    module.write_text(own + module.read_text() + OWN_OBJECTIVE)
    assert cli.main(['train', str(module), *FAST, '--objective.squared-hinge.beta', '0.5']) == 0
    first = json.loads((module.parent / 'run' / 'metrics.jsonl').read_text().splitlines()[1])
    assert first['loss'] == 1.0
    assert json.loads((module.parent / 'run' / 'config.json').read_text())['objective']['squared_hinge']['beta'] == 0.5


OWN_OBJECTIVE = """
import dataclasses
built_in = get_config
def get_config():
    return dataclasses.replace(built_in(), objective={'squared_hinge': {}})
"""


EXPERIMENTS = pathlib.Path(__file__).parents[1] / 'experiments'
MODULES = [*sorted(EXPERIMENTS.glob('*.py')), EXPERIMENTS / 'exact/exact.py']


@pytest.mark.parametrize('path', MODULES, ids=lambda path: path.stem)
def test_shipped_experiments_load(path):
    pytest.importorskip('vaderSentiment')
    text = path.read_text(encoding='utf-8')
    if 'def get_config' in text:
        assert cli.load(str(path), [], 'train').config.output.startswith('runs/')
    if 'def get_study' in text:
        known = argparse.Namespace(seeds='0,1', cells_per_program=None, lanes=None)
        plan = command.load(str(path), [], known)
        assert str(plan.root).startswith('runs/') and {cell.seed for cell in plan.cells} == {0, 1, 2, 3}
