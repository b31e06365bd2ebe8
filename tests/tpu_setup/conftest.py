"""A world without a cloud: scripted machines behind a stand-in gcloud, whose workers are home directories."""

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = ROOT / 'tpu_setup'

# Ends with the next of its worker's scripted exit codes (0 where none is left); `hang` goes on until it is stopped.
JAXPO = """#!/bin/bash
touch "$HOME/started"
printf '%s\\n' "$@" >"$STAND_IN_WORLD/arguments"
codes=$STAND_IN_WORLD/codes.$WORKER
code=$(head -n 1 "$codes" 2>/dev/null)
sed -i 1d "$codes" 2>/dev/null
echo "arguments: $*"
if [ "$code" = hang ]; then exec sleep 600; fi
exit "${code:-0}"
"""

# Makes an environment whose only program is the scripted jaxpo, and remembers what it was asked for.
UV = """#!/bin/bash
if [ "$1" = --version ]; then echo 'uv 0.13.9'; exit; fi
printf '%s\\n' "$*" >>"$HOME/uv_asked"
if rm "$STAND_IN_WORLD/no_network.$WORKER" 2>/dev/null; then echo 'no network' >&2; exit 2; fi
mkdir -p "$HOME/jaxpo_environment/bin"
cp "$STAND_IN_WORLD/jaxpo" "$HOME/jaxpo_environment/bin/jaxpo"
"""

SETTINGS = {
    'PROJECT': 'project',
    'ZONE': 'europe-west4-a',
    'TPU_NAME': 'pod',
    'PROVIDER': 'queued',
    'MODE': 'spot',
    'WORKERS': '2',
    'BUCKET': 'bucket',
    'ACCELERATOR_TYPE': 'v6e-8',
    'SLICES': '1',
    'MACHINE_TYPE': 'ct6e-standard-4t',
    'TOPOLOGY': '2x4',
    'IMAGE_FAMILY': 'image-family',
    'IMAGE_PROJECT': 'image-project',
    'PYTHON_VERSION': '3.12',
    'UV_VERSION': '0.13.9',
    'TRIES': '5',
    'POLL_SECONDS': '0',
    'WAIT_POLLS': '20',
    'GRACE_POLLS': '3',
    'STOP_SECONDS': '20',
    'CLUSTER': 'cluster',
    'DOCKER_IMAGE': 'image',
}


def executable(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@dataclasses.dataclass(frozen=True)
class World:
    """What a test scripts, and what it can ask for afterwards."""

    directory: pathlib.Path
    settings: dict[str, str]

    def play(self, *lives: list[str], workers: int = 2, **others) -> None:
        """The states of each TPU that is made, the last life for all that follow."""
        world = {'made': 0, 'life': None, 'looks': 0, 'lives': lives, 'workers': workers}
        world |= {'refuse_create': [], 'refuse_delete': [], 'refuse_describe': []}
        world |= {'unreachable': [], 'silent': [], 'bucket': 'EUROPE-WEST4'} | others
        (self.directory / 'world.json').write_text(json.dumps(world))

    def codes(self, *of_workers: list) -> None:
        """What the command ends with, by worker and start."""
        for worker, codes in enumerate(of_workers):
            (self.directory / f'codes.{worker}').write_text(''.join(f'{code}\n' for code in codes))

    def write_settings(self, **changes: str) -> pathlib.Path:
        path = self.directory / 'settings.env'
        path.write_text(''.join(f'{key}={value}\n' for key, value in (self.settings | changes).items()))
        return path

    def open(self, script: str, *words: str, changes: dict[str, str] | None = None) -> subprocess.Popen:
        config = self.write_settings(**changes or {})
        command = ['bash', str(SCRIPTS / script), '--config', str(config), *words]
        path = f'{self.directory / "bin"}:/usr/bin:/bin'
        environment = {'PATH': path, 'STAND_IN_WORLD': str(self.directory), 'HOME': str(self.directory)}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    def run(self, script: str, *words: str, changes: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        process = self.open(script, *words, changes=changes)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def calls(self, *verbs: str) -> list[list[str]]:
        """Logged calls of gcloud that contain all of these words."""
        log = self.directory / 'log.jsonl'
        found = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [call for call in found if {*verbs} <= {*call}]

    def sent(self, verb: str) -> list[str]:
        """Command lines sent to the workers that call this verb of worker.sh."""
        words = [word for call in self.calls('ssh') for word in call if word.startswith('--command=')]
        return [word.removeprefix('--command=') for word in words if word.split()[2] == verb]

    def home(self, worker: int = 0) -> pathlib.Path:
        return self.directory / 'workers' / str(worker)

    def made_and_deleted(self) -> tuple[int, int]:
        made = len(self.calls('queued-resources', 'create')) + len(self.calls('managed', 'create'))
        return made, len(self.calls('queued-resources', 'delete')) + len(self.calls('managed', 'delete'))


@pytest.fixture(scope='session')
def repository(tmp_path_factory):
    """A git repository with one commit, and its hash."""
    directory = tmp_path_factory.mktemp('repository')
    (directory / 'pyproject.toml').write_text('[project]\n')
    (directory / 'requirements-tpu.txt').write_text('')
    who = ['-c', 'user.name=tester', '-c', 'user.email=tester@example.org']
    for words in (['init', '-q'], ['add', '.'], [*who, 'commit', '-q', '-m', 'Start']):
        subprocess.run(['git', *words], cwd=directory, check=True)
    commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=directory, check=True, capture_output=True, text=True)
    return directory, commit.stdout.strip()


@pytest.fixture
def world(tmp_path, repository):
    source, commit = repository
    stand_in = pathlib.Path(__file__).with_name('gcloud_stand_in.py')
    executable(tmp_path / 'bin/gcloud', f'#!/bin/bash\nexec {sys.executable} -S -E {stand_in} "$@"\n')
    executable(tmp_path / 'tools/hostname', '#!/bin/bash\necho "host-$WORKER"\n')
    executable(tmp_path / 'image/.local/bin/uv', UV)
    executable(tmp_path / 'jaxpo', JAXPO)
    made = World(tmp_path, SETTINGS | {'CODE': str(source), 'COMMIT': commit})
    made.play(['ACTIVE'])
    yield made
    for pid in tmp_path.glob('workers/*/jaxpo_runs/*/pid'):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), 9)
