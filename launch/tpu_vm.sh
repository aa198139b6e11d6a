#!/usr/bin/env bash
# Train on TPU VMs: one slice or several, by queued resources.
#
#   launch/tpu_vm.sh resume --name NAME --zone ZONE --accelerator v6e-16 [--spot] \
#       --config configs/X.py --workdir DIR [--config.KEY=VALUE ...]
#
# resume   from whatever there is to a training that runs: create, install, run, wait; again after each preemption
# create   request the TPUs and wait for them; one that is there is taken, one that was preempted is requested again
# install  copy this checkout to all workers and install it there; what is installed stays
# run      start the training on all workers, in the background; one that runs goes on
# logs     follow the output of the first worker
# status   the state of the TPUs and of each worker
# stop     SIGTERM on all workers: the training saves and ends with 75
# delete   give the TPUs back; gone is fine
#
# --name NAME             of the queued resource and its nodes (LAUNCH_NAME)
# --zone ZONE             (LAUNCH_ZONE)            --project PROJECT  default: gcloud's (LAUNCH_PROJECT)
# --accelerator TYPE      such as v5litepod-64, v5p-32 or v6e-16 (LAUNCH_ACCELERATOR)
# --slices N              slices of that type (default 1; LAUNCH_SLICES)
# --runtime VERSION       image of the VMs (default: the type's; LAUNCH_RUNTIME)
# --spot, --reserved      the kind of capacity (default: on demand)
# --setup COMMAND         run on every worker before each start, such as the mount of a shared disk (LAUNCH_SETUP)
# --create-flag FLAG      one more flag of queued-resources create; repeatable
# --ssh-flag FLAG         one more flag of queued-resources ssh and scp, such as --tunnel-through-iap; repeatable
# --poll SECONDS          between two looks (default 30; LAUNCH_POLL)
# --max-restarts N        of a crash; preemptions do not count (default 5; LAUNCH_MAX_RESTARTS)
# --dry-run               print the commands, run none; assumes that nothing is there and all goes well
# -- COMMAND ...          run this on all workers instead of refine-jax train
#
# Several workers need the key in an agent: ssh-add ~/.ssh/google_compute_engine

PROGRAM=tpu_vm.sh
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$HERE/common.sh"

NAME=${LAUNCH_NAME:-}
ZONE=${LAUNCH_ZONE:-}
PROJECT=${LAUNCH_PROJECT:-}
ACCELERATOR=${LAUNCH_ACCELERATOR:-}
SLICES=${LAUNCH_SLICES:-1}
RUNTIME=${LAUNCH_RUNTIME:-}
SETUP=${LAUNCH_SETUP:-}
POLL=${LAUNCH_POLL:-30}
MAX_RESTARTS=${LAUNCH_MAX_RESTARTS:-5}
CAPACITY=()
CREATE_FLAGS=()
SSH_FLAGS=()

ACTION=${1:-}
case $ACTION in
  --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
  resume | create | install | run | logs | status | stop | delete) shift ;;
  *) bad "${ACTION:-nothing}: say what to do: resume, create, install, run, logs, status, stop or delete" ;;
esac
while (($#)); do
  common_flag "$@"
  if ((TAKEN)); then
    shift "$TAKEN"
    continue
  fi
  case $1 in
    --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
    --name) NAME=$(value "$@") ;;
    --zone) ZONE=$(value "$@") ;;
    --project) PROJECT=$(value "$@") ;;
    --accelerator) ACCELERATOR=$(value "$@") ;;
    --slices) SLICES=$(value "$@") ;;
    --runtime) RUNTIME=$(value "$@") ;;
    --setup) SETUP=$(value "$@") ;;
    --create-flag) CREATE_FLAGS+=("$(value "$@")") ;;
    --ssh-flag) SSH_FLAGS+=("$(value "$@")") ;;
    --poll) POLL=$(value "$@") ;;
    --max-restarts) MAX_RESTARTS=$(value "$@") ;;
    --spot | --reserved)
      CAPACITY=("$1")
      shift
      continue
      ;;
    --)
      shift
      COMMAND=("$@")
      break
      ;;
    *) bad "unknown argument $1" ;;
  esac
  shift 2
done
name --name "$NAME"
one_word --zone "$ZONE"
[[ -z $PROJECT ]] || one_word --project "$PROJECT"
whole --slices "$SLICES" 1
whole --poll "$POLL" 0
whole --max-restarts "$MAX_RESTARTS" 0
if [[ $ACTION == resume || $ACTION == create ]]; then
  one_word --accelerator "$ACCELERATOR"
  case $ACCELERATOR in
    v5litepod-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
    v5p-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
    v6e-*) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
    *) [[ -n $RUNTIME ]] || bad "--accelerator $ACCELERATOR: no image is known for it; give --runtime too" ;;
  esac
fi
if [[ $ACTION == resume || $ACTION == run ]]; then training; fi
need gcloud "install the Google Cloud CLI and run gcloud init"
WHERE=("--zone=$ZONE" ${PROJECT:+"--project=$PROJECT"})

resources() { run gcloud compute tpus queued-resources "$@"; }

# state ASSUMED: sets STATE to the state of the queued resource, GONE where there is none.
state() {
  local answer tries=0
  while true; do
    if ((DRY_RUN)); then
      ask STATE "$1" gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)'
      return
    fi
    if answer=$(gcloud compute tpus queued-resources describe "$NAME" "${WHERE[@]}" '--format=value(state.state)' 2>&1)
    then
      STATE=$(tail -n 1 <<<"$answer")
      return
    elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
      STATE=GONE
      return
    fi
    tries=$((tries + 1))
    # The network may come back; a permission does not.
    if ((tries >= 5)) || [[ $answer == *PERMISSION_DENIED* || $answer == *"gcloud auth login"* ]]; then
      die "$FAILED" "gcloud cannot describe $NAME: $(grep -v '^$' <<<"$answer" | head -n 1)"
    fi
    pause "$POLL"
  done
}

# remote WHICH ARG...: tpu_worker.sh on the workers: all, or the first.
remote() {
  local which=$1
  shift
  resources ssh "$NAME" "${WHERE[@]}" "--node=$which" "--worker=$which" --quiet ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} \
    "--command=$(quoted bash tpu_worker.sh "$@")"
}

create() {
  local nodes=(--node-id="$NAME") fresh=0
  ((SLICES == 1)) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  state GONE
  while true; do
    case $STATE in
      ACTIVE) return ;;
      GONE)
        fresh=1
        resources create "$NAME" "${WHERE[@]}" "--accelerator-type=$ACCELERATOR" "--runtime-version=$RUNTIME" \
          "${nodes[@]}" ${CAPACITY[@]+"${CAPACITY[@]}"} ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"} --quiet
        ;;
      SUSPENDED | FAILED)
        if [[ $STATE == FAILED ]] && ((fresh)); then
          die "$FAILED" "the request for $NAME failed; see why: gcloud compute tpus queued-resources describe $NAME"
        fi
        say "$NAME is $STATE; giving it back and asking again"
        resources delete "$NAME" "${WHERE[@]}" --force --quiet || true # the next look says whether it is gone
        ;;
      *) say "$NAME is $STATE; waiting" && pause "$POLL" ;;
    esac
    state ACTIVE
  done
}

install() {
  local version cache=${XDG_CACHE_HOME:-$HOME/.cache}/refine-jax
  version=$(git -C "$HERE" rev-parse --verify --quiet HEAD) ||
    die "$BAD_INPUT" "$HERE is in no git checkout; clone the repository and launch from there"
  git -C "$HERE/.." diff --quiet HEAD -- || say "what is not committed is not sent to the workers"
  # In an `if`, as resume calls this, bash would go on after a failure.
  run mkdir -p "$cache" &&
    run git -C "$HERE/.." archive --format=tar.gz -o "$cache/refine-jax-$NAME.tar.gz" "$version" &&
    resources scp "$HERE/tpu_worker.sh" "$cache/refine-jax-$NAME.tar.gz" "$NAME:" "${WHERE[@]}" --node=all \
      --worker=all --quiet ${SSH_FLAGS[@]+"${SSH_FLAGS[@]}"} &&
    remote all install "$NAME" "$version" "$SETUP"
}

# workers: sets RUNNING to how many run, CODES to what the others ended with; fails where they cannot be asked.
workers() {
  local answer line
  RUNNING=0 CODES=()
  if ((DRY_RUN)); then
    remote all status "$NAME"
    CODES=(0)
    return
  fi
  answer=$(remote all status "$NAME") || return
  while read -r line; do
    [[ $line =~ worker\ [^\ ]+\ (absent|ready|running|ended)(\ ([0-9]+))? ]] || continue
    case ${BASH_REMATCH[1]} in
      running) RUNNING=$((RUNNING + 1)) ;;
      ended) CODES+=("${BASH_REMATCH[3]}") ;;
      *) CODES+=(255) ;; # a new machine in the place of the old one
    esac
  done <<<"$answer"
  ((RUNNING + ${#CODES[@]}))
}

# watch: wait for the end of the run; sets OUTCOME to the verdict, or to lost where the TPUs went.
watch() {
  local silent=0 failed=0
  while true; do
    if workers; then
      silent=0
      if ((RUNNING == 0)); then
        # A worker may fail because its neighbour is being taken away: look again before believing it.
        OUTCOME=$(verdict "${CODES[@]}")
        if [[ $OUTCOME != 'done' ]]; then
          pause "$POLL"
          state ACTIVE
          [[ $STATE == ACTIVE ]] || OUTCOME=lost
        fi
        return
      elif ((${#CODES[@]})) && [[ $(verdict "${CODES[@]}") != 'done' ]]; then
        failed=$((failed + 1))
        # The others find out within two minutes, by jax's heartbeat; else they never will.
        if ((failed == 10)); then remote all stop "$NAME" KILL || true; fi
      fi
    else
      silent=$((silent + 1))
      if ((silent == 10)); then
        OUTCOME='crash 255'
        return
      fi
    fi
    state ACTIVE
    if [[ $STATE != ACTIVE ]]; then
      OUTCOME=lost
      return
    fi
    pause "$POLL"
  done
}

resume() {
  local crashes=0
  while true; do
    create
    if install && remote all start "$NAME" "${TRAINING[@]}"; then
      watch
    else
      OUTCOME='crash 255'
      state ACTIVE
      [[ $STATE == ACTIVE ]] || OUTCOME=lost
    fi
    case $OUTCOME in
      done) break ;;
      lost) say "$NAME was preempted; asking for it again" ;;
      again) say "the training was preempted and saved; running it again" ;;
      stop*) die "${OUTCOME#* }" "the training ended with ${OUTCOME#* }; see $PROGRAM logs --name $NAME --zone $ZONE" ;;
      crash*)
        crashes=$((crashes + 1))
        if ((crashes > MAX_RESTARTS)); then
          die "$FAILED" "the training ended with ${OUTCOME#* }, $crashes times; see $PROGRAM logs --name $NAME --zone $ZONE"
        fi
        say "the training ended with ${OUTCOME#* }; running it again ($crashes of $MAX_RESTARTS)"
        pause "$POLL"
        ;;
    esac
  done
  say "finished; give the TPUs back with $PROGRAM delete --name $NAME --zone $ZONE"
}

case $ACTION in
  resume | create | install) "$ACTION" ;;
  run) remote all start "$NAME" "${TRAINING[@]}" ;;
  logs) remote 0 log "$NAME" ;;
  stop) remote all stop "$NAME" ;;
  status)
    state ACTIVE
    ((DRY_RUN)) || echo "$NAME $STATE"
    [[ $STATE != ACTIVE ]] || remote all status "$NAME"
    ;;
  delete)
    state ACTIVE
    [[ $STATE == GONE ]] || resources delete "$NAME" "${WHERE[@]}" --force --quiet
    ;;
esac
