#!/usr/bin/env bash
# Brings code, a Python environment and packages to all workers, in their home directories. Safe to repeat.
#
#   setup_workers.sh [--config FILE] [--dry-run]
#
# The code is CODE at COMMIT (git), or CODE as a gs:// archive made by:
#   git archive --format=tar.gz HEAD | gcloud storage cp - gs://BUCKET/jaxpo.tar.gz

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$HERE/machines.sh"

take_options '' "$@"
no_arguments
load_machines
require CODE PYTHON_VERSION UV_VERSION
choice PYTHON_VERSION 3.11 3.12 3.13
# shellcheck disable=SC2153  # it is the setting that is meant
case $CODE in
  gs://*) [ -z "$COMMIT" ] || die "$CONFIG: CODE is an archive: leave COMMIT empty" ;;
  *) require COMMIT ;;
esac

copy_to_workers "$HERE/worker.sh" jaxpo_worker.sh
said=$(worker setup "$CODE" "$COMMIT" "$PYTHON_VERSION" "$UV_VERSION")
printf '%s\n' "$said"
if [ -z "$DRY_RUN" ]; then
  ready=$(grep -c '^jaxpo-worker .* ready$' <<<"$said" || true)
  [ "$ready" -le "$WORKERS" ] || die "$ready workers answered, but WORKERS=$WORKERS in $CONFIG: set WORKERS=$ready"
  if [ "$ready" -lt "$WORKERS" ]; then
    note "$ready of $WORKERS workers are ready: run this again, or correct WORKERS in $CONFIG"
    exit 1
  fi
fi
