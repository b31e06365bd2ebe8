"""What a run reads before it starts: pairs by split, the rows behind them, and what the splits share."""

import dataclasses

import pytest
import tiny_runs

from jaxpo import report, run
from jaxpo.config import Reference
from jaxpo.data.audit import OVERLAPS
from jaxpo.data.sources import Row
from jaxpo.errors import InputError


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('runs')
    tiny_runs.experiment(folder)
    tiny_runs.write_pairs(folder / 'validation.jsonl', 5, seed=2)
    lines = [(folder / f'{split}.jsonl').read_text().splitlines() for split in ('train', 'evaluation', 'validation')]
    (folder / 'leaking.jsonl').write_text('\n'.join([lines[0][3], lines[1][0], lines[1][4], lines[2][0]]))
    return folder


def prepared(folder, references=None, **data):
    """A run whose settings are changed behind its checks: what reads validation pairs or tables is not made."""
    run_ = run.prepare(tiny_runs.experiment(folder))
    data = {name: str(folder / value) for name, value in data.items()}
    settings = dataclasses.replace(run_.config, data=dataclasses.replace(run_.config.data, **data))
    if references:
        settings = dataclasses.replace(settings, references=references)
    return dataclasses.replace(run_, experiment=dataclasses.replace(run_.experiment, config=settings))


def header(prepared_, pairs, capsys):
    report.print_header(prepared_, pairs, run.Schedule(prepared_.config.train, len(pairs.train)))
    return ' '.join(capsys.readouterr().out.split())


def shared(pairs, split):
    noted = pairs.reports[split]['noted']
    return {note: noted[note]['count'] for note in OVERLAPS if noted[note]['count']}


def test_validation_pairs_are_read_and_audited(folder, capsys):
    prepared_ = prepared(folder, validation='validation.jsonl')
    pairs = run.read_pairs(prepared_)
    assert (len(pairs.train), len(pairs.validation), len(pairs.evaluation)) == (24, 5, 6)
    assert list(pairs.reports) == ['train', 'validation', 'evaluation']
    texts = [prepared_.tokenizer.decode(pair.chosen, skip_special_tokens=True) for pair in pairs.validation]
    rows = run.sources.read_rows(str(folder / 'validation.jsonl'))
    assert texts == [row.fields['chosen'] for row in rows]
    assert not any(shared(pairs, split) for split in pairs.reports)
    text = header(prepared_, pairs, capsys)
    assert '24 pairs to train on, 5 to weigh references by, 6 held out, 0 rows dropped' in text
    assert 'overlap' not in text


def test_without_validation_there_is_none(folder, capsys):
    prepared_ = prepared(folder)
    pairs = run.read_pairs(prepared_)
    assert pairs.validation == [] and list(pairs.reports) == ['train', 'evaluation']
    assert '24 pairs to train on, 6 held out' in header(prepared_, pairs, capsys)


def test_pairs_that_choose_weights_and_are_evaluated_are_named(folder, capsys):
    prepared_ = prepared(folder, validation='leaking.jsonl')
    pairs = run.read_pairs(prepared_)
    assert shared(pairs, 'validation') == {'prompt also in training': 1, 'pair also in training': 1}
    assert shared(pairs, 'evaluation') == {'prompt also in validation': 2, 'pair also in validation': 2}
    named = pairs.reports['evaluation']['noted']['pair also in validation']['rows']
    assert named == [f'{folder}/evaluation.jsonl:{line}' for line in (1, 5)]
    text = header(prepared_, pairs, capsys)
    assert 'overlap validation: prompt also in training (1), pair also in training (1)' in text
    assert 'overlap evaluation: prompt also in validation (2), pair also in validation (2)' in text


def test_a_missing_validation_file_is_an_error(folder):
    with pytest.raises(InputError, match="validatoin.jsonl'.*Did you mean.*validation.jsonl"):
        run.read_pairs(prepared(folder, validation='validatoin.jsonl'))


def test_validation_pairs_need_positions_too(folder):
    (folder / 'long.jsonl').write_text('{"prompt": "word1", "chosen": "%s", "rejected": "word2"}' % ('word3 ' * 60))
    prepared_ = prepared(folder, validation='long.jsonl')
    architecture = dataclasses.replace(prepared_.pretrained.architecture, max_positions=32)
    short = dataclasses.replace(
        prepared_, pretrained=dataclasses.replace(prepared_.pretrained, architecture=architecture)
    )
    with pytest.raises(InputError, match='32 positions'):
        run.read_pairs(short)


def test_rows_are_kept_where_a_table_may_want_their_texts(folder):
    pairs = run.read_pairs(prepared(folder, validation='validation.jsonl'))
    assert pairs.rows == {}
    tables = {'initial': Reference(table=True)}
    pairs = run.read_pairs(prepared(folder, tables, validation='validation.jsonl'))
    assert {split: len(rows) for split, rows in pairs.rows.items()} == {'train': 24, 'validation': 5, 'evaluation': 6}
    for split, rows in pairs.rows.items():
        assert all(isinstance(row, Row) for row in rows)
        assert [pair.row for pair in getattr(pairs, split)] == list(range(len(rows)))
