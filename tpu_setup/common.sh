#!/usr/bin/env bash
# Sourced by the other scripts: settings from one file, checks, and commands that --dry-run prints instead.
# Written for the bash 3.2 of macOS too: no associative arrays, no mapfile, no bare expansion of an empty array.

readonly SETTINGS=(
  PROJECT ZONE TPU_NAME PROVIDER MODE WORKERS BUCKET SERVICE_ACCOUNT
  ACCELERATOR_TYPE RUNTIME_VERSION SLICES VALID_UNTIL MAX_RUN_DURATION
  MACHINE_TYPE TOPOLOGY IMAGE_FAMILY IMAGE_PROJECT
  CODE COMMIT PYTHON_VERSION UV_VERSION
  TRIES POLL_SECONDS WAIT_POLLS GRACE_POLLS STOP_SECONDS
  CLUSTER DOCKER_IMAGE
)

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CONFIG=$HERE/config.env
DRY_RUN=''
OPTIONS=' '
ARGUMENTS=()

# Ends with exit code 2: nothing was changed, and the same command will fail again.
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

note() {
  printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$*" >&2
}

# Prints the comment at the head of the script.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Takes options from the front: --config FILE, --dry-run, --help, and those named in $1. The rest goes to ARGUMENTS.
take_options() {
  local own=" $1 "
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --config)
        [ $# -ge 2 ] || die '--config needs a file'
        CONFIG=$2
        shift
        ;;
      --dry-run) DRY_RUN=yes ;;
      --help | -h)
        usage
        exit 0
        ;;
      -*)
        [ "${own#* "$1" }" != "$own" ] || die "unknown option $1; known: --config FILE, --dry-run, --help$own"
        OPTIONS="$OPTIONS$1 "
        ;;
      *) break ;;
    esac
    shift
  done
  ARGUMENTS=("$@")
}

# Whether one of the script's own options was given.
given() {
  [ "${OPTIONS#* "$1" }" != "$OPTIONS" ]
}

no_arguments() {
  [ "${#ARGUMENTS[@]}" -eq 0 ] || die "takes no arguments, got: ${ARGUMENTS[*]}"
}

# Sets RUN_NAME and COMMAND from NAME [--] COMMAND...
take_command() {
  [ $# -ge 1 ] || die 'needs a NAME for the run (--help says more)'
  RUN_NAME=$1
  local pattern='^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$'
  [[ $RUN_NAME =~ $pattern ]] || die "NAME $(printf %q "$RUN_NAME"): use letters, digits, '.', '_' and '-', at most 64"
  shift
  if [ $# -gt 0 ] && [ "$1" = -- ]; then shift; fi
  # shellcheck disable=SC2034  # read by the scripts
  COMMAND=("$@")
}

# Reads KEY=VALUE lines as data: nothing in them is expanded or run.
load_settings() {
  local line key value number=0 pattern='^([A-Z_]+)=(.*)$' blank='^[[:space:]]*(#.*)?$'
  [ -f "$CONFIG" ] || die "no settings in $CONFIG: cp $(printf %q "$HERE/config.env.example") there and fill it in"
  for key in "${SETTINGS[@]}"; do printf -v "$key" '%s' ''; done
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%$'\r'}
    if [[ $line =~ $blank ]]; then continue; fi
    [[ $line =~ $pattern ]] || die "$CONFIG:$number: not KEY=VALUE: $line"
    key=${BASH_REMATCH[1]}
    value=${BASH_REMATCH[2]}
    case " ${SETTINGS[*]} " in
      *" $key "*) ;;
      *) die "$CONFIG:$number: unknown setting $key. Known: ${SETTINGS[*]}" ;;
    esac
    case $value in
      \"*\" | \'*\') [ ${#value} -lt 2 ] || value=${value:1:${#value}-2} ;;
    esac
    printf -v "$key" '%s' "$value"
  done <"$CONFIG"
}

# What to do about a setting that is empty.
remedy() {
  case $1 in
    PROJECT) echo 'gcloud projects list' ;;
    ZONE) echo 'gcloud compute tpus locations list' ;;
    BUCKET) echo 'gcloud storage buckets list' ;;
    ACCELERATOR_TYPE) echo 'gcloud compute tpus accelerator-types list --zone=ZONE' ;;
    MACHINE_TYPE) echo "gcloud compute machine-types list --zones=ZONE --filter='name~^ct'" ;;
    IMAGE_FAMILY | IMAGE_PROJECT) echo "the image that Compute Engine's pages name for this TPU version" ;;
    COMMIT) echo 'git rev-parse HEAD' ;;
    *) echo "see config.env.example" ;;
  esac
}

# Ends unless each setting has a value; names all that have none.
require() {
  local key missing=''
  for key in "$@"; do
    if [ -z "${!key}" ]; then
      missing="$missing
  $key is empty: set it ($(remedy "$key"))"
    fi
  done
  [ -z "$missing" ] || die "$CONFIG:$missing"
}

# Ends unless setting $1 is one of the words after it.
choice() {
  local key=$1 word
  shift
  for word in "$@"; do
    if [ "${!key}" = "$word" ]; then return 0; fi
  done
  die "$CONFIG: $key is $(printf %q "${!key}"); choose one of: $*"
}

# Ends unless each setting is a whole number of at least $1.
numbers() {
  local least=$1 key pattern='^[0-9]{1,9}$'
  shift
  for key in "$@"; do
    if ! [[ ${!key} =~ $pattern ]] || [ "${!key}" -lt "$least" ]; then
      die "$CONFIG: $key is $(printf %q "${!key}"); it must be a whole number of at least $least"
    fi
  done
}

# Words as one line that a bash would read back as the same words.
quoted() {
  local word line=''
  for word in "$@"; do line="$line $(printf %q "$word")"; done
  printf '%s' "${line# }"
}

# Runs a command, or prints it under --dry-run. It gets no input: ssh would eat that of a loop around it.
run() {
  if [ -n "$DRY_RUN" ]; then
    quoted "$@"
    printf '\n'
  else
    "$@" </dev/null
  fi
}

need() {
  [ -n "$DRY_RUN" ] || command -v "$1" >/dev/null || die "$1 is not on the PATH: $2"
}

need_gcloud() {
  need gcloud 'install the Google Cloud CLI, then: gcloud auth login'
}
