#!/usr/bin/env bash
# What happens on one worker. setup_workers.sh copies this file to all of them; the other scripts call it there.
#
#   worker.sh setup CODE COMMIT PYTHON_VERSION UV_VERSION   code, environment and packages, in the home directory
#   worker.sh start NAME COMMAND...                         starts it detached; refuses while one runs
#   worker.sh stop NAME SECONDS                             SIGTERM, and SIGKILL after SECONDS
#   worker.sh state NAME                                    prints: jaxpo-worker HOST running|ended CODE|lost|none
#   worker.sh log NAME LINES                                prints the last lines of its output
#
# A run lives in ~/jaxpo_runs/NAME: pid, log, exit (its exit code) and lock, which the command holds while it runs, so
# that a process id of long ago is never mistaken for it. Nothing is written outside ~/jaxpo* and uv's own places in
# ~/.local and ~/.cache.

set -euo pipefail

CODE_DIRECTORY=$HOME/jaxpo
ENVIRONMENT=$HOME/jaxpo_environment
UV=$HOME/.local/bin/uv

# For what will go wrong again.
die() {
  printf 'worker %s: %s\n' "$(hostname)" "$*" >&2
  exit 2
}

# For what may go well another time, such as the network.
fail() {
  printf 'worker %s: %s\n' "$(hostname)" "$*" >&2
  exit 1
}

setup() {
  [ $# -eq 4 ] || die 'setup needs CODE COMMIT PYTHON_VERSION UV_VERSION'
  case $1 in
    gs://*) unpack "$1" ;;
    *) check_out "$1" "$2" ;;
  esac
  install_uv "$4" || fail "uv $4 could not be fetched"
  "$UV" venv --quiet --allow-existing --python "$3" "$ENVIRONMENT" || fail "no Python $3 by uv"
  "$UV" pip install --quiet --python "$ENVIRONMENT/bin/python" \
    --requirements "$CODE_DIRECTORY/requirements-tpu.txt" --editable "$CODE_DIRECTORY" || fail 'packages are missing'
  printf 'jaxpo-worker %s ready\n' "$(hostname)"
}

check_out() {
  if [ ! -d "$CODE_DIRECTORY/.git" ]; then git clone --quiet -- "$1" "$CODE_DIRECTORY"; fi
  git -C "$CODE_DIRECTORY" remote set-url origin "$1"
  git -C "$CODE_DIRECTORY" fetch --quiet --tags origin
  git -C "$CODE_DIRECTORY" checkout --quiet --force --detach "$2" -- || die "no commit $2 in $1: push it first"
}

unpack() {
  rm -rf "$CODE_DIRECTORY.new"
  mkdir "$CODE_DIRECTORY.new"
  gcloud storage cp "$1" "$CODE_DIRECTORY.tar.gz"
  tar -xzf "$CODE_DIRECTORY.tar.gz" -C "$CODE_DIRECTORY.new"
  [ -f "$CODE_DIRECTORY.new/pyproject.toml" ] || die "$1 has no pyproject.toml at its top: make it with git archive"
  rm -rf "$CODE_DIRECTORY"
  mv "$CODE_DIRECTORY.new" "$CODE_DIRECTORY"
}

# uv's own installer, at one version. UV_UNMANAGED_INSTALL keeps it from editing the shell's start-up files.
install_uv() {
  if [ -x "$UV" ] && [ "$("$UV" --version | cut -d' ' -f2)" = "$1" ]; then return; fi
  local installer code=0
  installer=$(mktemp)
  {
    curl --fail --silent --show-error --location --output "$installer" "https://astral.sh/uv/$1/install.sh" &&
      UV_UNMANAGED_INSTALL=${UV%/*} sh "$installer" >/dev/null
  } || code=$?
  rm -f "$installer"
  return "$code"
}

directory_of() {
  printf '%s/jaxpo_runs/%s' "$HOME" "$1"
}

# Whether the run's lock is held: by its command, or by a process that it left behind.
runs() {
  [ -f "$1/lock" ] && ! flock --nonblock --shared "$1/lock" true
}

start() {
  [ $# -ge 2 ] || die 'start needs NAME COMMAND...'
  local directory name=$1
  shift
  [ -d "$CODE_DIRECTORY" ] || die 'no code here: run setup_workers.sh first'
  directory=$(directory_of "$name")
  mkdir -p "$directory"
  exec 9>>"$directory/lock"
  flock --wait 2 9 || die "$name runs already (process $(cat "$directory/pid")): stop it first"
  rm -f "$directory/pid" "$directory/exit"
  printf '%s %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(printf '%q ' "$@")" >>"$directory/log"
  setsid bash "$0" attached "$directory" "$@" >>"$directory/log" 2>&1 </dev/null &
  local tries=0
  until [ -s "$directory/pid" ]; do
    tries=$((tries + 1))
    [ "$tries" -le 100 ] || die "$name did not start: see $directory/log"
    sleep 0.1
  done
  printf 'jaxpo-worker %s started\n' "$(hostname)"
}

# The process that outlives the connection. It inherits the lock, and so does the command.
attached() {
  local directory=$1 code=0
  shift
  # A handler, not `ignore`, which the command would inherit: SIGTERM to the group must reach it alone.
  trap : TERM
  printf '%s\n' $$ >"$directory/pid.new"
  mv "$directory/pid.new" "$directory/pid"
  cd "$CODE_DIRECTORY"
  PATH=$ENVIRONMENT/bin:$PATH "$@" || code=$?
  record "$directory" "$code"
}

record() {
  printf '%s\n' "$2" >"$1/exit.new"
  mv "$1/exit.new" "$1/exit"
}

stop() {
  [ $# -eq 2 ] || die 'stop needs NAME SECONDS'
  local directory pid tenths=0
  directory=$(directory_of "$1")
  if ! runs "$directory"; then
    state "$1"
    return
  fi
  pid=$(cat "$directory/pid")
  kill -TERM -- "-$pid" || die "$1: its lock is held, but not by its process group $pid: see $directory"
  while runs "$directory" && [ "$tenths" -lt $((10#$2 * 10)) ]; do
    tenths=$((tenths + 1))
    sleep 0.1
  done
  if runs "$directory"; then
    kill -KILL -- "-$pid" || true
    # What was killed lets go of the lock a moment later.
    flock --wait 10 --shared "$directory/lock" true || true
    record "$directory" 137
  fi
  state "$1"
}

state() {
  [ $# -eq 1 ] || die 'state needs NAME'
  local directory what=none
  directory=$(directory_of "$1")
  if runs "$directory"; then
    what=running
  elif [ -s "$directory/exit" ]; then
    what="ended $(cat "$directory/exit")"
  elif [ -s "$directory/pid" ]; then
    what=lost
  fi
  printf 'jaxpo-worker %s %s\n' "$(hostname)" "$what"
}

log() {
  [ $# -eq 2 ] || die 'log needs NAME LINES'
  local directory
  directory=$(directory_of "$1")
  [ -f "$directory/log" ] || die "no run $1 here"
  tail -n "$2" "$directory/log" | sed "s/^/$(hostname): /"
}

[ $# -ge 1 ] || die 'needs a verb: setup, start, stop, state, log'
case $1 in
  setup | start | attached | stop | state | log) "$@" ;;
  *) die "unknown verb $1: setup, start, stop, state, log" ;;
esac
