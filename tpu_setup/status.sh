#!/usr/bin/env bash
# Says in what state the machines are and, with a NAME, what each worker does of that run.
#
#   status.sh [--config FILE] [--dry-run] [--log] [NAME]
#
# --log shows the last lines of every worker's log too.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$HERE/machines.sh"
source "$HERE/runs.sh"

take_options '--log' "$@"
load_machines
if [ -z "$DRY_RUN" ]; then printf '%s: ' "$TPU_NAME"; fi
machines_state
if [ "${#ARGUMENTS[@]}" -gt 0 ]; then
  take_command "${ARGUMENTS[@]}"
  [ "${#COMMAND[@]}" -eq 0 ] || die "takes one NAME, got also: ${COMMAND[*]}"
  worker state "$RUN_NAME"
  if given --log; then show_logs; fi
fi
