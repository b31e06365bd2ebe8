#!/usr/bin/env bash
# Runs one command on all workers, detached: it goes on when the connection ends.
#
#   run_all.sh [--config FILE] [--dry-run] [--wait] NAME -- COMMAND...
#   run_all.sh [--config FILE] [--dry-run] --stop NAME
#
# The command runs in ~/jaxpo with the environment of setup_workers.sh. Each worker keeps ~/jaxpo_runs/NAME/log, pid
# and exit (its exit code). It refuses to start NAME where a worker still runs it. --wait waits for all workers, shows
# the ends of their logs and ends with 0 (all did), 1 (all had to stop), 2 (refused) or 75 (interrupted: run it again).
# --stop sends SIGTERM to what NAME's process id file names, and SIGKILL after STOP_SECONDS.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$HERE/machines.sh"
source "$HERE/runs.sh"

take_options '--wait --stop' "$@"
take_command ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
load_watch

if given --stop; then
  [ "${#COMMAND[@]}" -eq 0 ] || die '--stop takes a NAME and no command'
  worker stop "$RUN_NAME" "$STOP_SECONDS"
  exit
fi

[ "${#COMMAND[@]}" -gt 0 ] || die "needs a command: ${0##*/} $RUN_NAME -- jaxpo train ..."
if [ -z "$DRY_RUN" ]; then
  tally
  [ "$RUNNING" -eq 0 ] || die "$RUN_NAME runs already:$SAID stop it first: ${0##*/} --stop $RUN_NAME"
  if [ "$ANSWERED" -lt "$WORKERS" ]; then
    note "$ANSWERED of $WORKERS workers answer:$SAID nothing was started. Is it ACTIVE (status.sh), and set up?"
    exit 1
  fi
fi
worker start "$RUN_NAME" "${COMMAND[@]}"
if given --wait && [ -z "$DRY_RUN" ]; then
  watch
  show_logs
  note "$RUN_NAME: $OUTCOME"
  exit "$(code_of "$OUTCOME")"
fi
