#!/usr/bin/env bash
# Asks for TPUs by a queued resource of the Cloud TPU API: v4 to v6e, spot, flex-start, reserved or on demand.
#
#   create_queued.sh [--config FILE] [--dry-run]
#
# Returns at once: status.sh says when the request is granted (ACTIVE). From then on it costs money until delete.sh.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$HERE/machines.sh"

# The software version that Cloud TPU's page of runtime versions names for a type.
runtime_version() {
  case $ACCELERATOR_TYPE in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) die "$CONFIG: no RUNTIME_VERSION is known for ACCELERATOR_TYPE $ACCELERATOR_TYPE (v4-*, v5litepod-*, v5p-*," \
      'v6e-*): set it, or use PROVIDER=mig or xpk_workload.sh for TPU7x and later' ;;
  esac
}

take_options '' "$@"
no_arguments
load_machines
[ "$PROVIDER" = queued ] || die "$CONFIG: PROVIDER is $PROVIDER: use create_mig.sh"
require ACCELERATOR_TYPE MODE SLICES
choice MODE spot flex reserved ondemand
numbers 1 SLICES
[ "$((WORKERS % SLICES))" -eq 0 ] || die "$CONFIG: WORKERS=$WORKERS machines do not make SLICES=$SLICES equal slices"

version=$RUNTIME_VERSION
if [ -z "$version" ]; then version=$(runtime_version); fi
tool=(gcloud)
request=(
  compute tpus queued-resources create "$TPU_NAME" "${PLACE[@]}"
  --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$version"
  --scopes=https://www.googleapis.com/auth/cloud-platform --async
)
if [ "$SLICES" -eq 1 ]; then
  request+=(--node-id="$TPU_NAME")
else
  request+=(--node-count="$SLICES" --node-prefix="$TPU_NAME")
fi
case $MODE in
  spot) request+=(--spot) ;;
  reserved) request+=(--reserved) ;;
  flex)
    require MAX_RUN_DURATION
    tool+=(alpha)
    request+=(--provisioning-model=flex-start --max-run-duration="$MAX_RUN_DURATION")
    ;;
esac
if [ -n "$VALID_UNTIL" ]; then request+=(--valid-until-duration="$VALID_UNTIL"); fi
if [ -n "$SERVICE_ACCOUNT" ]; then request+=(--service-account="$SERVICE_ACCOUNT"); fi
check_bucket
run "${tool[@]}" "${request[@]}"
