"""Scripts that run a study as an array of jobs on a cluster: n workers that share a directory of a bucket.

Each job runs `jaxpo study EXPERIMENT ... --shard i/n`, i counting from 1. What differs between clusters (machines,
zone, image) is read when a script is run, from the environment or from tpu_setup's settings, and checked there; no
script holds a secret. The words of the command arrive at the workers as they were.
"""

import hashlib
import pathlib
import re
import shlex
from collections.abc import Callable, Sequence

import jinja2

from jaxpo import storage
from jaxpo.errors import InputError, unknown

MOST_SHARDS = 999

SKYPILOT = """\
#!/usr/bin/env bash
# Launches {{ shards }} managed jobs of SkyPilot on TPUs, the shards of one study: {{ experiment }}.
# They share {{ output }} and nothing else, and each is recovered from preemption by itself: what one
# leaves behind another takes over. From the root of the repository (more options are those of `sky jobs launch`):
#
#   ACCELERATORS=tpu-v6e-8 INFRA=gcp/europe-west4/europe-west4-a bash THIS_FILE [OPTION ...]

set -euo pipefail
: "${ACCELERATORS:?is not set: what each job runs on, as tpu-v6e-8}"
: "${INFRA:?is not set: where, as gcp/REGION/ZONE}"
[ -f requirements-tpu.txt ] || { echo 'Run this from the root of the repository, which the jobs get.' >&2; exit 2; }

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/task.yaml" <<'YAML'
resources:
  use_spot: true
  job_recovery:
    # jaxpo's code for: interrupted, state saved. 1 (had to stop) and 2 (bad input) are final.
    recover_on_exit_codes: [75]
    max_restarts_on_errors: 0

workdir: .

envs:
  SHARD: 1/1

# uv is installed without editing any start-up file.
setup: |
  set -e
  curl --fail --silent --show-error --location https://astral.sh/uv/0.13.9/install.sh -o uv-installer.sh
  UV_UNMANAGED_INSTALL="$HOME/.local/bin" sh uv-installer.sh
  "$HOME/.local/bin/uv" venv --allow-existing --python 3.12 "$HOME/jaxpo_environment"
  "$HOME/.local/bin/uv" pip install --python "$HOME/jaxpo_environment/bin/python" \\
    --requirements requirements-tpu.txt --editable .

run: |
  PATH="$HOME/jaxpo_environment/bin:$PATH"
  exec {{ command }} --shard "$SHARD"
YAML

for ((shard = 1; shard <= {{ shards }}; shard++)); do
  sky jobs launch --name "{{ name }}-$shard" --env "SHARD=$shard/{{ shards }}" \\
    --gpus "$ACCELERATORS" --infra "$INFRA" --detach-run --yes "$@" "$folder/task.yaml"
done
"""

XPK = """\
#!/usr/bin/env bash
# Submits {{ shards }} workloads to a GKE cluster that xpk made, the shards of one study: {{ experiment }}.
# They share {{ output }} and nothing else, and Kubernetes restarts each after a preemption: what one leaves
# behind another takes over. Machines, cluster and image are settings of tpu_setup/config.env (SLICES: those of one
# shard, all of whose hosts run the same command). From the root of the repository:
#
#   bash THIS_FILE [--config FILE] [--dry-run]             submit them
#   bash THIS_FILE [--config FILE] [--dry-run] --delete    delete them

set -euo pipefail
workload=tpu_setup/xpk_workload.sh
[ -x "$workload" ] || { echo "Run this from the root of the repository: $workload is not here." >&2; exit 2; }

# shellcheck disable=SC2016  # no word of the command is to be expanded
command=({{ command }})
for ((shard = 1; shard <= {{ shards }}; shard++)); do
  case " $* " in
    *' --delete '*) "$workload" "$@" "{{ name }}-$shard" ;;
    *) "$workload" "$@" "{{ name }}-$shard" -- "${command[@]}" --shard "$shard/{{ shards }}" ;;
  esac
done
"""


def skypilot(experiment: str, overrides: Sequence[str], shards: int, output: str) -> str:
    """A bash script that launches a study's shards as managed jobs of SkyPilot.

    Args:
      experiment: Path of the experiment module, from the root of the repository.
      overrides: The other words of the command line, without --jobs and --shards.
      shards: How many jobs, 1 to MOST_SHARDS.
      output: The study's directory, in a bucket.

    Raises:
      InputError: what the machines of a cluster would not find, or could not share.
    """
    return _filled(SKYPILOT, experiment, overrides, shards, output)


def xpk(experiment: str, overrides: Sequence[str], shards: int, output: str) -> str:
    """A bash script that submits a study's shards as workloads of a GKE cluster; arguments and errors as `skypilot`."""
    return _filled(XPK, experiment, overrides, shards, output)


SYSTEMS: dict[str, Callable[[str, Sequence[str], int, str], str]] = {'skypilot': skypilot, 'xpk': xpk}


def script(system: str, experiment: str, overrides: Sequence[str], shards: int, output: str) -> str:
    """The script for one of SYSTEMS. InputError for another, and as `skypilot` has it."""
    if system not in SYSTEMS:
        raise unknown('kind of jobs', system, SYSTEMS)
    return SYSTEMS[system](experiment, overrides, shards, output)


def _filled(template: str, experiment: str, overrides: Sequence[str], shards: int, output: str) -> str:
    _check(experiment, overrides, shards, output)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    return environment.from_string(template).render(
        experiment=experiment,
        output=output,
        shards=shards,
        name=_name(output),
        command=shlex.join(['jaxpo', 'study', experiment, *overrides]),
    )


def _check(experiment: str, overrides: Sequence[str], shards: int, output: str) -> None:
    for word in (experiment, *overrides, output):
        if not word.isprintable():
            raise InputError(f'{word!r}: a line of a script holds no such characters.')
    if not 1 <= shards <= MOST_SHARDS:
        raise InputError(f'shards: 1 to {MOST_SHARDS} jobs, not {shards}.')
    path = pathlib.PurePosixPath(experiment)
    if path.is_absolute() or '..' in path.parts:
        raise InputError(f'{experiment}: name the experiment from the root of the repository, which the machines get.')
    if not storage.is_remote(storage.path(output)):
        raise InputError(
            f'output: {output} is a directory of this machine, which the machines of a cluster do not share. '
            'Name one in a bucket: --output gs://BUCKET/DIRECTORY.'
        )


def _name(output: str) -> str:
    """What jobs of a study are called: as xpk and SkyPilot want it, with a number behind at most 28 characters."""
    output = output.rstrip('/')
    last = re.sub(r'[^a-z0-9]+', '-', output.rpartition('/')[2].lower()).strip('-')[:12].strip('-')
    readable = f'study-{last.removeprefix("study")}-'.replace('--', '-')
    return readable + hashlib.sha256(output.encode()).hexdigest()[:5]
