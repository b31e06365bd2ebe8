#!/usr/bin/env bash
# Sourced by the other scripts: what the workers say of a run, and what follows from it.
# shellcheck disable=SC2034  # the scripts read what is set here

# Reads the settings of whoever watches a run.
load_watch() {
  load_machines
  require POLL_SECONDS GRACE_POLLS STOP_SECONDS
  numbers 0 POLL_SECONDS GRACE_POLLS STOP_SECONDS
}

pause() {
  if [ "$POLL_SECONDS" -gt 0 ]; then sleep "$POLL_SECONDS"; fi
}

# Asks all workers and counts their answers by what jaxpo's exit codes mean.
tally() {
  local said errors mark host what code
  ANSWERED=0 RUNNING=0 DONE=0 HALTED=0 REFUSED=0 FAILED=0 SAID=''
  errors=$(mktemp)
  said=$(worker state "$RUN_NAME" 2>"$errors") || true
  while read -r mark host what code; do
    if [ "$mark" != jaxpo-worker ]; then continue; fi
    ANSWERED=$((ANSWERED + 1))
    SAID="$SAID $host: $what${code:+ $code};"
    case $what:$code in
      running:) RUNNING=$((RUNNING + 1)) ;;
      ended:0) DONE=$((DONE + 1)) ;;
      ended:1) HALTED=$((HALTED + 1)) ;;
      # Bad input, or no such command: the same command would end the same way.
      ended:2 | ended:126 | ended:127) REFUSED=$((REFUSED + 1)) ;;
      *) FAILED=$((FAILED + 1)) ;;
    esac
  done <<<"$said"
  if [ "$ANSWERED" -lt "$WORKERS" ]; then cat "$errors" >&2; fi
  rm -f "$errors"
}

# One word for the last tally: refused, missing, done, running, halted (all ended with 1: the run itself had to stop),
# ended (all, some of them badly) or broken (some go on without the others).
verdict() {
  if [ "$REFUSED" -gt 0 ]; then
    echo refused
  elif [ "$ANSWERED" -lt "$WORKERS" ]; then
    echo missing
  elif [ "$DONE" -eq "$ANSWERED" ]; then
    echo 'done'
  elif [ "$((RUNNING + DONE))" -eq "$ANSWERED" ]; then
    echo running
  elif [ "$HALTED" -eq "$ANSWERED" ]; then
    echo halted
  elif [ "$RUNNING" -eq 0 ]; then
    echo ended
  else
    echo broken
  fi
}

# Waits for the end of a run. Sets OUTCOME: done, refused, halted, ended, or lost (the machines were taken away).
watch() {
  local state word before='' patience=0
  while :; do
    state=$(machines_state)
    case $state in
      ACTIVE)
        tally
        word=$(verdict)
        ;;
      UNKNOWN) word=missing SAID=' nobody could be asked' ;;
      *) word=lost SAID=" the machines are $state" ;;
    esac
    if [ "$SAID" != "$before" ]; then note "$RUN_NAME:$SAID"; fi
    before=$SAID
    case $word in
      running) patience=0 ;;
      missing | broken) patience=$((patience + 1)) ;;
      *)
        OUTCOME=$word
        return
        ;;
    esac
    if [ "$patience" -gt "$GRACE_POLLS" ]; then
      OUTCOME=ended
      if [ "$word" = missing ]; then OUTCOME=lost; fi
      return
    fi
    pause
  done
}

# The exit code for an OUTCOME, by jaxpo's own meanings.
code_of() {
  case $1 in
    done) echo 0 ;;
    halted) echo 1 ;;
    refused) echo 2 ;;
    *) echo 75 ;;
  esac
}

# The last lines of every worker's log, as far as they can be had.
show_logs() {
  worker log "$RUN_NAME" 20 || true
}
