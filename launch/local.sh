#!/usr/bin/env bash
# Train with several processes on this machine.
#
#   launch/local.sh --processes 2 --config configs/tiny.py --workdir runs/tiny [--config.KEY=VALUE ...]
#   launch/local.sh --processes 8 --gpus 1 -- COMMAND ...
#
# --processes N    processes (default 1; LAUNCH_PROCESSES)
# --gpus N         GPUs of each process, from 0 on; 0 leaves each what it sees (default 0; LAUNCH_GPUS)
# --port N         coordinator's port (default: the first free one from 12321 on; LAUNCH_PORT)
# --logs DIR       write the output of process I to DIR/process-I.log (default: show it, marked [I]; LAUNCH_LOGS)
# --grace SECONDS  from SIGTERM to SIGKILL, where one of them failed (default 30; LAUNCH_GRACE)
# --dry-run        print the commands, run none
#
# SIGTERM and Ctrl-C are passed on as SIGTERM, so that the training saves; this then ends with 75. The second time they
# are SIGKILL. A training that was preempted by itself (75) is run again. When one process fails the others are ended, and
# this ends with its code.

PROGRAM=local.sh
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

PROCESSES=${LAUNCH_PROCESSES:-1}
GPUS=${LAUNCH_GPUS:-0}
PORT=${LAUNCH_PORT:-}
LOGS=${LAUNCH_LOGS:-}
GRACE=${LAUNCH_GRACE:-30}
STOPPED=0
PIDS=()

while (($#)); do
  common_flag "$@"
  if ((TAKEN)); then
    shift "$TAKEN"
    continue
  fi
  case $1 in
    --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
    --processes) PROCESSES=$(value "$@") ;;
    --gpus) GPUS=$(value "$@") ;;
    --port) PORT=$(value "$@") ;;
    --logs) LOGS=$(value "$@") ;;
    --grace) GRACE=$(value "$@") ;;
    --)
      shift
      COMMAND=("$@")
      break
      ;;
    *) bad "unknown argument $1" ;;
  esac
  shift 2
done
whole --processes "$PROCESSES" 1
whole --gpus "$GPUS" 0
whole --grace "$GRACE" 0
[[ -z $PORT ]] || whole --port "$PORT" 1
training

free_port() {
  local port
  for ((port = 12321; port < 13321; port++)); do
    (: </dev/tcp/127.0.0.1/"$port") 2>/dev/null || break
  done
  printf '%s' "$port"
}

# environment I: sets SETTINGS for process I.
environment() {
  local ids='' gpu
  SETTINGS=(
    "JAX_COORDINATOR_ADDRESS=127.0.0.1:$PORT" "JAX_NUM_PROCESSES=$PROCESSES" "JAX_PROCESS_ID=$1"
  )
  for ((gpu = $1 * GPUS; gpu < ($1 + 1) * GPUS; gpu++)); do ids+=${ids:+,}$gpu; done
  [[ -z $ids ]] || SETTINGS+=("JAX_LOCAL_DEVICE_IDS=$ids")
}

# shellcheck disable=SC2317,SC2329 # called by the trap
forward() {
  ((STOPPED < 2)) || return 0
  local signals=(TERM KILL)
  kill "-${signals[STOPPED]}" ${PIDS[@]+"${PIDS[@]}"} 2>/dev/null || true
  STOPPED=$((STOPPED + 1))
}

# once: run all processes to their end; sets OUTCOME to the verdict.
once() {
  local i pid code=0 codes=() left deadline=''
  PIDS=()
  for ((i = 0; i < PROCESSES; i++)); do
    environment "$i"
    if [[ -n $LOGS ]]; then
      env "${SETTINGS[@]}" "${TRAINING[@]}" >>"$LOGS/process-$i.log" 2>&1 &
    elif ((PROCESSES > 1)); then
      env "${SETTINGS[@]}" "${TRAINING[@]}" > >(sed -u "s/^/[$i] /") 2>&1 &
    else
      env "${SETTINGS[@]}" "${TRAINING[@]}" &
    fi
    PIDS+=("$!")
  done
  left=${#PIDS[@]}
  ((STOPPED == 0)) || kill -TERM "${PIDS[@]}" 2>/dev/null || true
  while ((left)); do
    for i in "${!PIDS[@]}"; do
      pid=${PIDS[i]}
      ! kill -0 "$pid" 2>/dev/null || continue
      code=0
      wait "$pid" || code=$?
      [[ -n $deadline ]] || codes+=("$code") # what the others are ended with says nothing
      unset "PIDS[$i]"
      left=$((left - 1))
      if ((code != 0 && code != PREEMPTED && left)) && [[ -z $deadline ]]; then
        say "process $i ended with $code; ending the others"
        kill -TERM "${PIDS[@]}" 2>/dev/null || true
        deadline=$((SECONDS + GRACE))
      fi
    done
    if [[ -n $deadline ]] && ((left && SECONDS >= deadline)); then
      kill -KILL "${PIDS[@]}" 2>/dev/null || true
    fi
    ((left == 0)) || sleep 0.2 || true
  done
  OUTCOME=$(verdict "${codes[@]}")
}

PORT=${PORT:-$(free_port)}
if ((DRY_RUN)); then
  for ((i = 0; i < PROCESSES; i++)); do
    environment "$i"
    run env "${SETTINGS[@]}" "${TRAINING[@]}"
  done
  exit
fi
[[ -z $LOGS ]] || mkdir -p -- "$LOGS"
trap forward TERM INT HUP
while true; do
  once
  case $OUTCOME in
    done) exit 0 ;;
    again)
      ((STOPPED == 0)) || exit "$PREEMPTED"
      say "preempted and saved; running again"
      ;;
    *) exit "${OUTCOME#* }" ;;
  esac
done
