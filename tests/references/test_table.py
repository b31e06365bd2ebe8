"""Tables on disk: what finds a row, what survives a crash, what is refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import datasets.utils
import numpy as np
import pyarrow
import pytest

from jaxpo.errors import InputError
from jaxpo.references import table_files
from jaxpo.references.table import open_table, sequence_key

IDENTITY = {'weights': {'digest': 'abc', 'architecture': {'layers': 2, 'windows': (None, 4)}}, 'dtype': 'float32'}


def sequences(count, seed=0, longest=20):
    """Token ids of prompts and completions, no two alike."""
    rng = np.random.default_rng(seed)
    return [
        (np.append(rng.integers(0, 50, rng.integers(0, longest)), 1000 + row), rng.integers(0, 50, length))
        for row, length in enumerate(rng.integers(1, longest, count))
    ]


def rows(count, seed=0, longest=20):
    """Keys and log-probabilities of `count` rows."""
    pairs = sequences(count, seed, longest)
    rng = np.random.default_rng(seed + 1)
    return [sequence_key(*pair) for pair in pairs], [
        -rng.exponential(2, len(completion)).astype(np.float32) for _, completion in pairs
    ]


def shards(table):
    return sorted(table.directory.glob('shard-*'))


def assert_rows(table, keys, values):
    for found, expected in zip(table.read(keys), values, strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == np.float32


@pytest.fixture
def table(tmp_path):
    return open_table(tmp_path, IDENTITY, 'logps')


@pytest.fixture
def filled(table):
    table.write(*rows(7))
    return table


def test_a_key_depends_on_every_token_and_on_where_the_prompt_ends():
    alike = [sequence_key(np.array([1, 2], dtype), np.array([3], dtype)) for dtype in (np.int32, np.int64)]
    assert alike[0] == alike[1]
    others = [
        ([1, 2], [4]),
        ([1, 4], [3]),
        ([2, 1], [3]),
        ([1], [2, 3]),
        ([1, 2, 3], []),
        ([], [1, 2, 3]),
        ([1, 2], []),
    ]
    keys = {alike[0], *(sequence_key(np.array(p, np.int32), np.array(c, np.int32)) for p, c in others)}
    assert len(keys) == 1 + len(others) and {len(key) for key in keys} == {16}


def test_a_key_is_the_same_in_every_version():
    # Another answer would leave all tables in the world unread.
    assert sequence_key(np.array([1, 2]), np.array([3])).hex() == '3a44776baa3f741853abf83904e2938e'


def test_a_key_of_what_are_no_token_ids_is_refused():
    with pytest.raises(TypeError):
        sequence_key(np.array([1.5]), np.array([3]))


def test_rows_are_found_again_whatever_their_order(filled, tmp_path):
    keys, values = rows(7)
    again = open_table(tmp_path, IDENTITY, 'logps')
    assert len(again) == 7 and again.missing(keys) == []
    order = [4, 0, 4, 6]
    assert_rows(again, [keys[row] for row in order], [values[row] for row in order])


def test_another_token_or_prompt_is_a_miss(filled):
    prompt, completion = sequences(7)[3]
    assert filled.missing([sequence_key(prompt, completion)]) == []
    for other in ((prompt, completion + 1), (prompt + 1, completion), (prompt[1:], completion)):
        assert filled.missing([sequence_key(*other)]) == [sequence_key(*other)]
        with pytest.raises(InputError, match=f'lacks 1 of 1 rows.*{sequence_key(*other).hex()}'):
            filled.read([sequence_key(*other)])


@pytest.mark.parametrize(
    'identity', [IDENTITY | {'dtype': 'bfloat16'}, IDENTITY | {'weights': {'digest': 'abd'}}, IDENTITY | {'seed': None}]
)
def test_another_identity_is_another_table(filled, tmp_path, identity):
    keys, _ = rows(7)
    assert open_table(tmp_path, identity, 'logps').missing(keys) == keys


def test_the_statistics_of_a_model_are_tables_of_their_own(filled, tmp_path):
    keys, values = rows(7)
    entropy = open_table(tmp_path, IDENTITY, 'entropy')
    assert entropy.missing(keys) == keys
    entropy.write(keys, [-value for value in values])
    assert_rows(entropy, keys, [-value for value in values])
    assert_rows(filled, keys, values)


def test_an_unknown_statistic_is_refused(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'logps'"):
        open_table(tmp_path, IDENTITY, 'logprobs')


def test_the_order_of_an_identitys_entries_and_the_place_of_the_tables_do_not_matter(filled, tmp_path):
    moved = tmp_path / 'elsewhere'
    shutil.copytree(filled.directory, moved / filled.directory.name)
    reordered = json.loads(json.dumps(dict(reversed(IDENTITY.items()))))
    assert_rows(open_table(moved, reordered, 'logps'), *rows(7))


def test_opening_and_asking_creates_nothing(tmp_path):
    table = open_table(tmp_path / 'tables', IDENTITY, 'logps')
    keys, _ = rows(3)
    assert table.missing(keys) == keys and not (tmp_path / 'tables').exists()
    table.write([], [])
    assert not (tmp_path / 'tables').exists()


def test_missing_names_each_row_once_in_order(filled):
    known, unknown = rows(7)[0], rows(2, seed=5)[0]
    assert filled.missing([unknown[1], known[0], unknown[0], unknown[1]]) == [unknown[1], unknown[0]]


def test_work_that_was_stopped_resumes_where_it_was(tmp_path):
    keys, values = rows(9)
    first, watching = (open_table(tmp_path, IDENTITY, 'logps') for _ in range(2))
    first.write(keys[:4], values[:4])
    assert open_table(tmp_path, IDENTITY, 'logps').missing(keys) == keys[4:]
    assert watching.missing(keys) == keys[4:]  # a table that was open sees what others add
    watching.write(keys, values)
    assert watching.missing(keys) == [] and len(shards(watching)) == 2
    assert_rows(open_table(tmp_path, IDENTITY, 'logps'), keys, values)
    assert sum(json.loads((shard / 'shard.json').read_text())['rows'] for shard in shards(first)) == 9


def test_rows_that_are_there_stay_as_they_are(filled):
    keys, values = rows(7)
    filled.write(keys, [value - 1 for value in values])
    assert len(shards(filled)) == 1
    assert_rows(filled, keys, values)


@pytest.mark.parametrize('lengths', [[1], [0, 1, 0], [1, 5000, 2], [3] * 2500])
def test_vectors_of_any_length(tmp_path, lengths):
    keys = [sequence_key(np.array([row]), np.arange(length)) for row, length in enumerate(lengths)]
    values = [-np.arange(length, dtype=np.float32) - row for row, length in enumerate(lengths)]
    open_table(tmp_path, IDENTITY, 'logps').write(keys, values)
    assert_rows(open_table(tmp_path, IDENTITY, 'logps'), keys, values)


def test_thousands_of_rows_are_read_from_the_files_and_not_held_in_memory(tmp_path):
    keys, values = rows(5000, longest=600)
    open_table(tmp_path, IDENTITY, 'logps').write(keys, values)
    size, held = sum(value.nbytes for value in values), pyarrow.total_allocated_bytes()
    again = open_table(tmp_path, IDENTITY, 'logps')
    found = again.read(keys)
    assert pyarrow.total_allocated_bytes() - held < size / 10
    assert not any(value.flags.writeable or value.flags.owndata for value in found)
    assert_rows(again, keys, values)


# What is refused.


@pytest.mark.parametrize(
    'statistic, vector, why',
    [
        ('logps', [-1, np.nan], 'not finite'),
        ('logps', [-np.inf], 'not finite'),
        ('logps', [-1e39], 'not finite'),
        ('entropy', [np.inf], 'not finite'),
        ('logps', [-1, 0.002], 'logps must be at most 0'),
        ('entropy', [1, -0.002], 'entropy must be at least 0'),
        ('logps', [[-1.0]], 'one a token'),
        ('logps', -1.0, 'one a token'),
    ],
)
@pytest.mark.filterwarnings('ignore:overflow')
def test_numbers_that_cannot_be_are_not_written(tmp_path, statistic, vector, why):
    table, keys = open_table(tmp_path / 'tables', IDENTITY, statistic), rows(2)[0]
    good = [0.0, 0.0]
    with pytest.raises(InputError, match=f'{keys[1].hex()} is not written.*{why}'):
        table.write(keys, [good, vector])
    assert not (tmp_path / 'tables').exists()


def test_rounding_past_zero_is_no_fault(table, tmp_path):
    keys, entropy = rows(1)[0], open_table(tmp_path, IDENTITY, 'entropy')
    table.write(keys, [[0.0009, -1]])
    entropy.write(keys, [[-0.0009, 1]])
    np.testing.assert_array_equal(table.read(keys)[0], np.float32([0.0009, -1]))


def test_two_answers_for_one_key_are_refused(table):
    key = rows(1)[0][0]
    with pytest.raises(InputError, match='two different values'):
        table.write([key, key], [[-1.0], [-1.001]])
    with pytest.raises(InputError, match='two different values'):
        table.write([key, key], [[-1.0], [-1.0, -2.0]])
    table.write([key, key], [[-1.0], [-1.00005]])
    assert_rows(table, [key], [np.float32([-1.0])])


def test_every_row_needs_its_numbers(table):
    keys, values = rows(3)
    with pytest.raises(ValueError, match='zip'):
        table.write(keys, values[:2])


def test_a_file_is_no_directory_of_tables(tmp_path):
    (tmp_path / 'tables').write_text('')
    with pytest.raises(InputError, match='tables: .* is a file'):
        open_table(tmp_path / 'tables', IDENTITY, 'logps')


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / 'tables').write_text('')
    with pytest.raises(InputError, match='cannot be written to'):
        open_table(tmp_path / 'tables' / 'deeper', IDENTITY, 'logps').write(*rows(1))


@pytest.mark.parametrize('file', ['data-00000-of-00001.arrow', 'dataset_info.json', 'state.json', 'shard.json'])
@pytest.mark.parametrize('harm', ['flip', 'cut', 'lose'])
def test_a_damaged_shard_is_named_and_nothing_is_computed_again_behind_ones_back(filled, tmp_path, file, harm):
    shard = shards(filled)[0]
    path = shard / file
    content = bytearray(path.read_bytes())
    if harm == 'lose':
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if harm == 'flip' else content[:-5])
    with pytest.raises(InputError, match=f'{shard} is damaged: .*Delete this directory'):
        open_table(tmp_path, IDENTITY, 'logps')
    shutil.rmtree(shard)
    assert open_table(tmp_path, IDENTITY, 'logps').missing(rows(7)[0]) == rows(7)[0]


def test_every_byte_of_the_numbers_is_watched(filled, tmp_path):
    path = shards(filled)[0] / 'data-00000-of-00001.arrow'
    content = path.read_bytes()
    for place in range(0, len(content), 97):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError, match='not as it was written'):
            open_table(tmp_path, IDENTITY, 'logps')


def test_a_shard_under_another_name_is_refused(filled, tmp_path):
    shards(filled)[0].rename(filled.directory / 'shard-other')
    with pytest.raises(InputError, match='shard-other is damaged: its name'):
        open_table(tmp_path, IDENTITY, 'logps')


def test_shards_that_say_different_things_of_a_row_are_refused(filled, tmp_path):
    # Only where tables were merged by hand: a writer skips rows that are there.
    keys, values = rows(7)
    table_files.write_shard(filled.directory, keys[2:4], [value + 5e-5 for value in values[2:4]])
    assert_rows(open_table(tmp_path, IDENTITY, 'logps'), keys[4:], values[4:])
    table_files.write_shard(filled.directory, keys[5:], [value - 2e-4 for value in values[5:]])
    names = [f'({path.name})' for path in (shards(filled)[0], filled.directory / table_files.shard_name(keys[5:]))]
    with pytest.raises(InputError, match=f'{keys[5].hex()} differs from that of {"|".join(names)}'):
        open_table(tmp_path, IDENTITY, 'logps')


@pytest.mark.parametrize('value', [np.nan, 0.5])
def test_numbers_of_another_writer_are_checked_as_they_are_read(filled, tmp_path, value):
    keys, _ = rows(2, seed=9)
    table_files.write_shard(filled.directory, keys, [np.float32([-1]), np.float32([-1, value])])
    again = open_table(tmp_path, IDENTITY, 'logps')
    assert_rows(again, keys[:1], [np.float32([-1])])
    with pytest.raises(InputError, match=f'{table_files.shard_name(keys)} is damaged'):
        again.read(keys)


def test_the_identity_is_readable_and_must_be_that_of_the_directory(filled, tmp_path):
    path = filled.directory / 'identity.json'
    described = json.loads(path.read_text())
    assert described == {'identity': json.loads(json.dumps(IDENTITY)), 'statistic': 'logps', 'format': 1}
    described['identity']['dtype'] = 'bfloat16'
    described['identity']['weights']['more'] = None
    path.write_text(json.dumps(described))
    with pytest.raises(
        InputError, match=r"identity.json.*identity.dtype \('bfloat16' there, 'float32' asked for\), ident"
    ):
        open_table(tmp_path, IDENTITY, 'logps')


@pytest.mark.parametrize('content', ['{', '[1]', None])
def test_an_unreadable_or_lost_identity_is_refused(filled, tmp_path, content):
    path = filled.directory / 'identity.json'
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(InputError, match=f'{path}.*Delete {filled.directory}'):
        open_table(tmp_path, IDENTITY, 'logps')


# Other processes.

SCRIPT = """
import os, pathlib, sys
import numpy as np
from jaxpo.references import table_files
from jaxpo.references.table import open_table, sequence_key

root, word, size = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
keys = [sequence_key(np.array([row]), np.arange(5)) for row in range(60)]
values = [np.full(5, -row, np.float32) for row in range(60)]
table = open_table(root, {'name': 'shared'}, 'logps')
if word == 'crash':
    os.rename = lambda *paths: os._exit(9)
if word == 'race':
    import datasets
    (root / f'ready-{size}').touch()
    while len(list(root.glob('ready-*'))) < 2:
        pass
for start in range(0, 60, size):
    table.write(keys[start:start + size], values[start:start + size])
table.read(keys)
"""
SHARED_KEYS = [sequence_key(np.array([row]), np.arange(5)) for row in range(60)]


def start(root, word, size, **environment):
    command = [sys.executable, '-c', SCRIPT, str(root), word, str(size)]
    return subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def open_shared(root):
    return open_table(root, {'name': 'shared'}, 'logps')


def assert_whole(root):
    table = open_shared(root)
    assert table.missing(SHARED_KEYS) == []
    assert_rows(table, SHARED_KEYS, [np.full(5, -row, np.float32) for row in range(60)])
    return table


def test_a_crash_before_a_shard_has_its_name_leaves_the_table_usable(tmp_path):
    crashed = start(tmp_path, 'crash', 60)
    assert crashed.communicate()[0] == '' and crashed.returncode == 9
    table = open_shared(tmp_path)
    left = list(table.directory.glob('.shard-*'))
    assert len(left) == 1 and table.missing(SHARED_KEYS) == SHARED_KEYS and shards(table) == []
    table.write(SHARED_KEYS[:10], [np.full(5, -row, np.float32) for row in range(10)])
    assert left[0].exists()  # it might be another writer's
    os.utime(left[0], (time.time() - 25 * 60 * 60,) * 2)
    table.write(SHARED_KEYS[10:], [np.full(5, -row, np.float32) for row in range(10, 60)])
    assert not left[0].exists()
    assert_whole(tmp_path)


def test_a_shard_that_cannot_be_finished_leaves_nothing(table, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device')

    with monkeypatch.context() as patched:
        patched.setattr(table_files.os, 'rename', full)
        with pytest.raises(OSError, match='No space left'):
            table.write(*rows(3))
    assert sorted(path.name for path in table.directory.iterdir()) == ['identity.json', 'lock']
    table.write(*rows(3))
    assert_rows(table, *rows(3))


def test_two_processes_that_write_the_same_rows_at_once_leave_each_row_once(tmp_path):
    writers = [start(tmp_path, 'race', size) for size in (3, 4)]
    for writer in writers:
        assert writer.communicate() == ('', None) and writer.returncode == 0
    table = assert_whole(tmp_path)
    assert sum(json.loads((shard / 'shard.json').read_text())['rows'] for shard in shards(table)) == 60
    assert not list(table.directory.glob('.*'))


def test_nothing_but_the_table_is_written_and_nothing_is_printed(tmp_path):
    home = tmp_path / 'home'
    home.mkdir()
    places = {name: str(home) for name in ('HOME', 'HF_HOME', 'XDG_CACHE_HOME', 'TMPDIR')}
    writer = start(tmp_path / 'tables', 'write', 25, HF_DATASETS_CACHE=str(home / 'datasets'), **places)
    assert writer.communicate()[0] == '' and writer.returncode == 0
    assert [path for path in home.rglob('*') if path.is_file()] == []
    files = [path for path in (tmp_path / 'tables').rglob('*') if path.is_file()]
    assert {path.suffix for path in files} == {'.arrow', '.json', ''}
    assert {path.name for path in files if not path.suffix} == {'lock'}
    assert not any(str(pathlib.Path.home()).encode() in path.read_bytes() for path in files)
    assert_whole(tmp_path / 'tables')


@pytest.mark.parametrize('shown', [True, False])
def test_the_callers_progress_bars_are_as_before(table, shown, capfd):
    switch = {True: datasets.utils.enable_progress_bars, False: datasets.utils.disable_progress_bars}
    before = not datasets.utils.are_progress_bars_disabled()
    try:
        switch[shown]()
        table.write(*rows(3))
        assert datasets.utils.are_progress_bars_disabled() != shown
    finally:
        switch[before]()
    assert capfd.readouterr() == ('', '')
