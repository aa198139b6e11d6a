#!/usr/bin/env bash
# Train on a GPU cluster with Slurm.
#
#   launch/slurm.sh submit --name NAME --nodes 2 --gpus 8 --time 24:00:00 --config configs/X.py --workdir DIR \
#       [--config.KEY=VALUE ...]
#
# submit   put the job into the queue; one of this name that waits or runs is taken
# status   the job's state
# logs     follow the output
# stop     SIGTERM: the training saves and ends; the job does not come back
# delete   cancel the job; gone is fine
#
# --config F --workdir DIR  of the training (LAUNCH_CONFIG, LAUNCH_WORKDIR)
# --name NAME          of the job (LAUNCH_NAME)
# --nodes N            (default 1; LAUNCH_NODES)
# --gpus N             GPUs of a node (default 8; LAUNCH_GPUS)
# --task gpu|node      one task for each GPU, or for each node (default gpu; LAUNCH_TASK)
# --cpus N             CPUs of a task (default: the cluster's, often 1, which starves the data loader; LAUNCH_CPUS)
# --time LIMIT         time limit of one allocation (default: the partition's; LAUNCH_TIME)
# --partition P        (LAUNCH_PARTITION)       --account A  (LAUNCH_ACCOUNT)
# --save SECONDS       SIGTERM comes this long before the time limit (default 300; LAUNCH_SAVE)
# --log FILE           (default NAME.log; LAUNCH_LOG)
# --max-restarts N     of a crash, in one allocation (default 5; LAUNCH_MAX_RESTARTS)
# --sbatch-flag FLAG   one more flag of sbatch, such as --constraint=h100; repeatable
# --dry-run            print the commands, run none; assumes that no such job is there yet
# -- COMMAND ...       run this in every task instead of refine-jax train
#
# Submit from an environment in which refine-jax is installed on a disk that all nodes share: Slurm takes it along.

_program=slurm.sh
_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$_here/common.sh"

_name=${LAUNCH_NAME:-}
_nodes=${LAUNCH_NODES:-1}
_gpus=${LAUNCH_GPUS:-8}
_task=${LAUNCH_TASK:-gpu}
_cpus=${LAUNCH_CPUS:-}
_time=${LAUNCH_TIME:-}
_partition=${LAUNCH_PARTITION:-}
_account=${LAUNCH_ACCOUNT:-}
_save=${LAUNCH_SAVE:-300}
_log=${LAUNCH_LOG:-}
_max_restarts=${LAUNCH_MAX_RESTARTS:-5}
_flags=()

_action=${1:-}
case $_action in
  --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
  submit | status | logs | stop | delete) shift ;;
  *) bad "${_action:-nothing}: say what to do: submit, status, logs, stop or delete" ;;
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
    --nodes) _nodes=$(value "$@") ;;
    --gpus) _gpus=$(value "$@") ;;
    --task) _task=$(value "$@") ;;
    --cpus) _cpus=$(value "$@") ;;
    --time) _time=$(value "$@") ;;
    --partition) _partition=$(value "$@") ;;
    --account) _account=$(value "$@") ;;
    --save) _save=$(value "$@") ;;
    --log) _log=$(value "$@") ;;
    --max-restarts) _max_restarts=$(value "$@") ;;
    --sbatch-flag) _flags+=("$(value "$@")") ;;
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
whole --nodes "$_nodes" 1
whole --gpus "$_gpus" 1
[[ -z $_cpus ]] || whole --cpus "$_cpus" 1
whole --save "$_save" 1
whole --max-restarts "$_max_restarts" 0
[[ $_task == gpu || $_task == node ]] || bad "--task $_task: give gpu or node"
[[ -z $_time || $_time =~ ^[0-9:-]+$ ]] || bad "--time $_time: give a limit such as 24:00:00 or 2-00"
[[ -z $_partition ]] || one_word --partition "$_partition"
[[ -z $_account ]] || one_word --account "$_account"
_log=${_log:-$_name.log}
# Slurm reads % in a file name; a name of ours is meant as it is.
[[ $_log == /* ]] || _log=$PWD/$_log

# job: sets _id to the number of the job of this name, empty where none waits or runs.
job() {
  ask _id "$1" squeue --me "--name=$_name" --states=PENDING,RUNNING,SUSPENDED --noheader --format=%i
  _id=${_id%%$'\n'*}
}

if [[ $_action != logs ]]; then need squeue "run this on a login node of the cluster"; fi
case $_action in
  submit)
    training
    _tasks=$_gpus
    [[ $_task == gpu ]] || _tasks=1
    job ''
    if [[ -n $_id ]]; then
      say "$_name is job $_id already"
      exit
    fi
    # B: to the batch script, which passes it on: one way for a time limit, a stop and a preemption.
    run env "REFINE_JAX_MAX_RESTARTS=$_max_restarts" "REFINE_JAX_GRACE=$_save" sbatch "--job-name=$_name" \
      "--nodes=$_nodes" "--ntasks-per-node=$_tasks" "--gpus-per-node=$_gpus" ${_cpus:+"--cpus-per-task=$_cpus"} \
      ${_time:+"--time=$_time"} ${_partition:+"--partition=$_partition"} ${_account:+"--account=$_account"} \
      --requeue --open-mode=append "--signal=B:TERM@$_save" "--output=${_log//%/%%}" \
      ${_flags[@]+"${_flags[@]}"} "$_here/slurm.sbatch" "${_training[@]}"
    ;;
  status) run squeue --me "--name=$_name" "--format=%i %j %T %M %r" ;;
  logs) run tail -n 100 -F -- "$_log" ;;
  stop)
    job 1
    if [[ -n $_id ]]; then
      run scontrol update "JobId=$_id" Requeue=0
      run scancel --batch --signal=TERM "$_id"
    fi
    ;;
  delete)
    job 1
    [[ -z $_id ]] || run scancel "$_id"
    ;;
esac
