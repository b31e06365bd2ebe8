"""The rows of the three references and of the study's splits: who may be trained on, and who is measured on."""

import json
import pathlib

import numpy as np
import pytest

from jaxpo import cli
from jaxpo.errors import InputError
from jaxpo.experiment import import_module

FOLDER = pathlib.Path(__file__).parents[1] / 'experiments/references'
SHARED = pathlib.Path(__file__).parents[2] / 'shared/data/ci'
domains, pairs = (import_module(str(FOLDER / f'{name}.py')) for name in ('domains', 'pairs'))
SIZES = {'scarce': pairs.SCARCE, 'larger': pairs.LARGER, 'validation': pairs.VALIDATION}
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason='the folder of shared data is not beside the repository')


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


def prompts_of(path) -> set[str]:
    return {json.dumps(row['prompt']) for row in rows_of(path)}


@pytest.fixture(scope='module')
def written(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp('references')
    domains.write_data(root)
    return root


def test_the_command_line_takes_the_experiment():
    config = cli.load(str(FOLDER / 'domains.py'), ['--output', 'runs/other'], 'train').config
    assert config.output == 'runs/other' and set(config.objective) == {'sft'} and not config.references


@needs_shared
@pytest.mark.parametrize('domain', domains.PREFERENCES)
def test_no_prompt_is_both_trained_on_and_measured(written, domain):
    training, held_out = (prompts_of(path) for path in domains.files(written, domain))
    assert training and held_out and not training & held_out


@needs_shared
@pytest.mark.parametrize('domain, name', domains.PREFERENCES.items())
def test_a_reference_learns_the_chosen_completions_each_once(written, domain, name):
    rows = rows_of(domains.files(written, domain)[0])
    learned = {(json.dumps(row['prompt']), row['chosen']) for row in rows}
    source = rows_of(SHARED / f'{name}.train.jsonl')
    assert learned == {(json.dumps(row['prompt']), row['chosen']) for row in source}
    assert len(learned) == len(rows)


@needs_shared
def test_reviews_are_the_positive_sentences_in_two_parts(written):
    training, held_out = ({row['chosen'] for row in rows_of(p)} for p in domains.files(written, 'reviews'))
    source = rows_of(SHARED / 'sentence_polarity.jsonl')
    assert training | held_out == {row['text'] for row in source if row['label'] == 1}
    assert len(held_out) == domains.HELD_OUT and not training & held_out


@needs_shared
def test_no_reference_learns_a_question_of_the_study(written):
    study = prompts_of(SHARED / 'truthfulqa.train.jsonl') | prompts_of(SHARED / 'truthfulqa.eval.jsonl')
    assert not any(study & prompts_of(path) for domain in domains.DOMAINS for path in domains.files(written, domain))


MEASURED = {
    'start': {'dialogue': 2.0, 'arithmetic': 2.0, 'reviews': 2.0},
    'dialogue': {'dialogue': 1.0, 'arithmetic': 2.1, 'reviews': 2.2},
    'arithmetic': {'dialogue': 2.3, 'arithmetic': 1.5, 'reviews': 2.4},
    'reviews': {'dialogue': 2.5, 'arithmetic': 2.6, 'reviews': 1.7},
}


def test_references_are_apart_where_each_is_best_at_home():
    assert domains.is_apart(MEASURED)
    assert not domains.is_apart(MEASURED | {'reviews': MEASURED['dialogue'], 'dialogue': MEASURED['reviews']})
    assert not domains.is_apart(MEASURED | {'start': dict.fromkeys(domains.DOMAINS, 0.5)})


def test_the_table_marks_the_lowest_of_each_domain():
    lines = domains.table(MEASURED).splitlines()
    assert lines[2:4] == ['| start | 2.000 | 2.000 | 2.000 |', '| dialogue | **1.000** | 2.100 | 2.200 |']
    assert lines[-1] == '| reviews | 2.500 | 2.600 | **1.700** |'


@pytest.mark.parametrize('seed', pairs.SEEDS)
def test_parts_of_a_split_are_disjoint_but_for_the_scarce_in_the_larger(seed):
    parts = pairs.split(500, seed)
    assert {name: len(set(places.tolist())) for name, places in parts.items()} == SIZES
    assert set(parts['scarce']) < set(parts['larger']) and not set(parts['larger']) & set(parts['validation'])
    assert max(map(max, parts.values())) < 500


def test_a_split_follows_from_its_seed_alone():
    first = pairs.split(500, 0)
    assert all(np.array_equal(pairs.split(500, 0)[name], places) for name, places in first.items())
    assert not np.array_equal(np.sort(pairs.split(500, 1)['larger']), np.sort(first['larger']))
    assert first['scarce'][:5].tolist() == [429, 106, 498, 11, 205]


def test_too_few_pairs_are_refused():
    with pytest.raises(InputError, match='pairs are too few'):
        pairs.split(pairs.LARGER + pairs.VALIDATION - 1, 0)
    assert pairs.split(pairs.LARGER + pairs.VALIDATION, 0)


@needs_shared
def test_the_files_of_the_study_hold_their_pairs(tmp_path):
    found = pairs.write(tmp_path)
    assert sorted(found.values()) == sorted([150, *[*SIZES.values()] * len(pairs.SEEDS)])
    evaluated = prompts_of(pairs.evaluation_file(tmp_path))
    for seed in pairs.SEEDS:
        scarce, larger, validation = (
            prompts_of(pairs.file(tmp_path, seed, part)) for part in ('scarce', 'larger', 'validation')
        )
        assert scarce < larger and not validation & larger and not (larger | validation) & evaluated
        assert {'scarce': len(scarce), 'larger': len(larger), 'validation': len(validation)} == SIZES


def test_missing_sources_are_an_input_error(tmp_path):
    with pytest.raises(InputError, match='truthfulqa.train.jsonl'):
        pairs.write(tmp_path, tmp_path)
