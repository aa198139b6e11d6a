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
# stop     SIGTERM on all workers: the training saves and ends with 75; so does a resume that waits for it, anywhere
# delete   give the TPUs back; gone is fine
#
# --config F --workdir DIR  of the training (LAUNCH_CONFIG, LAUNCH_WORKDIR)
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

_program=tpu_vm.sh
_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$_here/common.sh"

_name=${LAUNCH_NAME:-}
_zone=${LAUNCH_ZONE:-}
_project=${LAUNCH_PROJECT:-}
_accelerator=${LAUNCH_ACCELERATOR:-}
_slices=${LAUNCH_SLICES:-1}
_runtime=${LAUNCH_RUNTIME:-}
_setup=${LAUNCH_SETUP:-}
_poll=${LAUNCH_POLL:-30}
_max_restarts=${LAUNCH_MAX_RESTARTS:-5}
_capacity=()
_create_flags=()
_ssh_flags=()

_action=${1:-}
case $_action in
  --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
  resume | create | install | run | logs | status | stop | delete) shift ;;
  *) bad "${_action:-nothing}: say what to do: resume, create, install, run, logs, status, stop or delete" ;;
esac
while (($#)); do
  common_flag "$@"
  if ((_taken)); then
    shift "$_taken"
    continue
  fi
  case $1 in
    --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
    --name) _name=$(value "$@") ;;
    --zone) _zone=$(value "$@") ;;
    --project) _project=$(value "$@") ;;
    --accelerator) _accelerator=$(value "$@") ;;
    --slices) _slices=$(value "$@") ;;
    --runtime) _runtime=$(value "$@") ;;
    --setup) _setup=$(value "$@") ;;
    --create-flag) _create_flags+=("$(value "$@")") ;;
    --ssh-flag) _ssh_flags+=("$(value "$@")") ;;
    --poll) _poll=$(value "$@") ;;
    --max-restarts) _max_restarts=$(value "$@") ;;
    --spot | --reserved)
      _capacity=("$1")
      shift
      continue
      ;;
    --)
      shift
      _command=("$@")
      break
      ;;
    *) bad "unknown argument $1" ;;
  esac
  shift 2
done
name --name "$_name"
one_word --zone "$_zone"
[[ -z $_project ]] || one_word --project "$_project"
whole --slices "$_slices" 1
whole --poll "$_poll" 0
whole --max-restarts "$_max_restarts" 0
if [[ $_action == resume || $_action == create ]]; then
  one_word --accelerator "$_accelerator"
  case $_accelerator in
    v5litepod-*) _runtime=${_runtime:-v2-alpha-tpuv5-lite} ;;
    v5p-*) _runtime=${_runtime:-v2-alpha-tpuv5} ;;
    v6e-*) _runtime=${_runtime:-v2-alpha-tpuv6e} ;;
    *) [[ -n $_runtime ]] || bad "--accelerator $_accelerator: no image is known for it; give --runtime too" ;;
  esac
fi
if [[ $_action == resume || $_action == run ]]; then training; fi
need gcloud "install the Google Cloud CLI and run gcloud init"
_where=("--zone=$_zone" ${_project:+"--project=$_project"})

resources() { run gcloud compute tpus queued-resources "$@"; }

# state ASSUMED: sets _state to the state of the queued resource, GONE where there is none.
state() {
  local answer tries=0 describe
  describe=(gcloud compute tpus queued-resources describe "$_name" "${_where[@]}" '--format=value(state.state)')
  while true; do
    if ((_dry_run)); then
      ask _state "$1" "${describe[@]}"
      return
    fi
    if answer=$("${describe[@]}" 2>&1); then
      _state=$(tail -n 1 <<<"$answer")
      return
    elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
      _state=GONE
      return
    fi
    tries=$((tries + 1))
    # The network may come back; a permission does not.
    if ((tries >= 5)) || [[ $answer == *PERMISSION_DENIED* || $answer == *"gcloud auth login"* ]]; then
      die "$_failed" "gcloud cannot describe $_name: $(grep -v '^$' <<<"$answer" | head -n 1)"
    fi
    pause "$_poll"
  done
}

# remote WHICH ARG...: tpu_worker.sh on the workers: all, or the first.
remote() {
  local which=$1
  shift
  resources ssh "$_name" "${_where[@]}" "--node=$which" "--worker=$which" --quiet ${_ssh_flags[@]+"${_ssh_flags[@]}"} \
    "--command=$(quoted bash tpu_worker.sh "$@")"
}

create() {
  local nodes=(--node-id="$_name") fresh=0
  ((_slices == 1)) || nodes=(--node-count="$_slices" --node-prefix="$_name")
  state GONE
  while true; do
    case $_state in
      ACTIVE) return ;;
      GONE)
        fresh=1
        resources create "$_name" "${_where[@]}" "--accelerator-type=$_accelerator" "--runtime-version=$_runtime" \
          "${nodes[@]}" ${_capacity[@]+"${_capacity[@]}"} ${_create_flags[@]+"${_create_flags[@]}"} --quiet
        ;;
      SUSPENDED | FAILED)
        if [[ $_state == FAILED ]] && ((fresh)); then
          die "$_failed" "the request for $_name failed; see why: gcloud compute tpus queued-resources describe $_name"
        fi
        say "$_name is $_state; giving it back and asking again"
        resources delete "$_name" "${_where[@]}" --force --quiet || true # the next look says whether it is gone
        ;;
      *) say "$_name is $_state; waiting" && pause "$_poll" ;;
    esac
    state ACTIVE
  done
}

# to_send: sets _version to the commit that is sent; it must hold the configuration, unless that lies on the workers.
to_send() {
  _version=$(git -C "$_here" rev-parse --verify --quiet HEAD) ||
    die "$_bad_input" "$_here is in no git checkout; clone the repository and launch from there"
  if [[ -n $_config && $_config != /* ]]; then
    # ls-tree reads . and .. in a path, and no patterns.
    [[ $(git -C "$_here/.." ls-tree "$_version" -- "$_config" 2>/dev/null) == *' blob '* ]] ||
      die "$_bad_input" "--config $_config is not in the commit that is sent to the workers; add and commit it"
  fi
}

# install: where it fails, sets _broken to what failed on which workers; empty where they could not be reached.
install() {
  local answer line what code=0 cache=${XDG_CACHE_HOME:-$HOME/.cache}/refine-jax
  local -A hosts=()
  _broken=''
  to_send
  git -C "$_here/.." diff --quiet HEAD -- || say "what is not committed is not sent to the workers"
  # In an `if`, as resume calls this, bash would go on after a failure.
  run mkdir -p "$cache" &&
    run git -C "$_here/.." archive --format=tar.gz -o "$cache/refine-jax-$_name.tar.gz" "$_version" &&
    resources scp "$_here/tpu_worker.sh" "$cache/refine-jax-$_name.tar.gz" "$_name:" "${_where[@]}" --node=all \
      --worker=all --quiet ${_ssh_flags[@]+"${_ssh_flags[@]}"} ||
    return
  answer=$(remote all install "$_name" "$_version" "$_setup") || code=$?
  while read -r line; do
    [[ $line =~ worker\ ([^\ ]+)\ failed\ (setup|installation) ]] || continue
    hosts[${BASH_REMATCH[2]}]+=" ${BASH_REMATCH[1]}"
  done <<<"$answer"
  for what in "${!hosts[@]}"; do _broken+="${_broken:+; }$what failed on${hosts[$what]}"; done
  [[ -z $_broken ]] || code=$_bad_input
  [[ -z $answer ]] || printf '%s\n' "$answer" >&$((code ? 2 : 1))
  return "$code"
}

# workers: sets _running to how many run, _codes to what the others ended with, _told to whether one was told to stop;
# fails where they cannot be asked.
workers() {
  local answer line
  _running=0 _codes=()
  if ((_dry_run)); then
    remote all status "$_name"
    _codes=(0)
    return
  fi
  answer=$(remote all status "$_name") || return
  _told=0
  while read -r line; do
    [[ $line =~ worker\ [^\ ]+\ (absent|ready|running|ended)(\ ([0-9]+))?(,\ told\ to\ stop)? ]] || continue
    [[ -z ${BASH_REMATCH[4]} ]] || _told=1
    case ${BASH_REMATCH[1]} in
      running) _running=$((_running + 1)) ;;
      ended) _codes+=("${BASH_REMATCH[3]}") ;;
      *) _codes+=(255) ;; # a new machine in the place of the old one
    esac
  done <<<"$answer"
  ((_running + ${#_codes[@]}))
}

# watch: wait for the end of the run; sets _outcome to the verdict, or to lost where the TPUs went.
watch() {
  local silent=0 failed=0
  while true; do
    if workers; then
      silent=0
      if ((_running == 0)); then
        # A worker may fail because its neighbour is being taken away: look again before believing it.
        _outcome=$(verdict "${_codes[@]}")
        if [[ $_outcome != 'done' ]]; then
          pause "$_poll"
          state ACTIVE
          [[ $_state == ACTIVE ]] || _outcome=lost
        fi
        return
      elif ((${#_codes[@]})) && [[ $(verdict "${_codes[@]}") != 'done' ]]; then
        failed=$((failed + 1))
        # The others find out within two minutes, by jax's heartbeat; else they never will.
        if ((failed == 10)); then remote all kill "$_name" || true; fi
      fi
    else
      silent=$((silent + 1))
      if ((silent == 10)); then
        _outcome=unreached
        return
      fi
    fi
    state ACTIVE
    if [[ $_state != ACTIVE ]]; then
      _outcome=lost
      return
    fi
    pause "$_poll"
  done
}

resume() {
  local what how=start crashes=0 logs="see $_program logs --name $_name --zone $_zone"
  to_send
  _told=0
  while true; do
    create
    if install && remote all "$how" "$_name" "${_training[@]}"; then
      how=again # a stop from now on, from wherever, is for this resume
      watch
    else
      _outcome=unreached
      if [[ -n $_broken ]]; then
        _outcome=broken
        pause "$_poll" # it may have failed because the machine is being taken away
      fi
      state ACTIVE
      [[ $_state == ACTIVE ]] || _outcome=lost
    fi
    if ((_told)) && [[ $_outcome == @(again|lost|crash*|unreached) ]]; then
      die "$_preempted" "$_name was told to stop; resume it, or run it, to continue"
    fi
    case $_outcome in
      done) break ;;
      lost) say "$_name was preempted; asking for it again" ;;
      again) say "the training was preempted and saved; running it again" ;;
      stop*) die "${_outcome#* }" "the training ended with ${_outcome#* }; $logs" ;;
      broken) die "$_bad_input" "$_broken: see the output above" ;;
      crash* | unreached)
        what="the training ended with ${_outcome#* }"
        [[ $_outcome != unreached ]] || what="the workers of $_name cannot be reached"
        crashes=$((crashes + 1))
        ((crashes <= _max_restarts)) || die "$_failed" "$what, $crashes times; $logs"
        say "$what; running it again ($crashes of $_max_restarts)"
        pause "$_poll"
        ;;
    esac
  done
  say "finished; give the TPUs back with $_program delete --name $_name --zone $_zone"
}

case $_action in
  resume | create) "$_action" ;;
  install)
    install || {
      _code=$?
      [[ -z $_broken ]] || die "$_code" "$_broken: see the output above"
      exit "$_code"
    }
    ;;
  run) remote all start "$_name" "${_training[@]}" ;;
  logs) remote 0 log "$_name" ;;
  stop) remote all stop "$_name" ;;
  status)
    state ACTIVE
    ((_dry_run)) || echo "$_name $_state"
    [[ $_state != ACTIVE ]] || remote all status "$_name"
    ;;
  delete)
    state ACTIVE
    [[ $_state == GONE ]] || resources delete "$_name" "${_where[@]}" --force --quiet
    ;;
esac
