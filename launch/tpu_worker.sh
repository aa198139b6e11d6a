#!/usr/bin/env bash
# The part of tpu_vm.sh that runs on each worker; copied there.
#
#   tpu_worker.sh install NAME VERSION SETUP   unpack refine-jax-NAME.tar.gz, make its environment
#   tpu_worker.sh start NAME COMMAND ...       run in the background; a run that is there continues
#   tpu_worker.sh status NAME                  one line: worker HOST absent|ready|running|ended [CODE]
#   tpu_worker.sh stop NAME [TERM|KILL]        pass a signal on
#   tpu_worker.sh log NAME                     follow the output, to the end of the run

set -euo pipefail

ACTION=${1:?action}
NAME=${2:?name}
shift 2
HOME_OF_RUN=$HOME/refine-jax/$NAME
mkdir -p "$HOME_OF_RUN"

# Whoever holds this lock is the run, or a child of it: a number in a file may be another process by now.
locked() { ! flock -n "$HOME_OF_RUN/lock" true; }

environment() {
  local python
  for python in python3.13 python3.12 python3.11 python3; do
    if "$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      "$python" -m venv "$HOME_OF_RUN/venv"
      return
    fi
  done
  # The images' own Python is older than what is needed; uv brings one.
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python 3.12 "$HOME_OF_RUN/venv"
}

install() {
  local version=$1 setup=$2
  # The preparation (a mount, say) is for this boot of the machine; the rest lasts.
  [[ -z $setup ]] || bash -euo pipefail -c "$setup"
  if [[ $(cat "$HOME_OF_RUN/installed" 2>/dev/null) == "$version" ]]; then
    echo "$(hostname): $version is installed"
    return
  fi
  if locked; then
    echo "$(hostname): a run is going on; stop it before installing another version" >&2
    exit 2
  fi
  rm -rf "$HOME_OF_RUN/installed" "$HOME_OF_RUN/source"
  mkdir "$HOME_OF_RUN/source"
  tar -xzf "$HOME/refine-jax-$NAME.tar.gz" -C "$HOME_OF_RUN/source"
  [[ -x $HOME_OF_RUN/venv/bin/python ]] || environment
  "$HOME_OF_RUN/venv/bin/python" -m pip install --quiet -e "$HOME_OF_RUN/source[tpu,watch]"
  printf '%s\n' "$version" >"$HOME_OF_RUN/installed"
  echo "$(hostname): installed $version"
}

start() {
  [[ -f $HOME_OF_RUN/installed ]] || { echo "$(hostname): nothing is installed" >&2 && exit 2; }
  exec 9>"$HOME_OF_RUN/lock"
  if ! flock -n 9; then
    echo "$(hostname): already running"
    return
  fi
  rm -f "$HOME_OF_RUN/code" "$HOME_OF_RUN/pid"
  # 9, the lock, goes to the run and to all that it starts.
  setsid nohup bash "${BASH_SOURCE[0]}" _run "$NAME" "$@" </dev/null >>"$HOME_OF_RUN/log" 2>&1 &
  echo "$!" >"$HOME_OF_RUN/pid"
  echo "$(hostname): started"
}

# The run itself, in a session of its own.
_run() {
  local child code asked=0
  cd "$HOME_OF_RUN/source"
  PATH=$HOME_OF_RUN/venv/bin:$PATH PYTHONUNBUFFERED=1 "$@" &
  child=$!
  trap 'asked=1; kill -TERM "$child" 2>/dev/null || true' TERM
  while true; do
    code=0
    wait "$child" || code=$?
    ((asked)) || break
    asked=0 # the signal ended the wait, not the child
  done
  echo "$code" >"$HOME_OF_RUN/code.partial"
  mv "$HOME_OF_RUN/code.partial" "$HOME_OF_RUN/code"
}

status() {
  local state=ready code=''
  if locked; then
    state=running
  elif [[ -f $HOME_OF_RUN/code ]]; then
    state=ended code=$(<"$HOME_OF_RUN/code")
  elif [[ -f $HOME_OF_RUN/pid ]]; then
    state=ended code=137 # ended without a word
  elif [[ ! -f $HOME_OF_RUN/installed ]]; then
    state=absent
  fi
  printf 'worker %s %s%s\n' "$(hostname)" "$state" "${code:+ $code}"
}

stop() {
  locked || return 0
  if [[ ${1:-TERM} == KILL ]]; then
    kill -KILL -- "-$(<"$HOME_OF_RUN/pid")" 2>/dev/null || true # its whole session
  else
    kill -TERM "$(<"$HOME_OF_RUN/pid")" 2>/dev/null || true
  fi
}

log() {
  touch "$HOME_OF_RUN/log"
  if locked; then
    tail -n 100 -F --pid="$(<"$HOME_OF_RUN/pid")" "$HOME_OF_RUN/log"
  else
    tail -n 100 "$HOME_OF_RUN/log"
  fi
}

case $ACTION in
  install | start | _run | status | stop | log) "$ACTION" "$@" ;;
  *) echo "tpu_worker.sh: unknown action $ACTION" >&2 && exit 2 ;;
esac
