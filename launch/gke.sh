#!/usr/bin/env bash
# Train on TPUs of a GKE cluster: a JobSet, one Job for each slice, one pod for each host.
#
#   launch/gke.sh resume --name NAME --image IMAGE --tpu v6e --topology 4x4 [--spot] [--bucket BUCKET] \
#       --config configs/X.py --workdir DIR [--config.KEY=VALUE ...]
#
# create   make a node pool for each slice, where it is not there (a Standard cluster; Autopilot makes its own)
# image    build the image from this checkout, push it
# run      start the JobSet; one that runs goes on, one that was stopped continues, one that failed starts again
# resume   run, and wait for the end; again where it ran out of restarts after a preemption
# logs     follow the output of the first pod
# status   the JobSet and its pods
# stop     suspend the JobSet: its pods get SIGTERM, the training saves; `run` continues it
# delete   delete the JobSet, and with --cluster the node pools; gone is fine
#
# --name NAME             of the JobSet; of its node pools NAME-0, NAME-1, ... (LAUNCH_NAME)
# --image IMAGE           (LAUNCH_IMAGE)
# --tpu v5e|v5p|v6e       (LAUNCH_TPU)            --topology T    such as 4x4 or 2x2x2 (LAUNCH_TOPOLOGY)
# --slices N              (default 1; LAUNCH_SLICES)
# --spot                  spot nodes
# --bucket BUCKET         mount this Cloud Storage bucket at /bucket (LAUNCH_BUCKET)
# --claim CLAIM           mount this PersistentVolumeClaim at /data (LAUNCH_CLAIM)
# --service-account NAME  of Kubernetes, for the bucket (LAUNCH_SERVICE_ACCOUNT)
# --save SECONDS          from SIGTERM to SIGKILL (default 300; spot nodes give less; LAUNCH_SAVE)
# --max-restarts N        of the JobSet, preemptions among them (default 100; LAUNCH_MAX_RESTARTS)
# --namespace NAME        (default: the context's; LAUNCH_NAMESPACE)
# --context NAME          of kubectl (default: the current one; LAUNCH_CONTEXT)
# --cluster NAME --location PLACE [--project PROJECT]      for create and delete
#                         (LAUNCH_CLUSTER, LAUNCH_LOCATION, LAUNCH_PROJECT)
# --pool-flag FLAG        one more flag of node-pools create, such as --node-locations=us-east5-b; repeatable
# --poll SECONDS          between two looks (default 30; LAUNCH_POLL)
# --dry-run               print the commands, run none; assumes that nothing is there and all goes well
# -- COMMAND ...          run this in all pods instead of refine-jax train

PROGRAM=gke.sh
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$HERE/common.sh"

NAME=${LAUNCH_NAME:-}
IMAGE=${LAUNCH_IMAGE:-}
TPU=${LAUNCH_TPU:-}
TOPOLOGY=${LAUNCH_TOPOLOGY:-}
SLICES=${LAUNCH_SLICES:-1}
SPOT=0
BUCKET=${LAUNCH_BUCKET:-}
CLAIM=${LAUNCH_CLAIM:-}
SERVICE_ACCOUNT=${LAUNCH_SERVICE_ACCOUNT:-}
SAVE=${LAUNCH_SAVE:-300}
MAX_RESTARTS=${LAUNCH_MAX_RESTARTS:-100}
NAMESPACE=${LAUNCH_NAMESPACE:-}
CONTEXT=${LAUNCH_CONTEXT:-}
CLUSTER=${LAUNCH_CLUSTER:-}
LOCATION=${LAUNCH_LOCATION:-}
PROJECT=${LAUNCH_PROJECT:-}
POLL=${LAUNCH_POLL:-30}
POOL_FLAGS=()

ACTION=${1:-}
case $ACTION in
  --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
  create | image | run | resume | logs | status | stop | delete) shift ;;
  *) bad "${ACTION:-nothing}: say what to do: create, image, run, resume, logs, status, stop or delete" ;;
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
    --image) IMAGE=$(value "$@") ;;
    --tpu) TPU=$(value "$@") ;;
    --topology) TOPOLOGY=$(value "$@") ;;
    --slices) SLICES=$(value "$@") ;;
    --bucket) BUCKET=$(value "$@") ;;
    --claim) CLAIM=$(value "$@") ;;
    --service-account) SERVICE_ACCOUNT=$(value "$@") ;;
    --save) SAVE=$(value "$@") ;;
    --max-restarts) MAX_RESTARTS=$(value "$@") ;;
    --namespace) NAMESPACE=$(value "$@") ;;
    --context) CONTEXT=$(value "$@") ;;
    --cluster) CLUSTER=$(value "$@") ;;
    --location) LOCATION=$(value "$@") ;;
    --project) PROJECT=$(value "$@") ;;
    --pool-flag) POOL_FLAGS+=("$(value "$@")") ;;
    --poll) POLL=$(value "$@") ;;
    --spot)
      SPOT=1
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
whole --slices "$SLICES" 1
whole --save "$SAVE" 1
whole --max-restarts "$MAX_RESTARTS" 0
whole --poll "$POLL" 0
[[ -z $BUCKET ]] || one_word --bucket "$BUCKET"
[[ -z $CLAIM ]] || one_word --claim "$CLAIM"
[[ -z $SERVICE_ACCOUNT ]] || one_word --service-account "$SERVICE_ACCOUNT"
[[ -z $NAMESPACE ]] || one_word --namespace "$NAMESPACE"
[[ -z $CONTEXT ]] || one_word --context "$CONTEXT"
[[ -z $PROJECT ]] || one_word --project "$PROJECT"
case $ACTION in
  create)
    one_word --cluster "$CLUSTER"
    one_word --location "$LOCATION"
    ;;
  delete)
    [[ -z $CLUSTER ]] || one_word --cluster "$CLUSTER"
    [[ -z $CLUSTER ]] || one_word --location "$LOCATION"
    ;;
  image | run | resume) one_word --image "$IMAGE" ;;
esac
if [[ $ACTION == create || $ACTION == run || $ACTION == resume ]]; then
  case $TPU in
    v5e) SELECTOR=tpu-v5-lite-podslice MACHINE=ct5lp-hightpu-4t ;;
    v5p) SELECTOR=tpu-v5p-slice MACHINE=ct5p-hightpu-4t ;;
    v6e) SELECTOR=tpu-v6e-slice MACHINE=ct6e-standard-4t ;;
    *) bad "--tpu ${TPU:-is missing}: give v5e, v5p or v6e" ;;
  esac
  [[ $TOPOLOGY =~ ^[1-9][0-9]{0,2}x[1-9][0-9]{0,2}(x[1-9][0-9]{0,2})?$ ]] ||
    bad "--topology ${TOPOLOGY:-is missing}: give one such as 4x4 or 2x2x2"
  CHIPS=$((${TOPOLOGY//x/*}))
  ((CHIPS % 4 == 0)) || bad "--topology $TOPOLOGY: $CHIPS chips; a host has 4, give whole hosts"
  HOSTS=$((CHIPS / 4))
fi
if [[ $ACTION == run || $ACTION == resume ]]; then
  training
  # Kubernetes puts variables in the place of $(NAME) in a command; $$ is a $.
  TRAINING_JSON=$(json "${TRAINING[@]//\$/\$\$}")
fi

KUBECTL=(kubectl ${CONTEXT:+"--context=$CONTEXT"} ${NAMESPACE:+"--namespace=$NAMESPACE"})
WHERE=("--cluster=$CLUSTER" "--location=$LOCATION" ${PROJECT:+"--project=$PROJECT"})

# pool ASSUMED NAME: sets FOUND to the node pool's name, empty where there is none.
pool() {
  ask FOUND "$1" gcloud container node-pools list "${WHERE[@]}" "--filter=name=$2" '--format=value(name)'
}

create() {
  local i shape=("--num-nodes=$HOSTS")
  # A slice of one host has no topology flag.
  ((HOSTS == 1)) || shape+=("--tpu-topology=$TOPOLOGY")
  ((SPOT == 0)) || shape+=(--spot)
  for ((i = 0; i < SLICES; i++)); do
    pool '' "$NAME-$i"
    if [[ -n $FOUND ]]; then
      say "node pool $NAME-$i is there"
      continue
    fi
    run gcloud container node-pools create "$NAME-$i" "${WHERE[@]}" "--machine-type=$MACHINE" "${shape[@]}" \
      ${POOL_FLAGS[@]+"${POOL_FLAGS[@]}"} --quiet
  done
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  annotations:
    # All pods of a slice in one node pool, and no other slice there.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
    # Exit codes 1, 2 and 3, by the Job's policy below: to run again would not help.
    - name: stop
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $SLICES
    template:
      spec:
        parallelism: $HOSTS
        completions: $HOSTS
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          # A pod that was taken away counts as a failure, whatever its code: the JobSet starts again.
          - action: Count
            onPodConditions:
            - type: DisruptionTarget
              status: "True"
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [$FAILED, $BAD_INPUT, $PARTLY]
        template:
YAML
  [[ -z $BUCKET ]] || cat <<YAML
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
YAML
  cat <<YAML
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $SAVE
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $SELECTOR
              cloud.google.com/gke-tpu-topology: "$TOPOLOGY"
YAML
  ((SPOT == 0)) || cat <<YAML
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
YAML
  [[ -z $SERVICE_ACCOUNT ]] || cat <<YAML
            serviceAccountName: "$SERVICE_ACCOUNT"
YAML
  cat <<YAML
            containers:
            - name: train
              image: "$IMAGE"
              command: [$TRAINING_JSON]
              resources:
                requests: {google.com/tpu: 4}
                limits: {google.com/tpu: 4}
YAML
  [[ -z $BUCKET$CLAIM ]] || printf '              volumeMounts:\n'
  [[ -z $BUCKET ]] || printf '              - {name: bucket, mountPath: /bucket}\n'
  [[ -z $CLAIM ]] || printf '              - {name: data, mountPath: /data}\n'
  [[ -z $BUCKET$CLAIM ]] || printf '            volumes:\n'
  [[ -z $BUCKET ]] || cat <<YAML
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: "$BUCKET", mountOptions: "implicit-dirs"}
YAML
  [[ -z $CLAIM ]] || cat <<YAML
            - name: data
              persistentVolumeClaim: {claimName: "$CLAIM"}
YAML
}

# state ASSUMED: sets STATE to GONE, Completed, Failed, Suspended or Running.
state() {
  local answer tries=0
  # The network may come back.
  until ask answer "$1" "${KUBECTL[@]}" get jobset "$NAME" --ignore-not-found \
    '--output=jsonpath=/{.spec.suspend}/{.status.terminalState}'; do
    tries=$((tries + 1))
    ((tries < 5)) || die "$FAILED" "kubectl cannot get the JobSet $NAME"
    pause "$POLL"
  done
  case $answer in
    '') STATE=GONE ;;
    */Completed) STATE=Completed ;;
    */Failed) STATE=Failed ;;
    /true/*) STATE=Suspended ;;
    *) STATE=Running ;;
  esac
}

apply() {
  local text
  text=$(manifest)
  if ((DRY_RUN)); then
    run "${KUBECTL[@]}" apply --filename=- | sed "s/\$/ <<'YAML'/"
    printf '%s\nYAML\n' "$text"
  else
    "${KUBECTL[@]}" apply --filename=- <<<"$text"
  fi
}

remove() { run "${KUBECTL[@]}" delete jobset "$NAME" --ignore-not-found --cascade=foreground --wait=true; }

suspend() { run "${KUBECTL[@]}" patch jobset "$NAME" --type=merge "--patch={\"spec\":{\"suspend\":$1}}"; }

launch() {
  state ''
  case $STATE in
    GONE) apply ;;
    Failed) remove && apply ;;
    Suspended) suspend false ;;
    Completed) say "$NAME is finished; to run it again, delete it first" ;;
    *) say "$NAME is running" ;;
  esac
}

# outcome: sets OUTCOME to the verdict on the pods of a JobSet that failed.
outcome() {
  local answer codes
  answer=$("${KUBECTL[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" \
    '--output=jsonpath={range .items[*]}{.status.containerStatuses[?(@.name=="train")].state.terminated.exitCode}{" "}{end}')
  read -ra codes <<<"$answer"
  if ((${#codes[@]})); then OUTCOME=$(verdict "${codes[@]}"); else OUTCOME='crash 255'; fi
  # It failed: that every pod left says 0 explains nothing.
  [[ $OUTCOME != 'done' ]] || OUTCOME='crash 255'
}

resume() {
  launch
  while true; do
    state //Completed
    case $STATE in
      Completed) break ;;
      GONE) die "$FAILED" "$NAME was deleted" ;;
      Suspended) die "$PREEMPTED" "$NAME was stopped; run it again to continue" ;;
      Failed)
        outcome
        [[ $OUTCOME == again ]] || die "${OUTCOME#* }" "the training ended with ${OUTCOME#* }; see $PROGRAM logs --name $NAME"
        say "the training was preempted and saved; running it again"
        launch
        ;;
    esac
    pause "$POLL"
  done
  say "$NAME is finished"
}

need kubectl "install the Google Cloud CLI and run gcloud container clusters get-credentials"
case $ACTION in
  create | resume) "$ACTION" ;;
  run) launch ;;
  image)
    need docker "install it, or build launch/Dockerfile where it is"
    run docker build --file "$HERE/Dockerfile" --tag "$IMAGE" "$HERE/.."
    run docker push "$IMAGE"
    ;;
  logs)
    run "${KUBECTL[@]}" logs --follow --tail=100 --container=train \
      "--selector=jobset.sigs.k8s.io/jobset-name=$NAME,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  status)
    run "${KUBECTL[@]}" get jobset "$NAME" --ignore-not-found
    run "${KUBECTL[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$NAME" --output=wide
    ;;
  stop)
    state //
    [[ $STATE != Running ]] || suspend true
    ;;
  delete)
    remove
    for ((i = 0; i < SLICES && ${#CLUSTER}; i++)); do
      pool there "$NAME-$i"
      [[ -z $FOUND ]] || run gcloud container node-pools delete "$NAME-$i" "${WHERE[@]}" --quiet
    done
    ;;
esac
