#!/usr/bin/env bash
# Sourced by the other scripts: the machines of one TPU, whichever PROVIDER made them.

# Reads the settings that all need to find the machines.
load_machines() {
  load_settings
  require PROJECT ZONE TPU_NAME PROVIDER WORKERS
  choice PROVIDER queued mig
  numbers 1 WORKERS
  PLACE=(--project="$PROJECT" --zone="$ZONE")
  # A machine that was just taken away must not hold up those who ask.
  CONNECTION=(--quiet --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30)
  COPYING=(--quiet --scp-flag=-oConnectTimeout=30)
  need_gcloud
}

# The region of ZONE.
region() {
  printf '%s' "${ZONE%-*}"
}

# Prints what a query says, ABSENT where what it asks for does not exist, UNKNOWN where it was not answered.
query() {
  local said errors code=0
  errors=$(mktemp)
  said=$("$@" 2>"$errors" </dev/null) || code=$?
  if [ "$code" -eq 0 ]; then
    printf '%s\n' "$said"
  elif grep -q -e NOT_FOUND -e 'was not found' "$errors"; then
    printf 'ABSENT\n'
  else
    cat "$errors" >&2
    printf 'UNKNOWN\n'
  fi
  rm -f "$errors"
}

# Prints ABSENT, WAITING_FOR_RESOURCES, PROVISIONING, ACTIVE, SUSPENDING, SUSPENDED, FAILED, UNKNOWN, or another word of
# the API.
machines_state() {
  local question said
  if [ "$PROVIDER" = queued ]; then
    question=(gcloud compute tpus queued-resources describe "$TPU_NAME" "${PLACE[@]}" --format='value(state.state)')
  else
    question=(gcloud compute instance-groups managed list-instances "$TPU_NAME" "${PLACE[@]}"
      --format='value(instanceStatus)')
  fi
  if [ -n "$DRY_RUN" ]; then
    run "${question[@]}"
    return
  fi
  said=$(query "${question[@]}")
  if [ "$PROVIDER" = queued ]; then printf '%s\n' "$said"; else group_state "$said"; fi
}

# The same words for the machines of a group: all run, or one was taken away, or they are still being made.
group_state() {
  local word running=0
  for word in $1; do
    case $word in
      ABSENT | UNKNOWN)
        printf '%s\n' "$word"
        return
        ;;
      STOPPING | STOPPED | SUSPENDING | SUSPENDED | TERMINATED | DEPROVISIONING)
        printf 'SUSPENDED\n'
        return
        ;;
      RUNNING) running=$((running + 1)) ;;
    esac
  done
  if [ "$running" -ge "$WORKERS" ]; then printf 'ACTIVE\n'; else printf 'PROVISIONING\n'; fi
}

# The names of a group's machines, one a line.
group_machines() {
  if [ -n "$DRY_RUN" ]; then
    printf 'EACH_MACHINE\n'
  else
    gcloud compute instance-groups managed list-instances "$TPU_NAME" "${PLACE[@]}" \
      --format='value(instance.basename())' </dev/null
  fi
}

# Runs one command line on all machines at once. Fails if it failed on one of them, or if one could not be reached.
on_workers() {
  if [ "$PROVIDER" = queued ]; then
    run gcloud compute tpus queued-resources ssh "$TPU_NAME" "${PLACE[@]}" "${CONNECTION[@]}" \
      --node=all --worker=all --command="$1"
  else
    on_each gcloud compute ssh MACHINE "${PLACE[@]}" "${CONNECTION[@]}" --command="$1"
  fi
}

# Copies one file into the home directory of all machines.
copy_to_workers() {
  if [ "$PROVIDER" = queued ]; then
    run gcloud compute tpus queued-resources scp "$1" "$TPU_NAME:$2" "${PLACE[@]}" "${COPYING[@]}" \
      --node=all --worker=all
  else
    on_each gcloud compute scp "$1" "MACHINE:$2" "${PLACE[@]}" "${COPYING[@]}"
  fi
}

# Runs a command once for each machine of a group, side by side; the words MACHINE and MACHINE:... get its name.
on_each() {
  local machine machines process word worst=0 code words processes=''
  machines=$(group_machines) || return
  for machine in $machines; do
    words=()
    for word in "$@"; do
      case $word in
        MACHINE | MACHINE:*) words+=("$machine${word#MACHINE}") ;;
        *) words+=("$word") ;;
      esac
    done
    run "${words[@]}" &
    processes="$processes $!"
  done
  for process in $processes; do
    code=0
    wait "$process" || code=$?
    if [ "$code" -gt "$worst" ]; then worst=$code; fi
  done
  return "$worst"
}

# Ends unless BUCKET can be asked for and is where the TPU is: what crosses regions is slow and paid for.
check_bucket() {
  local place question=(gcloud storage buckets describe "gs://$BUCKET" --project="$PROJECT" --format='value(location)')
  require BUCKET
  if [ -n "$DRY_RUN" ]; then
    run "${question[@]}"
    return
  fi
  place=$(query "${question[@]}" | tr '[:upper:]' '[:lower:]')
  case $place in
    "$(region)") ;;
    absent)
      die "gs://$BUCKET does not exist:" \
        "$(quoted gcloud storage buckets create "gs://$BUCKET" --project="$PROJECT" --location="$(region)")"
      ;;
    *-*) die "gs://$BUCKET is in $place, the TPU in $(region): take a bucket there" ;;
    *) note "gs://$BUCKET: location $place" ;;
  esac
}

# Runs a verb of worker.sh on all machines.
worker() {
  on_workers "$(quoted bash jaxpo_worker.sh "$@")"
}
