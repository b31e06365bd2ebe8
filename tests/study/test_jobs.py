"""Job arrays: word for word, checked by shellcheck, and run against stand-ins whose arguments are read back.

`python tests/study/test_jobs.py` writes the golden files anew. Whether the real tools know the words stands in
tpu_setup/flags.md.
"""

import pathlib
import re
import shlex
import shutil
import subprocess
import sysconfig

import pytest

from jaxpo.errors import InputError
from jaxpo.study import jobs

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = ROOT / 'tests/golden/study'
EXPERIMENT = 'experiments/study.py'
OUTPUT = 'gs://my-bucket/studies/First Study'
OVERRIDES = ('--output', OUTPUT, '--processes.platform', 'tpu')
AWKWARD = (
    '--note',
    """a b;$(touch here)"c'd`e`\\f*""",
    '',
    '~',
    '{a,b}',
    '$HOME',
    'YAML',
    '${SHARD}',
    '#',
    ': x',
    '{{ x }}',
)
WANTED = ['jaxpo', 'study', EXPERIMENT, *OVERRIDES, *AWKWARD]


def text(system, **changes):
    words = {'experiment': EXPERIMENT, 'overrides': OVERRIDES, 'shards': 3, 'output': OUTPUT}
    return jobs.script(system, **words | changes)


def executable(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    path.chmod(0o755)


def run(script, *words, path, cwd=ROOT, **environment):
    """What a script prints, run by bash with its standard input, as from a file."""
    environment = {'PATH': f'{path}:/usr/bin:/bin', **environment}
    return subprocess.run(
        ['bash', '-s', '--', *words], input=script, cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize('system', jobs.SYSTEMS)
def test_a_script_is_what_the_golden_file_holds(system):
    assert text(system) == (GOLDEN / f'{system}.sh').read_text()


@pytest.mark.parametrize('overrides', [OVERRIDES, (*OVERRIDES, *AWKWARD)])
def test_shellcheck_finds_nothing(overrides, tmp_path):
    shellcheck = shutil.which('shellcheck', path=sysconfig.get_path('scripts'))
    assert shellcheck, "shellcheck is missing: pip install 'jaxpo[test]'"
    for system in jobs.SYSTEMS:
        (tmp_path / f'{system}.sh').write_text(text(system, overrides=overrides))
    done = subprocess.run([shellcheck, *tmp_path.glob('*.sh')], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_every_flag_has_its_line_in_the_table_of_flags():
    table = (ROOT / 'tpu_setup/flags.md').read_text()
    launched = re.search(r'sky jobs launch (--.*?)"\$folder', text('skypilot'), re.S)[1]
    flags = re.findall(r'--[a-z-]+', launched)
    assert len(flags) == 6
    assert not [flag for flag in flags if f'`{flag}`' not in table]


def block(task, name):
    """The lines of a block `name: |`, without their indentation."""
    found = re.search(rf'^{name}: \|\n((?:  .*\n|\n)+)', task, re.M)[1]
    return ''.join(line[2:] + '\n' for line in found.splitlines())


def test_the_machines_are_set_up_as_for_one_run():
    task = (ROOT / 'tpu_setup/skypilot.yaml').read_text()
    ours = text('skypilot')
    assert block(ours, 'setup') == block(task, 'setup')
    recovery = task[task.index('  use_spot') : task.index('workdir')]
    assert recovery in ours


SKY = """#!/bin/bash
{ printf '%s\\0' "$@"; cat "${!#}"; printf '\\0'; } >>"$LAUNCHED"
"""
JAXPO = """#!/bin/bash
printf '%s\\0' jaxpo "$@" >"$HOME/arguments"
"""


def test_each_managed_job_runs_its_shard_word_for_word(tmp_path):
    executable(tmp_path / 'bin/sky', SKY)
    executable(tmp_path / 'jaxpo_environment/bin/jaxpo', JAXPO)
    script = text('skypilot', overrides=(*OVERRIDES, *AWKWARD))
    where = {'ACCELERATORS': 'tpu-v6e-8', 'INFRA': 'gcp/here/there', 'LAUNCHED': str(tmp_path / 'launched')}
    done = run(script, '--no-use-spot', path=tmp_path / 'bin', TMPDIR=str(tmp_path), **where)
    assert done.returncode == 0, done.stderr
    said = (tmp_path / 'launched').read_text().split('\0')[:-1]
    launches = [said[place : place + 15] for place in range(0, len(said), 15)]
    assert len(launches) == 3
    for number, (*words, file, task) in enumerate(launches, 1):
        name = words[words.index('--name') + 1]
        assert name.startswith('study-first-study-') and name.endswith(f'-{number}')
        assert words[words.index('--env') + 1] == f'SHARD={number}/3'
        assert (words[words.index('--gpus') + 1], words[words.index('--infra') + 1]) == ('tpu-v6e-8', 'gcp/here/there')
        assert words[:2] == ['jobs', 'launch'] and words[-1] == '--no-use-spot' and file.endswith('.yaml')
        # As on a machine.
        ran = run(block(task, 'run'), path=tmp_path, HOME=str(tmp_path), SHARD=f'{number}/3', cwd=tmp_path)
        assert ran.returncode == 0, ran.stderr
        arguments = (tmp_path / 'arguments').read_text().split('\0')[:-1]
        assert arguments == [*WANTED, '--shard', f'{number}/3']
    assert not list(tmp_path.glob('tmp*')) and not list(tmp_path.glob('**/here'))


@pytest.mark.parametrize('missing', ['ACCELERATORS', 'INFRA'])
def test_what_a_job_runs_on_is_asked_for(tmp_path, missing):
    where = {'ACCELERATORS': 'tpu-v6e-8', 'INFRA': 'gcp/here/there', 'LAUNCHED': str(tmp_path / 'launched')}
    executable(tmp_path / 'bin/sky', SKY)
    done = run(text('skypilot'), path=tmp_path / 'bin', **where | {missing: ''})
    assert done.returncode != 0 and f'{missing}: is not set' in done.stderr
    assert not (tmp_path / 'launched').exists()


@pytest.mark.parametrize('system', jobs.SYSTEMS)
def test_a_script_is_run_from_the_root_of_the_repository(tmp_path, system):
    executable(tmp_path / 'bin/sky', SKY)
    where = {'ACCELERATORS': 'x', 'INFRA': 'x', 'LAUNCHED': str(tmp_path / 'launched')}
    done = run(text(system), path=tmp_path / 'bin', cwd=tmp_path, **where)
    assert done.returncode == 2 and 'Run this from the root of the repository' in done.stderr
    assert not (tmp_path / 'launched').exists()


SETTINGS = """
PROJECT=my-project
ZONE=europe-west4-a
ACCELERATOR_TYPE=v6e-16
SLICES=1
MODE=spot
TRIES=20
STOP_SECONDS=120
CLUSTER=my-cluster
DOCKER_IMAGE=image
"""


def test_each_workload_runs_its_shard_word_for_word(tmp_path):
    (tmp_path / 'config.env').write_text(SETTINGS)
    script = text('xpk', overrides=(*OVERRIDES, *AWKWARD))
    done = run(script, '--config', str(tmp_path / 'config.env'), '--dry-run', path=tmp_path)
    assert done.returncode == 0, done.stderr
    created = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(created) == 3
    for number, words in enumerate(created, 1):
        assert words[:3] == ['xpk', 'workload', 'create']
        values = dict(word.split('=', 1) for word in words if word.startswith('--') and '=' in word)
        assert re.fullmatch(rf'study-first-study-[0-9a-f]{{5}}-{number}', values['--workload'])
        read = subprocess.run(
            ['bash', '-c', f'jaxpo() {{ printf \'%s\\0\' jaxpo "$@"; }}; {values["--command"]}'],
            capture_output=True,
            text=True,
            check=True,
        )
        assert read.stdout.split('\0')[:-1] == [*WANTED, '--shard', f'{number}/3']


def test_workloads_are_deleted_by_the_same_names(tmp_path):
    (tmp_path / 'config.env').write_text(SETTINGS)
    options = ('--config', str(tmp_path / 'config.env'), '--dry-run')
    created, deleted = (
        re.findall(r'--workload=(\S+)', run(text('xpk'), *options, *more, path=tmp_path).stdout)
        for more in ((), ('--delete',))
    )
    assert created == deleted and len(created) == 3


@pytest.mark.parametrize(
    'output',
    [
        'gs://bucket/' + 'x' * 60,
        'gs://bucket/1',
        'gs://bucket',
        'gs://bucket/-_-',
        'gs://bucket/Ä.b/',
        'gs://bucket/study',
        OUTPUT,
    ],
)
def test_jobs_have_names_that_xpk_and_skypilot_take(output):
    name = jobs._name(output)
    assert re.fullmatch(r'[a-z]([-a-z0-9]*[a-z0-9])?', name) and '--' not in name
    assert len(f'{name}-{jobs.MOST_SHARDS}') <= 28
    assert name == jobs._name(f'{output}/') != jobs._name(f'{output}2')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'output': 'runs/study'}, r'runs/study is a directory of this machine.*--output gs://BUCKET/DIRECTORY'),
        ({'output': 's3://bucket/study'}, 'gs://BUCKET/DIRECTORY'),
        ({'shards': 0}, '1 to 999 jobs, not 0'),
        ({'shards': 1000}, '1 to 999 jobs, not 1000'),
        ({'experiment': '/home/me/study.py'}, 'from the root of the repository'),
        ({'experiment': '../study.py'}, 'from the root of the repository'),
        ({'overrides': ('--note', 'two\nlines')}, 'no such characters'),
        ({'overrides': ('--note', 'a\x1b[2J')}, 'no such characters'),
    ],
)
@pytest.mark.parametrize('system', jobs.SYSTEMS)
def test_what_a_cluster_could_not_run_is_refused(system, changes, message):
    with pytest.raises(InputError, match=message):
        text(system, **changes)


def test_an_unknown_system_is_refused():
    with pytest.raises(InputError, match="Did you mean 'skypilot'"):
        text('skypliot')


if __name__ == '__main__':
    for name in jobs.SYSTEMS:
        (GOLDEN / f'{name}.sh').write_text(text(name))
