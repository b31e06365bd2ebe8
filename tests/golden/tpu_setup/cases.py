"""What the golden files hold: `python tests/golden/tpu_setup/cases.py` writes them anew from tpu_setup/'s --dry-run."""

import pathlib
import shlex
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
SCRIPTS = HERE.parents[2] / 'tpu_setup'
SETTINGS = {
    'PROJECT': 'my-project',
    'ZONE': 'europe-west4-a',
    'TPU_NAME': 'jaxpo',
    'PROVIDER': 'queued',
    'MODE': 'spot',
    'WORKERS': '4',
    'BUCKET': 'my-bucket',
    'ACCELERATOR_TYPE': 'v6e-16',
    'SLICES': '1',
    'MACHINE_TYPE': 'ct6e-standard-4t',
    'TOPOLOGY': '4x4',
    'IMAGE_FAMILY': 'my-image-family',
    'IMAGE_PROJECT': 'my-image-project',
    'CODE': 'https://example.org/you/jaxpo.git',
    'COMMIT': '0123abc',
    'PYTHON_VERSION': '3.12',
    'UV_VERSION': '0.13.9',
    'TRIES': '20',
    'POLL_SECONDS': '30',
    'WAIT_POLLS': '720',
    'GRACE_POLLS': '6',
    'STOP_SECONDS': '120',
    'CLUSTER': 'my-cluster',
    'DOCKER_IMAGE': 'europe-docker.pkg.dev/my-project/images/jaxpo:1',
}
TRAIN = ('run', '--', 'jaxpo', 'train', 'experiments/x.py', '--output', 'gs://my-bucket/run', '--note', "it's; $(here)")
MIG = {'PROVIDER': 'mig'}
# By script: what its arguments are, and which settings differ from those above.
CASES = {
    'create_queued': [
        ((), {}),
        ((), {'MODE': 'flex', 'MAX_RUN_DURATION': '3d', 'ACCELERATOR_TYPE': 'v5litepod-16'}),
        ((), {'MODE': 'reserved', 'ACCELERATOR_TYPE': 'v5p-16', 'SLICES': '2'}),
        (
            (),
            {'MODE': 'ondemand', 'ACCELERATOR_TYPE': 'v4-32', 'VALID_UNTIL': '6h', 'SERVICE_ACCOUNT': 'me@example.org'},
        ),
        ((), {'RUNTIME_VERSION': 'another'}),
    ],
    'create_mig': [((), MIG), ((), MIG | {'MODE': 'ondemand', 'SERVICE_ACCOUNT': 'me@example.org'})],
    'setup_workers': [((), {}), ((), {'CODE': 'gs://my-bucket/jaxpo.tar.gz', 'COMMIT': ''}), ((), MIG)],
    'run_all': [(TRAIN, {}), (TRAIN, MIG), (('--wait', *TRAIN), {}), (('--stop', 'run'), {})],
    'status': [((), {}), (('run',), {}), (('--log', 'run'), MIG)],
    'supervise': [(TRAIN, {}), (TRAIN, MIG), (('--keep', *TRAIN), {})],
    'delete': [((), {}), ((), MIG)],
    'xpk_workload': [
        (TRAIN, {}),
        (TRAIN, {'MODE': 'flex', 'ACCELERATOR_TYPE': 'tpu7x-16', 'SLICES': '2'}),
        (('--delete', 'run'), {}),
    ],
}


def dry_run(script: str) -> str:
    """All that --dry-run prints of a script's cases; a case that fails shows its error."""
    parts = []
    for words, changes in CASES[script]:
        with tempfile.NamedTemporaryFile('w', suffix='.env') as config:
            config.write(''.join(f'{key}={value}\n' for key, value in (SETTINGS | changes).items()))
            config.flush()
            command = ['bash', str(SCRIPTS / f'{script}.sh'), '--config', config.name, '--dry-run', *words]
            done = subprocess.run(command, capture_output=True, text=True, env={'PATH': '/usr/bin:/bin'})
        changed = ' '.join(f'{key}={value}' for key, value in changes.items())
        parts.append(f'# {changed or "as set"}: {script}.sh {" ".join(words)}\n{done.stdout}{done.stderr}')
    return '\n'.join(parts).replace(str(SCRIPTS), 'tpu_setup')


def commands() -> list[list[str]]:
    """One command of the golden files for each verb of a tool with each set of flags."""
    found = {}
    for path in HERE.glob('*.txt'):
        for line in path.read_text().splitlines():
            if line and not line.startswith('#'):
                words = shlex.split(line)
                flags = (word.split('=')[0] for word in words if word.startswith('-'))
                found[*words[:5], *sorted(flags)] = words
    return list(found.values())


if __name__ == '__main__':
    for name in CASES:
        (HERE / f'{name}.txt').write_text(dry_run(name))
