#!/usr/bin/env bash
# Train with several processes on this machine.
#
#   launch/local.sh --processes 2 --config configs/tiny.py --workdir runs/tiny [--config.KEY=VALUE ...]
#   launch/local.sh --processes 8 --gpus 1 -- COMMAND ...
#
# --config F --workdir DIR  of the training (LAUNCH_CONFIG, LAUNCH_WORKDIR)
# --processes N    processes (default 1; LAUNCH_PROCESSES)
# --gpus N         GPUs of each process, the first of those that CUDA_VISIBLE_DEVICES names, or of all; 0 leaves each what
#                  it sees (default 0; LAUNCH_GPUS)
# --port N         coordinator's port (default: the first free one from 12321 on; LAUNCH_PORT)
# --logs DIR       write the output of process I to DIR/process-I.log (default: show it, marked [I]; LAUNCH_LOGS)
# --grace SECONDS  from SIGTERM to SIGKILL, where one of them failed (default 30; LAUNCH_GRACE)
# --dry-run        print the commands, run none
#
# SIGTERM and Ctrl-C are passed on as SIGTERM, so that the training saves; this then ends with 75. The second time they
# are SIGKILL. A training that was preempted by itself (75) is run again. When one process fails the others are ended, and
# this ends with its code.

_program=local.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

_processes=${LAUNCH_PROCESSES:-1}
_gpus=${LAUNCH_GPUS:-0}
_port=${LAUNCH_PORT:-}
_logs=${LAUNCH_LOGS:-}
_grace=${LAUNCH_GRACE:-30}
_stopped=0
_pids=()

while (($#)); do
  common_flag "$@"
  if ((_taken)); then
    shift "$_taken"
    continue
  fi
  case $1 in
    --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
    --processes) _processes=$(value "$@") ;;
    --gpus) _gpus=$(value "$@") ;;
    --port) _port=$(value "$@") ;;
    --logs) _logs=$(value "$@") ;;
    --grace) _grace=$(value "$@") ;;
    --)
      shift
      _command=("$@")
      break
      ;;
    *) bad "unknown argument $1" ;;
  esac
  shift 2
done
whole --processes "$_processes" 1
whole --gpus "$_gpus" 0
whole --grace "$_grace" 0
[[ -z $_port ]] || whole --port "$_port" 1
if ((_gpus)) && [[ -n ${CUDA_VISIBLE_DEVICES+x} ]]; then
  IFS=, read -ra _visible <<<"$CUDA_VISIBLE_DEVICES"
  ((_processes * _gpus <= ${#_visible[@]})) ||
    bad "--gpus $_gpus: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names ${#_visible[@]}; give fewer, or unset it"
fi
training

free_port() {
  local port
  for ((port = 12321; port < 13321; port++)); do
    (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null || break
  done
  printf '%s' "$port"
}

# environment I: sets _settings for process I.
environment() {
  local ids='' gpu
  _settings=(
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$_port" "JAX_NUM_PROCESSES=$_processes" "JAX_PROCESS_ID=$1"
  )
  for ((gpu = $1 * _gpus; gpu < ($1 + 1) * _gpus; gpu++)); do ids+=${ids:+,}$gpu; done
  if [[ -n $ids ]] && ((_processes == 1)); then
    # jax reads the ids, which count the visible ones, for several processes alone.
    [[ -z ${CUDA_VISIBLE_DEVICES+x} ]] || ids=$(cut -d, "-f1-$_gpus" <<<"$CUDA_VISIBLE_DEVICES")
    _settings+=("CUDA_VISIBLE_DEVICES=$ids")
  elif [[ -n $ids ]]; then
    _settings+=("JAX_LOCAL_DEVICE_IDS=$ids")
  fi
}

# shellcheck disable=SC2317,SC2329 # called by the trap
forward() {
  ((_stopped < 2)) || return 0
  local signals=(TERM KILL)
  kill "-${signals[_stopped]}" ${_pids[@]+"${_pids[@]}"} 2>/dev/null || true
  _stopped=$((_stopped + 1))
}

# once: run all processes to their end; sets _outcome to the verdict.
once() {
  local _i _pid _code=0 _codes=() _left _deadline=''
  _pids=()
  for ((_i = 0; _i < _processes; _i++)); do
    environment "$_i"
    if [[ -n $_logs ]]; then
      env "${_settings[@]}" "${_training[@]}" >>"$_logs/process-$_i.log" 2>&1 &
    elif ((_processes > 1)); then
      env "${_settings[@]}" "${_training[@]}" > >(sed -u "s/^/[$_i] /") 2>&1 &
    else
      env "${_settings[@]}" "${_training[@]}" &
    fi
    _pids+=("$!")
  done
  _left=${#_pids[@]}
  ((_stopped == 0)) || kill -TERM "${_pids[@]}" 2>/dev/null || true
  while ((_left)); do
    for _i in "${!_pids[@]}"; do
      _pid=${_pids[_i]}
      ! kill -0 "$_pid" 2>/dev/null || continue
      _code=0
      wait "$_pid" || _code=$?
      [[ -n $_deadline ]] || _codes+=("$_code") # what the others are ended with says nothing
      unset "_pids[$_i]"
      _left=$((_left - 1))
      if ((_code != 0 && _code != _preempted && _left)) && [[ -z $_deadline ]]; then
        say "process $_i ended with $_code; ending the others"
        kill -TERM "${_pids[@]}" 2>/dev/null || true
        _deadline=$((SECONDS + _grace))
      fi
    done
    if [[ -n $_deadline ]] && ((_left && SECONDS >= _deadline)); then
      kill -KILL "${_pids[@]}" 2>/dev/null || true
    fi
    ((_left == 0)) || sleep 0.2 || true
  done
  _outcome=$(verdict "${_codes[@]}")
}

_port=${_port:-$(free_port)}
if ((_dry_run)); then
  for ((_i = 0; _i < _processes; _i++)); do
    environment "$_i"
    run env "${_settings[@]}" "${_training[@]}"
  done
  exit
fi
[[ -z $_logs ]] || mkdir -p -- "$_logs"
trap forward TERM INT HUP
while true; do
  once
  case $_outcome in
    done) exit 0 ;;
    again)
      ((_stopped == 0)) || exit "$_preempted"
      say "preempted and saved; running again"
      ;;
    *) exit "${_outcome#* }" ;;
  esac
done
