#!/usr/bin/env bash
# Submits a run to a GKE cluster that xpk made. Kubernetes restarts it after a preemption: no supervise.sh is needed.
#
#   xpk_workload.sh [--config FILE] [--dry-run] NAME -- COMMAND...
#   xpk_workload.sh [--config FILE] [--dry-run] --delete NAME
#
# DOCKER_IMAGE holds jaxpo and requirements-tpu.txt. jaxpo's exit code 75 (interrupted, state saved) restarts the run,
# as do xpk's own 42 and 127 to 255; 1 and 2 end it.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

take_options '--delete' "$@"
take_command ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
load_settings
require PROJECT ZONE CLUSTER
need xpk 'pip install xpk'
workload=(--workload="$RUN_NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE")

if given --delete; then
  [ "${#COMMAND[@]}" -eq 0 ] || die '--delete takes a NAME and no command'
  run xpk workload delete "${workload[@]}" --force
  exit
fi

[ "${#COMMAND[@]}" -gt 0 ] || die "needs a command: ${0##*/} $RUN_NAME -- jaxpo train ..."
require ACCELERATOR_TYPE SLICES MODE TRIES DOCKER_IMAGE STOP_SECONDS
choice MODE spot flex ondemand
numbers 1 SLICES TRIES STOP_SECONDS
case $MODE in
  spot | flex) workload+=("--$MODE") ;;
esac
run xpk workload create "${workload[@]}" --tpu-type="$ACCELERATOR_TYPE" --num-slices="$SLICES" \
  --docker-image="$DOCKER_IMAGE" --max-restarts="$TRIES" --restart-on-exit-codes=75 \
  --termination-grace-period-seconds="$STOP_SECONDS" --command="$(quoted "${COMMAND[@]}")"
