"""`jaxpo references`, and what other commands make of tables, as a user meets them."""

import json
import re

import pytest
import tiny_runs
from tiny_tables import make_folder

from jaxpo import cli, train

FAST = ['--mesh.data', '8', '--train.steps', '2', '--train.checkpoint-every', '2']


@pytest.fixture(scope='module')
def module(tmp_path_factory):
    """The tiny experiment as a module, another model to be its reference, and tables of that which are full."""
    folder = make_folder(tmp_path_factory.mktemp('command'))
    path = tiny_runs.write_module(folder)
    assert cli.main(['references', *arguments(path, folder / 'tables')]) == 0
    return path


def arguments(module, tables, table='True'):
    other = ['--references.initial.source', str(module.parent / 'other'), '--references.initial.table', table]
    return [str(module), *FAST, *other, '--tables', str(tables)]


def numbers(text):
    """Of what was printed: completions, those computed, and the directory."""
    ((completions, computed),) = re.findall(r'initial\W+(\d+)\W+(\d+)\W+\d+\.\d', text)
    (directory,) = re.findall(r'^initial: (.+)$', text, re.MULTILINE)
    return int(completions), int(computed), directory


def test_it_says_what_it_computed_and_computes_it_once(module, tmp_path, capsys):
    tables = tmp_path / 'tables'
    assert cli.main(['references', *arguments(module, tables), '--dry-run']) == 0
    text = capsys.readouterr().out
    assert 'to compute' in text and not tables.exists()
    completions, missing, directory = numbers(text)
    assert 50 < missing <= completions == 60

    assert cli.main(['references', *arguments(module, tables)]) == 0
    text = capsys.readouterr().out
    assert 'computed' in text and numbers(text) == (completions, missing, directory)
    assert [str(path) for path in tables.iterdir()] == [directory]
    assert not (module.parent / 'run').exists()

    for word in ([], ['--dry-run']):
        assert cli.main(['references', *arguments(module, tables), *word]) == 0
        assert numbers(capsys.readouterr().out) == (completions, 0, directory)


def test_it_is_refused_where_no_reference_has_a_table(module, tmp_path, capsys):
    for word in ([], ['--dry-run']):
        assert cli.main(['references', *arguments(module, tmp_path / 'tables', 'False'), *word]) == 2
        assert 'no reference is read from a table (initial)' in capsys.readouterr().err
    assert not (tmp_path / 'tables').exists()


def test_an_evaluation_is_the_same_from_a_table_and_from_the_model(module):
    found = []
    for table in ('True', 'False'):
        output = module.parent / f'evaluated_{table}'
        words = [*arguments(module, module.parent / 'tables', table), '--output', str(output)]
        assert cli.main(['evaluate', *words]) == 0
        found.append(json.loads((output / 'evaluation_000000.json').read_text()))
    assert found[0] == {name: pytest.approx(value, abs=1e-4) for name, value in found[1].items()}
    assert abs(found[0]['eval/rewards/margins']) > 0.01  # the reference is not the policy


def test_a_damaged_table_stops_a_run_before_training(module, tmp_path, capsys, monkeypatch):
    tables = tmp_path / 'tables'
    assert cli.main(['references', *arguments(module, tables)]) == 0
    (data,) = tables.glob('*/shard-*/data-*.arrow')
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    monkeypatch.setattr(train, 'load_state', lambda run: pytest.fail('weights were loaded'))
    output = tmp_path / 'run'
    assert cli.main(['train', *arguments(module, tables), '--output', str(output)]) == 2
    error = capsys.readouterr().err
    assert f'{data.parent} is damaged' in error and 'Delete this directory' in error
    assert not (output / 'metrics.jsonl').exists() and not list((output / 'checkpoints').glob('*'))
