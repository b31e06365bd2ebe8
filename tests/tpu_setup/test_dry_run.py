"""What the scripts would do, word for word. Whether the real tools know the words is `check_flags.py`'s to say."""

import os
import re
import shutil
import subprocess
import sysconfig

import pytest
from golden.tpu_setup.cases import CASES, HERE, SCRIPTS, commands, dry_run

EVERY_SCRIPT = sorted(SCRIPTS.glob('*.sh'))


@pytest.mark.parametrize('script', CASES)
def test_a_dry_run_prints_what_the_golden_file_holds(script):
    assert dry_run(script) == (HERE / f'{script}.txt').read_text()


def test_every_script_that_a_person_calls_has_a_golden_file():
    called = {path.stem for path in EVERY_SCRIPT if os.access(path, os.X_OK)}
    assert called - {'worker'} == set(CASES)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which('shellcheck', path=sysconfig.get_path('scripts'))
    assert shellcheck, "shellcheck is missing: pip install 'jaxpo[test]'"
    done = subprocess.run([shellcheck, '-x', *map(str, EVERY_SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_script_kills_by_name_evaluates_text_or_edits_start_up_files():
    text = ''.join(path.read_text() for path in EVERY_SCRIPT)
    for word in ('pkill', 'killall', 'eval ', '.bashrc', '.profile', '.bash_profile'):
        assert word not in text


def test_every_flag_has_its_line_in_the_table_of_flags():
    table = (SCRIPTS / 'flags.md').read_text()
    flags = {word.split('=')[0] for words in commands() for word in words if word.startswith('--')}
    assert not [flag for flag in sorted(flags) if f'`{flag}' not in table]


def test_every_file_is_in_the_page():
    page = (SCRIPTS / 'README.md').read_text()
    named = {path.name for path in SCRIPTS.iterdir() if path.is_file()} - {'README.md', 'config.env'}
    assert not [name for name in sorted(named) if f'`{name}`' not in page]


def test_one_version_of_uv_is_named():
    named = re.findall(r'0\.[0-9]+\.[0-9]+', (SCRIPTS / 'skypilot.yaml').read_text())
    assert {f'UV_VERSION={version}' for version in named} <= {*(SCRIPTS / 'config.env.example').read_text().split()}
    assert named


def test_the_scripts_name_no_path_of_a_machine():
    for path in [*EVERY_SCRIPT, *HERE.glob('*.txt'), *SCRIPTS.glob('*.md')]:
        assert '/root' not in path.read_text() and '/tmp' not in path.read_text(), path
