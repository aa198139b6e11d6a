#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on each worker; copied there.
#
#   tpu_worker.sh install NAME VERSION SETUP   unpack refine-jax-NAME.tar.gz, make its environment
#   tpu_worker.sh start NAME COMMAND ...       run in the background; a run that is there continues
#   tpu_worker.sh again NAME COMMAND ...       start, unless it was told to stop since the last start
#   tpu_worker.sh status NAME                  one line: worker HOST absent|ready|running|ended [CODE][, told to stop]
#   tpu_worker.sh stop NAME                    SIGTERM; a mark stays, until the next start
#   tpu_worker.sh kill NAME                    SIGKILL
#   tpu_worker.sh log NAME                     follow the output, to the end of the run

set -euo pipefail

_action=${1:?action}
_name=${2:?name}
shift 2
_home=$HOME/refine-jax/$_name
mkdir -p "$_home"

# Whoever holds this lock is the run, or a child of it: a number in a file may be another process by now.
locked() { ! flock -n "$_home/lock" true; }

environment() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv "$_home/venv"
      return
    fi
  done
  # The images' own Python is older than what is needed; uv brings one.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.12 "$_home/venv"
}

# attempt WHAT COMMAND...: where it fails, one line that tpu_vm.sh knows (ssh to many gives no code to rely on), and the
# last lines of its output.
attempt() {
  local _what=$1
  shift
  ! "$@" >"$_home/$_what.log" 2>&1 || return 0
  echo "worker $(hostname) failed $_what"
  tail -n 10 "$_home/$_what.log" | sed "s/^/$(hostname): /"
  exit 2
}

install() {
  local _version=$1 _setup=$2
  # The preparation (a mount, say) is for this boot of the machine; the rest lasts.
  [[ -z $_setup ]] || attempt setup bash -euo pipefail -c "$_setup"
  if [[ $(cat "$_home/installed" 2>/dev/null) == "$_version" ]]; then
    echo "$(hostname): $_version is installed"
    return
  fi
  attempt installation bash "${BASH_SOURCE[0]}" _install "$_name" "$_version"
  echo "$(hostname): installed $_version"
}

_install() {
  if locked; then
    echo "a run is going on; stop it before installing another version"
    exit 2
  fi
  rm -rf "$_home/installed" "$_home/source"
  mkdir "$_home/source"
  tar -xzf "$HOME/refine-jax-$_name.tar.gz" -C "$_home/source"
  [[ -x $_home/venv/bin/python ]] || environment
  "$_home/venv/bin/python" -m pip install --quiet -e "$_home/source[tpu,watch,parquet,data]"
  printf '%s\n' "$1" >"$_home/installed"
}

start() {
  [[ -f $_home/installed ]] || { echo "$(hostname): nothing is installed" >&2 && exit 2; }
  rm -f "$_home/stop"
  exec 9>"$_home/lock"
  if ! flock -n 9; then
    echo "$(hostname): already running"
    return
  fi
  rm -f "$_home/code" "$_home/pid"
  # 9, the lock, goes to the run and to all that it starts.
  setsid nohup bash "${BASH_SOURCE[0]}" _run "$_name" "$@" </dev/null >>"$_home/log" 2>&1 &
  echo "$!" >"$_home/pid"
  echo "$(hostname): started"
}

again() {
  if [[ -e $_home/stop ]]; then
    echo "$(hostname): told to stop"
  else
    start "$@"
  fi
}

# The run itself, in a session of its own.
_run() {
  local _child _code _asked=0
  cd "$_home/source"
  PATH=$_home/venv/bin:$PATH PYTHONUNBUFFERED=1 "$@" &
  _child=$!
  trap '_asked=1; kill -TERM "$_child" 2>/dev/null || true' TERM
  while true; do
    _code=0
    wait "$_child" || _code=$?
    ((_asked)) || break
    _asked=0 # the signal ended the wait, not the child
  done
  echo "$_code" >"$_home/code.partial"
  mv "$_home/code.partial" "$_home/code"
}

status() {
  local state=ready code='' told=''
  [[ ! -e $_home/stop ]] || told=', told to stop'
  if locked; then
    state=running
  elif [[ -f $_home/code ]]; then
    state=ended code=$(<"$_home/code")
  elif [[ -f $_home/pid ]]; then
    state=ended code=137 # ended without a word
  elif [[ ! -f $_home/installed ]]; then
    state=absent
  fi
  printf 'worker %s %s%s%s\n' "$(hostname)" "$state" "${code:+ $code}" "$told"
}

stop() {
  touch "$_home/stop" # also where nothing runs: a resume may be about to start it again
  ! locked || kill -TERM "$(<"$_home/pid")" 2>/dev/null || true
}

kill_all() {
  ! locked || kill -KILL -- "-$(<"$_home/pid")" 2>/dev/null || true # its whole session
}

log() {
  touch "$_home/log"
  if locked; then
    tail -n 100 -F --pid="$(<"$_home/pid")" "$_home/log"
  else
    tail -n 100 "$_home/log"
  fi
}

case $_action in
  install | _install | start | again | _run | status | stop | log) "$_action" "$@" ;;
  kill) kill_all ;;
  *) echo "tpu_worker.sh: unknown action $_action" >&2 && exit 2 ;;
esac
