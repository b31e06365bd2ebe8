#!/usr/bin/env bash
# Keeps one run going until it is done: makes the machines, sets them up, starts the command, and after a preemption
# does all of it again with the same command, which resumes by itself. Deletes the machines at the end.
#
#   supervise.sh [--config FILE] [--dry-run] [--keep] NAME -- COMMAND...
#
# Ends with 0 (done), 1 (the run had to stop, as for a loss that is not finite), 2 (bad input: never tried again) or 75
# (TRIES are spent, the last checkpoint stands). Ctrl-C leaves machines and run as they are; the same command watches
# them again. --keep leaves the machines at the end.

# shellcheck source-path=SCRIPTDIR
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
source "$HERE/machines.sh"
source "$HERE/runs.sh"

CREATED=0
DELETED=0
HELD=''  # whether there are machines to delete
FOUND='' # whether they were there before, and may run the command already
READY='' # whether they are set up

# Makes the machines. Fails where that may succeed another time.
create() {
  local errors code=0
  errors=$(mktemp)
  "$HERE/create_$PROVIDER.sh" --config "$CONFIG" 2>"$errors" || code=$?
  cat "$errors" >&2
  if [ "$code" -eq 0 ] || [ "$(machines_state)" != ABSENT ]; then
    CREATED=$((CREATED + 1))
    HELD=yes
  fi
  if [ "$code" -ne 0 ]; then
    if [ "$code" -eq 2 ] || grep -q -e INVALID_ARGUMENT -e PERMISSION_DENIED -e UNAUTHENTICATED "$errors"; then
      rm -f "$errors"
      finish 2 'the request was refused'
    fi
  fi
  rm -f "$errors"
  return "$code"
}

# Deletes the machines, if there are any.
drop() {
  local attempt=0
  READY=''
  FOUND=''
  if [ -z "$HELD" ]; then return; fi
  until "$HERE/delete.sh" --config "$CONFIG"; do
    attempt=$((attempt + 1))
    if [ "$attempt" -gt "$GRACE_POLLS" ]; then
      note "$TPU_NAME COULD NOT BE DELETED and may cost money: run delete.sh until it says so"
      exit 1
    fi
    pause
  done
  HELD=''
  DELETED=$((DELETED + 1))
}

finish() {
  if given --keep; then
    note "$TPU_NAME is kept and costs money until delete.sh"
  else
    drop
  fi
  note "$RUN_NAME: $2; machines made $CREATED times, deleted $DELETED times; exit code $1"
  exit "$1"
}

# Comes back with machines that are ACTIVE, or fails.
get_machines() {
  local state poll=0 before='' unanswered=0
  state=$(machines_state)
  while [ "$state" = UNKNOWN ]; do
    unanswered=$((unanswered + 1))
    if [ "$unanswered" -gt "$GRACE_POLLS" ]; then return 1; fi
    pause
    state=$(machines_state)
  done
  if [ "$state" != ABSENT ]; then
    if [ -z "$HELD" ]; then FOUND=yes; fi
    HELD=yes
  fi
  case $state in
    SUSPEND* | FAILED | DELETING)
      note "$TPU_NAME is $state"
      drop
      create
      ;;
    ABSENT) create ;;
  esac || return
  unanswered=0
  while [ "$poll" -le "$WAIT_POLLS" ]; do
    state=$(machines_state)
    if [ "$state" != "$before" ]; then note "$TPU_NAME is $state"; fi
    before=$state
    case $state in
      ACTIVE) return 0 ;;
      SUSPEND* | FAILED | DELETING) return 1 ;;
      UNKNOWN) unanswered=$((unanswered + 1)) ;;
      *) unanswered=0 ;;
    esac
    if [ "$unanswered" -gt "$GRACE_POLLS" ]; then return 1; fi
    poll=$((poll + 1))
    pause
  done
  note "$TPU_NAME was not granted within $WAIT_POLLS looks"
  return 1
}

# Sets the workers up, once for each time that machines were made. New machines may not answer at once.
set_up() {
  local attempt=0 code
  until [ -n "$READY" ]; do
    code=0
    "$HERE/setup_workers.sh" --config "$CONFIG" || code=$?
    case $code in
      0) READY=yes ;;
      2) finish 2 'the workers could not be set up' ;;
      *)
        attempt=$((attempt + 1))
        if [ "$attempt" -gt "$GRACE_POLLS" ]; then return 1; fi
        pause
        ;;
    esac
  done
}

# Whether all workers of machines that were there before run the command: nothing of theirs is touched then.
runs_already() {
  if [ -z "$FOUND" ]; then return 1; fi
  FOUND=''
  tally
  [ "$(verdict)" = running ] && note "$RUN_NAME runs already: watching it"
}

# Starts the command on all workers. Where that fails, OUTCOME says as what the try counts.
start() {
  local attempt=0
  tally
  while [ "$(verdict)" = missing ]; do
    attempt=$((attempt + 1))
    OUTCOME=lost
    if [ "$attempt" -gt "$GRACE_POLLS" ]; then return 1; fi
    pause
    tally
  done
  OUTCOME=ended
  if [ "$RUNNING" -gt 0 ]; then worker stop "$RUN_NAME" "$STOP_SECONDS"; fi
  "$HERE/run_all.sh" --config "$CONFIG" "$RUN_NAME" -- "${COMMAND[@]}"
}

plan() {
  "$HERE/create_$PROVIDER.sh" --config "$CONFIG" --dry-run || return
  "$HERE/setup_workers.sh" --config "$CONFIG" --dry-run || return
  "$HERE/run_all.sh" --config "$CONFIG" --dry-run "$RUN_NAME" -- "${COMMAND[@]}" || return
  "$HERE/status.sh" --config "$CONFIG" --dry-run "$RUN_NAME" || return
  if ! given --keep; then "$HERE/delete.sh" --config "$CONFIG" --dry-run; fi
}

take_options '--keep' "$@"
take_command ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
[ "${#COMMAND[@]}" -gt 0 ] || die "needs a command: ${0##*/} $RUN_NAME -- jaxpo train ..."
load_watch
require TRIES WAIT_POLLS
numbers 1 TRIES WAIT_POLLS

# What the other scripts refuse, they refuse now and not after hours.
planned=$(plan) || exit
if [ -n "$DRY_RUN" ]; then
  printf '%s\n' "$planned"
  exit
fi
trap 'note "left as it is: $RUN_NAME goes on on the workers, which cost money until delete.sh"; exit 130' INT TERM

number=0
while [ "$number" -lt "$TRIES" ]; do
  number=$((number + 1))
  if [ "$number" -gt 1 ]; then pause; fi
  note "try $number of $TRIES"
  if ! get_machines; then
    drop
    continue
  fi
  if runs_already; then
    watch
  elif ! set_up; then
    drop
    continue
  elif start; then
    watch
  fi
  case $OUTCOME in
    lost) drop ;;
    *)
      show_logs
      case $OUTCOME in
        done) finish 0 'done' ;;
        halted) finish 1 'it had to stop: see the logs' ;;
        refused) finish 2 'bad input: see the logs' ;;
      esac
      ;;
  esac
done
finish 75 "not done after $TRIES tries; the same command goes on from the last checkpoint"
