#!/usr/bin/env bash
# Makes one TPU slice of several machines as a managed instance group of Compute Engine: v5p, v6e and later.
#
#   create_mig.sh [--config FILE] [--dry-run]
#
# Three things bear the name TPU_NAME: a workload policy (the topology), an instance template (the machines) and the
# group. delete.sh deletes all three. It costs money as soon as machines run.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$HERE/machines.sh"

take_options '' "$@"
no_arguments
load_machines
[ "$PROVIDER" = mig ] || die "$CONFIG: PROVIDER is $PROVIDER: use create_queued.sh"
require MACHINE_TYPE TOPOLOGY IMAGE_FAMILY IMAGE_PROJECT MODE
choice MODE spot ondemand

template=(
  --machine-type="$MACHINE_TYPE" --maintenance-policy=TERMINATE
  --image-family="$IMAGE_FAMILY" --image-project="$IMAGE_PROJECT"
  --scopes=https://www.googleapis.com/auth/cloud-platform
)
# A stopped spot slice cannot be started again, only made anew: deleting is supervise.sh's, so that it sees the stop.
if [ "$MODE" = spot ]; then template+=(--provisioning-model=SPOT --instance-termination-action=STOP); fi
if [ -n "$SERVICE_ACCOUNT" ]; then template+=(--service-account="$SERVICE_ACCOUNT"); fi

check_bucket
run gcloud compute resource-policies create workload-policy "$TPU_NAME" --project="$PROJECT" --region="$(region)" \
  --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY"
run gcloud compute instance-templates create "$TPU_NAME" --project="$PROJECT" "${template[@]}"
# A slice is one unit: one machine repaired alone would not join the others, so the group repairs none.
run gcloud compute instance-groups managed create "$TPU_NAME" "${PLACE[@]}" --size="$WORKERS" \
  --template="$TPU_NAME" --default-action-on-vm-failure=do-nothing \
  --workload-policy="projects/$PROJECT/regions/$(region)/resourcePolicies/$TPU_NAME"
