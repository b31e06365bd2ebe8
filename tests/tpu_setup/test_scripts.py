"""The scripts that a person calls: settings are data, refusals say what to do, and words arrive as they were."""

import pathlib
import shutil
import subprocess

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / 'tpu_setup'
AWKWARD = """a b;$(touch here)"c'd`e`\\f*"""
COMMAND = ('run', '--', 'jaxpo', 'train')


def start(world, *codes):
    """Machines with the command running or ended on them."""
    world.codes(*codes)
    for script, words in (('create_queued.sh', ()), ('setup_workers.sh', ()), ('run_all.sh', COMMAND)):
        done = world.run(script, *words)
        assert done.returncode == 0, done.stderr


def wait_for(world, *states):
    """Asks until the workers are in these states, or fails after 100 times."""
    for _ in range(100):
        said = world.run('status.sh', 'run').stdout
        if all(f'host-{worker} {state}' in said for worker, state in enumerate(states)):
            return
    raise AssertionError(said)


@pytest.mark.parametrize('around', ['', '"', "'"])
def test_awkward_settings_are_one_word_and_never_run(world, around):
    quoted = f'{around}{AWKWARD}{around}'
    world.run('create_queued.sh', changes={'PROJECT': quoted, 'SERVICE_ACCOUNT': quoted})
    create = world.calls('create')[0]
    assert f'--project={AWKWARD}' in create
    assert f'--service-account={AWKWARD}' in create
    assert not list(world.directory.glob('**/here'))


def test_awkward_words_of_a_command_arrive_at_the_workers_as_they_were(world, repository, tmp_path):
    source = tmp_path / 'the "code"; $(touch here)'
    shutil.copytree(repository[0], source)
    assert world.run('create_queued.sh').returncode == 0
    done = world.run('setup_workers.sh', changes={'CODE': str(source)})
    assert done.returncode == 0, done.stderr
    words = ('jaxpo', 'train', AWKWARD, '', '--note', 'two words', '~', '{a,b}', '-n')
    assert world.run('run_all.sh', '--wait', 'run', '--', *words).returncode == 0
    assert (world.directory / 'arguments').read_text().split('\n')[:-1] == list(words[1:])
    assert not list(world.directory.glob('**/here'))


def test_the_environment_has_no_say(world):
    config = world.write_settings(PROJECT='')
    done = subprocess.run(
        ['bash', f'{SCRIPTS}/delete.sh', '--config', str(config), '--dry-run'],
        env={'PATH': '/usr/bin:/bin', 'PROJECT': 'other'},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert 'PROJECT is empty: set it (gcloud projects list)' in done.stderr


@pytest.mark.parametrize(
    'script, changes, message',
    [
        ('create_queued.sh', {'PROJECT': '', 'ZONE': ''}, 'ZONE is empty: set it (gcloud compute tpus locations list)'),
        ('create_queued.sh', {'MODE': 'sopt'}, 'MODE is sopt; choose one of: spot flex reserved ondemand'),
        ('create_queued.sh', {'MODE': 'flex'}, 'MAX_RUN_DURATION is empty'),
        ('create_queued.sh', {'PROVIDER': 'mig'}, 'use create_mig.sh'),
        ('create_queued.sh', {'ACCELERATOR_TYPE': 'tpu7x-8'}, 'PROVIDER=mig or xpk_workload.sh for TPU7x'),
        ('create_queued.sh', {'SLICES': '3'}, 'do not make SLICES=3 equal slices'),
        ('create_queued.sh', {'WORKERS': 'many'}, 'WORKERS is many; it must be a whole number of at least 1'),
        ('create_queued.sh', {'ZOEN': 'x'}, 'unknown setting ZOEN. Known: PROJECT ZONE'),
        ('create_queued.sh', {'BUCKET': ''}, 'BUCKET is empty'),
        ('create_mig.sh', {'PROVIDER': 'mig', 'MODE': 'flex'}, 'choose one of: spot ondemand'),
        ('create_mig.sh', {'PROVIDER': 'mig', 'IMAGE_FAMILY': ''}, 'IMAGE_FAMILY is empty'),
        ('setup_workers.sh', {'COMMIT': ''}, 'COMMIT is empty: set it (git rev-parse HEAD)'),
        ('setup_workers.sh', {'CODE': 'gs://bucket/x.tar.gz'}, 'leave COMMIT empty'),
        ('setup_workers.sh', {'PYTHON_VERSION': '3.10'}, 'choose one of: 3.11 3.12 3.13'),
        ('delete.sh', {'PROVIDER': 'aws'}, 'choose one of: queued mig'),
    ],
)
def test_wrong_settings_are_refused_before_gcloud_is_called(world, script, changes, message):
    done = world.run(script, changes=changes)
    assert done.returncode == 2
    assert message in done.stderr
    assert not world.calls()


@pytest.mark.parametrize(
    'script, words, message',
    [
        ('run_all.sh', (), 'needs a NAME'),
        ('run_all.sh', ('run',), 'needs a command'),
        ('run_all.sh', ('../run', '--', 'x'), 'NAME ../run: use letters'),
        ('run_all.sh', ('--now', 'run', '--', 'x'), 'unknown option --now; known: --config FILE, --dry-run, --help'),
        ('run_all.sh', ('--stop', 'run', '--', 'x'), '--stop takes a NAME and no command'),
        ('supervise.sh', ('run',), 'needs a command'),
        ('xpk_workload.sh', ('run', '--', 'x'), 'xpk is not on the PATH: pip install xpk'),
        ('delete.sh', ('pod',), 'takes no arguments, got: pod'),
        ('status.sh', ('run', 'more'), 'takes one NAME, got also: more'),
    ],
)
def test_wrong_words_are_refused(world, script, words, message):
    done = world.run(script, *words)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_line_that_is_no_setting_is_named(world):
    path = world.write_settings()
    path.write_text('PROJECT=p\n\n# a comment\nexport ZONE=z\n')
    script = ['bash', f'{SCRIPTS}/delete.sh', '--config', str(path), '--dry-run']
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 2
    assert f'{path}:4: not KEY=VALUE: export ZONE=z' in done.stderr


def test_the_example_names_exactly_the_settings_there_are(world):
    done = world.run('create_queued.sh', changes={'ZOEN': 'x'})
    known = done.stderr.partition('Known: ')[2].split()
    with open(f'{SCRIPTS}/config.env.example') as file:
        named = [line.partition('=')[0] for line in file if not line.startswith('#') and '=' in line]
    assert sorted(named) == sorted(known)


@pytest.mark.parametrize(
    'bucket, message',
    [
        ('', 'does not exist: gcloud storage buckets create gs://bucket'),
        ('US-EAST5', 'is in us-east5, the TPU in eu'),
    ],
)
def test_a_bucket_that_is_elsewhere_is_refused(world, bucket, message):
    world.play(['ACTIVE'], bucket=bucket)
    done = world.run('create_queued.sh')
    assert done.returncode == 2
    assert message in done.stderr
    assert world.made_and_deleted() == (0, 0)


def test_workers_are_set_up_in_their_home_directories(world, repository):
    world.run('create_queued.sh')
    before = {path.name for path in (world.directory / 'image').iterdir()}
    for _ in range(2):
        done = world.run('setup_workers.sh')
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.split('\n')) == ['', 'jaxpo-worker host-0 ready', 'jaxpo-worker host-1 ready']
    for worker in range(2):
        home = world.home(worker)
        new = {path.name for path in home.iterdir()} - before
        # No start-up file of a shell is among them.
        assert new == {'jaxpo', 'jaxpo_worker.sh', 'jaxpo_environment', 'uv_asked'}
        head = (home / 'jaxpo/.git/HEAD').read_text().strip()
        assert head == repository[1]
        made, installed = (home / 'uv_asked').read_text().splitlines()[:2]
        assert made.startswith('venv ') and '--python 3.12' in made
        assert f'--requirements {home}/jaxpo/requirements-tpu.txt --editable {home}/jaxpo' in installed


@pytest.mark.parametrize('provider', ['queued', 'mig'])
def test_a_commit_that_is_not_there_is_named(world, provider):
    world.run(f'create_{provider}.sh', changes={'PROVIDER': provider})
    done = world.run('setup_workers.sh', changes={'PROVIDER': provider, 'COMMIT': '0' * 40})
    assert done.returncode == 2
    assert 'worker host-1: no commit 0000' in done.stderr


@pytest.mark.parametrize('workers, code, message', [('1', 2, 'set WORKERS=2'), ('3', 1, '2 of 3 workers are ready')])
def test_a_wrong_number_of_workers_is_found_at_once(world, workers, code, message):
    world.run('create_queued.sh')
    done = world.run('setup_workers.sh', changes={'WORKERS': workers})
    assert done.returncode == code
    assert message in done.stderr


def test_a_run_is_started_once_watched_and_stopped(world):
    start(world, ['hang'], ['hang'])
    again = world.run('run_all.sh', *COMMAND)
    assert again.returncode == 2
    assert 'run runs already: host-' in again.stderr
    assert len(world.sent('start')) == 1
    assert world.run('status.sh').stdout == 'pod: ACTIVE\n'
    wait_for(world, 'running', 'running')
    stopped = world.run('run_all.sh', '--stop', 'run')
    assert stopped.returncode == 0
    assert 'host-0 ended 143' in stopped.stdout and 'host-1 ended 143' in stopped.stdout
    # What ended may start again, and the log is continued.
    assert world.run('run_all.sh', '--wait', *COMMAND).returncode == 0
    log = world.run('status.sh', '--log', 'run').stdout
    assert log.count('host-1: arguments: train') == 2


def test_a_run_on_some_of_the_workers_is_not_started_on_the_others(world):
    start(world, ['hang', 0], [0, 0])
    wait_for(world, 'running', 'ended 0')
    done = world.run('run_all.sh', *COMMAND)
    assert done.returncode == 2
    assert len(world.sent('start')) == 1


@pytest.mark.parametrize('codes, code', [((0, 0), 0), ((0, 2), 2), ((1, 1), 1), ((75, 75), 75)])
def test_waiting_ends_with_what_the_workers_ended_with(world, codes, code):
    world.run('create_queued.sh')
    world.run('setup_workers.sh')
    world.codes(*([code] for code in codes))
    assert world.run('run_all.sh', '--wait', *COMMAND).returncode == code


def test_nothing_to_delete_is_no_error(world):
    assert world.run('delete.sh').returncode == 0
    assert world.run('status.sh').stdout == 'pod: ABSENT\n'


def test_nothing_is_started_while_a_worker_is_missing(world):
    world.run('create_queued.sh')
    world.run('setup_workers.sh')
    done = world.run('run_all.sh', *COMMAND, changes={'WORKERS': '3'})
    assert done.returncode == 1
    assert '2 of 3 workers answer' in done.stderr
    assert not world.sent('start')


def test_an_unset_up_worker_says_so(world):
    world.run('create_queued.sh')
    for worker in range(2):
        shutil.copytree(world.directory / 'image', world.home(worker))
        shutil.copy(f'{SCRIPTS}/worker.sh', world.home(worker) / 'jaxpo_worker.sh')
    done = world.run('run_all.sh', *COMMAND)
    assert done.returncode == 2
    assert 'no code here: run setup_workers.sh first' in done.stderr
