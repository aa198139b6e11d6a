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
# --name NAME          of the job (LAUNCH_NAME)
# --nodes N            (default 1; LAUNCH_NODES)
# --gpus N             GPUs of a node (default 8; LAUNCH_GPUS)
# --task gpu|node      one task for each GPU, or for each node (default gpu; LAUNCH_TASK)
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

PROGRAM=slurm.sh
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$HERE/common.sh"

NAME=${LAUNCH_NAME:-}
NODES=${LAUNCH_NODES:-1}
GPUS=${LAUNCH_GPUS:-8}
TASK=${LAUNCH_TASK:-gpu}
TIME=${LAUNCH_TIME:-}
PARTITION=${LAUNCH_PARTITION:-}
ACCOUNT=${LAUNCH_ACCOUNT:-}
SAVE=${LAUNCH_SAVE:-300}
LOG=${LAUNCH_LOG:-}
MAX_RESTARTS=${LAUNCH_MAX_RESTARTS:-5}
FLAGS=()

ACTION=${1:-}
case $ACTION in
  --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
  submit | status | logs | stop | delete) shift ;;
  *) bad "${ACTION:-nothing}: say what to do: submit, status, logs, stop or delete" ;;
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
    --nodes) NODES=$(value "$@") ;;
    --gpus) GPUS=$(value "$@") ;;
    --task) TASK=$(value "$@") ;;
    --time) TIME=$(value "$@") ;;
    --partition) PARTITION=$(value "$@") ;;
    --account) ACCOUNT=$(value "$@") ;;
    --save) SAVE=$(value "$@") ;;
    --log) LOG=$(value "$@") ;;
    --max-restarts) MAX_RESTARTS=$(value "$@") ;;
    --sbatch-flag) FLAGS+=("$(value "$@")") ;;
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
whole --nodes "$NODES" 1
whole --gpus "$GPUS" 1
whole --save "$SAVE" 1
whole --max-restarts "$MAX_RESTARTS" 0
[[ $TASK == gpu || $TASK == node ]] || bad "--task $TASK: give gpu or node"
[[ -z $TIME || $TIME =~ ^[0-9:-]+$ ]] || bad "--time $TIME: give a limit such as 24:00:00 or 2-00"
[[ -z $PARTITION ]] || one_word --partition "$PARTITION"
[[ -z $ACCOUNT ]] || one_word --account "$ACCOUNT"
LOG=${LOG:-$NAME.log}
# Slurm reads % in a file name; a name of ours is meant as it is.
[[ $LOG == /* ]] || LOG=$PWD/$LOG

# job: sets ID to the number of the job of this name, empty where none waits or runs.
job() {
  ask ID "$1" squeue --me "--name=$NAME" --states=PENDING,RUNNING,SUSPENDED --noheader --format=%i
  ID=${ID%%$'\n'*}
}

if [[ $ACTION != logs ]]; then need squeue "run this on a login node of the cluster"; fi
case $ACTION in
  submit)
    training
    tasks=$GPUS
    [[ $TASK == gpu ]] || tasks=1
    job ''
    if [[ -n $ID ]]; then
      say "$NAME is job $ID already"
      exit
    fi
    # B: to the batch script, which passes it on: one way for a time limit, a stop and a preemption.
    run env "REFINE_JAX_MAX_RESTARTS=$MAX_RESTARTS" "REFINE_JAX_GRACE=$SAVE" sbatch "--job-name=$NAME" \
      "--nodes=$NODES" "--ntasks-per-node=$tasks" "--gpus-per-node=$GPUS" ${TIME:+"--time=$TIME"} \
      ${PARTITION:+"--partition=$PARTITION"} ${ACCOUNT:+"--account=$ACCOUNT"} --requeue --open-mode=append \
      "--signal=B:TERM@$SAVE" "--output=${LOG//%/%%}" ${FLAGS[@]+"${FLAGS[@]}"} "$HERE/slurm.sbatch" "${TRAINING[@]}"
    ;;
  status) run squeue --me "--name=$NAME" "--format=%i %j %T %M %r" ;;
  logs) run tail -n 100 -F -- "$LOG" ;;
  stop)
    job 1
    if [[ -n $ID ]]; then
      run scontrol update "JobId=$ID" Requeue=0
      run scancel --batch --signal=TERM "$ID"
    fi
    ;;
  delete)
    job 1
    [[ -z $ID ]] || run scancel "$ID"
    ;;
esac
