#!/usr/bin/env bash
# Deletes the machines, and what was made for them. Nothing there to delete is no error. The bucket is left alone.
#
#   delete.sh [--config FILE] [--dry-run]

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$HERE/machines.sh"

# Runs a delete command; what is absent already counts as deleted.
delete() {
  if [ -n "$DRY_RUN" ]; then
    run "$@"
    return
  fi
  local errors code=0
  errors=$(mktemp)
  "$@" </dev/null 2>"$errors" || code=$?
  if [ "$code" -ne 0 ] && grep -q -e NOT_FOUND -e 'was not found' "$errors"; then code=0; fi
  cat "$errors" >&2
  rm -f "$errors"
  return "$code"
}

take_options '' "$@"
no_arguments
load_machines
if [ "$PROVIDER" = queued ]; then
  # --force deletes the machines too, and not only a request without any.
  delete gcloud compute tpus queued-resources delete "$TPU_NAME" "${PLACE[@]}" --force --quiet
else
  delete gcloud compute instance-groups managed delete "$TPU_NAME" "${PLACE[@]}" --quiet
  delete gcloud compute instance-templates delete "$TPU_NAME" --project="$PROJECT" --quiet
  delete gcloud compute resource-policies delete "$TPU_NAME" --project="$PROJECT" --region="$(region)" --quiet
fi
