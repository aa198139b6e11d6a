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
# --config F --workdir DIR  of the training (LAUNCH_CONFIG, LAUNCH_WORKDIR)
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

_program=gke.sh
_here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$_here/common.sh"

_name=${LAUNCH_NAME:-}
_image=${LAUNCH_IMAGE:-}
_tpu=${LAUNCH_TPU:-}
_topology=${LAUNCH_TOPOLOGY:-}
_slices=${LAUNCH_SLICES:-1}
_spot=0
_bucket=${LAUNCH_BUCKET:-}
_claim=${LAUNCH_CLAIM:-}
_service_account=${LAUNCH_SERVICE_ACCOUNT:-}
_save=${LAUNCH_SAVE:-300}
_max_restarts=${LAUNCH_MAX_RESTARTS:-100}
_namespace=${LAUNCH_NAMESPACE:-}
_context=${LAUNCH_CONTEXT:-}
_cluster=${LAUNCH_CLUSTER:-}
_location=${LAUNCH_LOCATION:-}
_project=${LAUNCH_PROJECT:-}
_poll=${LAUNCH_POLL:-30}
_pool_flags=()

_action=${1:-}
case $_action in
  --help | -h) usage "${BASH_SOURCE[0]}" && exit ;;
  create | image | run | resume | logs | status | stop | delete) shift ;;
  *) bad "${_action:-nothing}: say what to do: create, image, run, resume, logs, status, stop or delete" ;;
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
    --image) _image=$(value "$@") ;;
    --tpu) _tpu=$(value "$@") ;;
    --topology) _topology=$(value "$@") ;;
    --slices) _slices=$(value "$@") ;;
    --bucket) _bucket=$(value "$@") ;;
    --claim) _claim=$(value "$@") ;;
    --service-account) _service_account=$(value "$@") ;;
    --save) _save=$(value "$@") ;;
    --max-restarts) _max_restarts=$(value "$@") ;;
    --namespace) _namespace=$(value "$@") ;;
    --context) _context=$(value "$@") ;;
    --cluster) _cluster=$(value "$@") ;;
    --location) _location=$(value "$@") ;;
    --project) _project=$(value "$@") ;;
    --pool-flag) _pool_flags+=("$(value "$@")") ;;
    --poll) _poll=$(value "$@") ;;
    --spot)
      _spot=1
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
whole --slices "$_slices" 1
whole --save "$_save" 1
whole --max-restarts "$_max_restarts" 0
whole --poll "$_poll" 0
[[ -z $_bucket ]] || one_word --bucket "$_bucket"
[[ -z $_claim ]] || one_word --claim "$_claim"
[[ -z $_service_account ]] || one_word --service-account "$_service_account"
[[ -z $_namespace ]] || one_word --namespace "$_namespace"
[[ -z $_context ]] || one_word --context "$_context"
[[ -z $_project ]] || one_word --project "$_project"
case $_action in
  create)
    one_word --cluster "$_cluster"
    one_word --location "$_location"
    ;;
  delete)
    [[ -z $_cluster ]] || one_word --cluster "$_cluster"
    [[ -z $_cluster ]] || one_word --location "$_location"
    ;;
  image | run | resume) one_word --image "$_image" ;;
esac
if [[ $_action == create || $_action == run || $_action == resume ]]; then
  case $_tpu in
    v5e) _selector=tpu-v5-lite-podslice _machine=ct5lp-hightpu-4t ;;
    v5p) _selector=tpu-v5p-slice _machine=ct5p-hightpu-4t ;;
    v6e) _selector=tpu-v6e-slice _machine=ct6e-standard-4t ;;
    *) bad "--tpu ${_tpu:-is missing}: give v5e, v5p or v6e" ;;
  esac
  [[ $_topology =~ ^[1-9][0-9]{0,2}x[1-9][0-9]{0,2}(x[1-9][0-9]{0,2})?$ ]] ||
    bad "--topology ${_topology:-is missing}: give one such as 4x4 or 2x2x2"
  _chips=$((${_topology//x/*}))
  ((_chips % 4 == 0)) || bad "--topology $_topology: $_chips chips; a host has 4, give whole hosts"
  _hosts=$((_chips / 4))
fi
if [[ $_action == run || $_action == resume ]]; then
  training
  # Kubernetes puts variables in the place of $(NAME) in a command; $$ is a $.
  _training_json=$(json "${_training[@]//\$/\$\$}")
fi

_kubectl=(kubectl ${_context:+"--context=$_context"} ${_namespace:+"--namespace=$_namespace"})
_where=("--cluster=$_cluster" "--location=$_location" ${_project:+"--project=$_project"})

# pool ASSUMED NAME: sets _found to the node pool's name, empty where there is none.
pool() {
  ask _found "$1" gcloud container node-pools list "${_where[@]}" "--filter=name=$2" '--format=value(name)'
}

create() {
  local i shape=("--num-nodes=$_hosts")
  # A slice of one host has no topology flag.
  ((_hosts == 1)) || shape+=("--tpu-topology=$_topology")
  ((_spot == 0)) || shape+=(--spot)
  for ((i = 0; i < _slices; i++)); do
    pool '' "$_name-$i"
    if [[ -n $_found ]]; then
      say "node pool $_name-$i is there"
      continue
    fi
    run gcloud container node-pools create "$_name-$i" "${_where[@]}" "--machine-type=$_machine" "${shape[@]}" \
      ${_pool_flags[@]+"${_pool_flags[@]}"} --quiet
  done
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $_name
  annotations:
    # All pods of a slice in one node pool, and no other slice there.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $_max_restarts
    rules:
    # Exit codes 1, 2 and 3, by the Job's policy below: to run again would not help.
    - name: stop
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $_slices
    template:
      spec:
        parallelism: $_hosts
        completions: $_hosts
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
              values: [$_failed, $_bad_input, $_partly]
        template:
YAML
  [[ -z $_bucket ]] || cat <<YAML
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true"
YAML
  cat <<YAML
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: $_save
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $_selector
              cloud.google.com/gke-tpu-topology: "$_topology"
YAML
  ((_spot == 0)) || cat <<YAML
              cloud.google.com/gke-spot: "true"
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: "true"
              effect: NoSchedule
YAML
  [[ -z $_service_account ]] || cat <<YAML
            serviceAccountName: "$_service_account"
YAML
  cat <<YAML
            containers:
            - name: train
              image: "$_image"
              command: [$_training_json]
              resources:
                requests: {google.com/tpu: 4}
                limits: {google.com/tpu: 4}
              volumeMounts:
              # The data loader's processes pass batches through it; a pod's own has 64 MiB.
              - {name: shm, mountPath: /dev/shm}
YAML
  [[ -z $_bucket ]] || printf '              - {name: bucket, mountPath: /bucket}\n'
  [[ -z $_claim ]] || printf '              - {name: data, mountPath: /data}\n'
  cat <<YAML
            volumes:
            - {name: shm, emptyDir: {medium: Memory}}
YAML
  # A checkpoint is committed by renaming its folder; gcsfuse renames none in a flat bucket unless a limit is given.
  [[ -z $_bucket ]] || cat <<YAML
            - name: bucket
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: "$_bucket", mountOptions: "implicit-dirs,rename-dir-limit=200000"}
YAML
  [[ -z $_claim ]] || cat <<YAML
            - name: data
              persistentVolumeClaim: {claimName: "$_claim"}
YAML
}

# state ASSUMED: sets _state to GONE, Completed, Failed, Suspended or Running.
state() {
  local answer tries=0
  # The network may come back.
  until ask answer "$1" "${_kubectl[@]}" get jobset "$_name" --ignore-not-found \
    '--output=jsonpath=/{.spec.suspend}/{.status.terminalState}'; do
    tries=$((tries + 1))
    ((tries < 5)) || die "$_failed" "kubectl cannot get the JobSet $_name"
    pause "$_poll"
  done
  case $answer in
    '') _state=GONE ;;
    */Completed) _state=Completed ;;
    */Failed) _state=Failed ;;
    /true/*) _state=Suspended ;;
    *) _state=Running ;;
  esac
}

apply() {
  local text
  text=$(manifest)
  if ((_dry_run)); then
    run "${_kubectl[@]}" apply --filename=- | sed "s/\$/ <<'YAML'/"
    printf '%s\nYAML\n' "$text"
  else
    "${_kubectl[@]}" apply --filename=- <<<"$text"
  fi
}

remove() { run "${_kubectl[@]}" delete jobset "$_name" --ignore-not-found --cascade=foreground --wait=true; }

suspend() { run "${_kubectl[@]}" patch jobset "$_name" --type=merge "--patch={\"spec\":{\"suspend\":$1}}"; }

launch() {
  state ''
  case $_state in
    GONE) apply ;;
    Failed) remove && apply ;;
    Suspended) suspend false ;;
    Completed) say "$_name is finished; to run it again, delete it first" ;;
    *) say "$_name is running" ;;
  esac
}

# outcome: sets _outcome to the verdict on the pods of a JobSet that failed.
outcome() {
  local answer codes
  answer=$("${_kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$_name" \
    '--output=jsonpath={range .items[*]}{.status.containerStatuses[?(@.name=="train")].state.terminated.exitCode}{" "}{end}')
  read -ra codes <<<"$answer"
  if ((${#codes[@]})); then _outcome=$(verdict "${codes[@]}"); else _outcome='crash 255'; fi
  # It failed: that every pod left says 0 explains nothing.
  [[ $_outcome != 'done' ]] || _outcome='crash 255'
}

resume() {
  launch
  while true; do
    state //Completed
    case $_state in
      Completed) break ;;
      GONE) die "$_failed" "$_name was deleted" ;;
      Suspended) die "$_preempted" "$_name was stopped; run it again to continue" ;;
      Failed)
        outcome
        [[ $_outcome == again ]] || die "${_outcome#* }" "the training ended with ${_outcome#* }; see $_program logs --name $_name"
        say "the training was preempted and saved; running it again"
        launch
        ;;
    esac
    pause "$_poll"
  done
  say "$_name is finished"
}

need kubectl "install the Google Cloud CLI and run gcloud container clusters get-credentials"
case $_action in
  create | resume) "$_action" ;;
  run) launch ;;
  image)
    need docker "install it, or build launch/Dockerfile where it is"
    run docker build --file "$_here/Dockerfile" --tag "$_image" "$_here/.."
    run docker push "$_image"
    ;;
  logs)
    run "${_kubectl[@]}" logs --follow --tail=100 --container=train \
      "--selector=jobset.sigs.k8s.io/jobset-name=$_name,jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ;;
  status)
    run "${_kubectl[@]}" get jobset "$_name" --ignore-not-found
    run "${_kubectl[@]}" get pods "--selector=jobset.sigs.k8s.io/jobset-name=$_name" --output=wide
    ;;
  stop)
    state //
    [[ $_state != Running ]] || suspend true
    ;;
  delete)
    remove
    for ((i = 0; i < _slices && ${#_cluster}; i++)); do
      pool there "$_name-$i"
      [[ -z $_found ]] || run gcloud container node-pools delete "$_name-$i" "${_where[@]}" --quiet
    done
    ;;
esac
