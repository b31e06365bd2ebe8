#!/usr/bin/env bash
# Launches 3 managed jobs of SkyPilot on TPUs, the shards of one study: experiments/study.py.
# They share gs://my-bucket/studies/First Study and nothing else, and each is recovered from preemption by itself: what one
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
  "$HOME/.local/bin/uv" pip install --python "$HOME/jaxpo_environment/bin/python" \
    --requirements requirements-tpu.txt --editable .

run: |
  PATH="$HOME/jaxpo_environment/bin:$PATH"
  exec jaxpo study experiments/study.py --output 'gs://my-bucket/studies/First Study' --processes.platform tpu --shard "$SHARD"
YAML

for ((shard = 1; shard <= 3; shard++)); do
  sky jobs launch --name "study-first-study-f73f2-$shard" --env "SHARD=$shard/3" \
    --gpus "$ACCELERATORS" --infra "$INFRA" --detach-run --yes "$@" "$folder/task.yaml"
done
