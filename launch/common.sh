# shellcheck shell=bash disable=SC2034 # what is set here, the launchers use
# What the launchers share; sourced, never run.
#
# Every command that changes or asks something outside goes through `run` (or `ask`, for its output), which with
# --dry-run prints it, quoted for bash, and runs nothing.

set -euo pipefail
shopt -s inherit_errexit

# The exit codes of `refine-jax train`, and of a batch that is finished but for some requests.
readonly FAILED=1 BAD_INPUT=2 PARTLY=3 PREEMPTED=75

DRY_RUN=0
CONFIG=${LAUNCH_CONFIG:-}
RUN_FOLDER=${LAUNCH_WORKDIR:-}
OVERRIDES=()
COMMAND=()

say() { printf '%s: %s\n' "$PROGRAM" "$*" >&2; }

# die CODE MESSAGE: one line, then end.
die() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}

bad() { die "$BAD_INPUT" "$*; see $PROGRAM --help"; }

# The comment at the head of a launcher is its help.
usage() { sed -n '2,/^$/{s/^# \{0,1\}//;p;}' "$1"; }

# quoted ARG...: one line that bash reads back as these very arguments. Only what needs quotes gets them.
quoted() {
  local arg out=''
  for arg in "$@"; do
    if [[ $arg =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      out+=" $arg"
    elif [[ $arg == *[[:cntrl:]]* ]]; then
      out+=" $(printf '%q' "$arg")"
    else
      out+=" '${arg//\'/\'\\\'\'}'"
    fi
  done
  printf '%s' "${out# }"
}

# run ARG...: run it, or with --dry-run print it.
run() {
  if ((DRY_RUN)); then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# ask NAME ASSUMED ARG...: set the variable NAME to what a command says; with --dry-run print it, and assume.
ask() {
  local _name=$1 _answer=$2
  shift 2
  if ((DRY_RUN)); then
    run "$@"
  else
    _answer=$("$@") || return # in an `until` bash would go on
  fi
  printf -v "$_name" '%s' "$_answer"
}

# pause SECONDS
pause() { ((DRY_RUN)) || sleep "$1"; }

# need TOOL REMEDY
need() {
  if ! ((DRY_RUN)) && ! command -v "$1" >/dev/null; then
    die "$BAD_INPUT" "$1 is not installed; $2"
  fi
}

# value FLAG ARG...: the value of a flag, given as the rest of the command line.
value() {
  (($# > 1)) || bad "$1 wants a value"
  printf '%s' "$2"
}

# whole NAME VALUE LEAST
whole() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3)); then bad "$1 $2: give a whole number of at least $3"; fi
}

# name NAME VALUE: what clouds and Kubernetes take as a name.
name() {
  [[ -n $2 ]] || bad "$1 is missing"
  [[ $2 =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    bad "$1 $2: give at most 40 small letters, digits and dashes, a letter first and no dash last"
}

given() { [[ -n $2 ]] || bad "$1 is missing"; }

# one_word NAME VALUE: no space and nothing that a shell or a flag parser would read.
one_word() {
  given "$1" "$2"
  [[ $2 =~ ^[A-Za-z0-9_][A-Za-z0-9_./:@=+-]*$ ]] || bad "$1 $2: give letters, digits and _ . / : @ = + -"
}

# common_flag ARG...: take one flag that every launcher has; sets TAKEN to the number of arguments, 0 for none.
common_flag() {
  TAKEN=2
  case $1 in
    --config) CONFIG=$(value "$@") ;;
    --workdir) RUN_FOLDER=$(value "$@") ;;
    --config.?*=*) OVERRIDES+=("$1") TAKEN=1 ;;
    --config.*) bad "$1: write --config.KEY=VALUE, with an equals sign and no space" ;;
    --dry-run) DRY_RUN=1 TAKEN=1 ;;
    *) TAKEN=0 ;;
  esac
}

# training: sets TRAINING to the command of every process: what came after `--`, or refine-jax train.
training() {
  if ((${#COMMAND[@]})); then
    [[ -z $CONFIG$RUN_FOLDER && ${#OVERRIDES[@]} == 0 ]] || bad "--config and --workdir say what a command after -- would"
    TRAINING=("${COMMAND[@]}")
    return
  fi
  given --config "$CONFIG"
  given --workdir "$RUN_FOLDER"
  TRAINING=(refine-jax train --config "$CONFIG" --workdir "$RUN_FOLDER" ${OVERRIDES[@]+"${OVERRIDES[@]}"})
}

# verdict CODE...: what the exit codes of all processes of a run say together: done, again, stop CODE or crash CODE.
# A process whose neighbour was preempted may fail in any way, so one 75 outweighs everything but bad input.
verdict() {
  local code worst=0
  for code in "$@"; do
    case $code in
      "$BAD_INPUT") printf 'stop %s' "$BAD_INPUT" && return ;;
      "$PREEMPTED") worst=$PREEMPTED ;;
      0) ;;
      "$FAILED") ((worst == PREEMPTED)) || worst=$FAILED ;;
      "$PARTLY") ((worst)) || worst=$PARTLY ;;
      *) ((worst == PREEMPTED || worst == FAILED)) || worst=$code ;;
    esac
  done
  case $worst in
    0) printf 'done' ;;
    "$PREEMPTED") printf 'again' ;;
    "$FAILED" | "$PARTLY") printf 'stop %s' "$worst" ;;
    *) printf 'crash %s' "$worst" ;;
  esac
}

# json TEXT...: a JSON string each (YAML reads them too), with commas between.
json() {
  local text out='' first=1
  for text in "$@"; do
    text=${text//\\/\\\\}
    text=${text//\"/\\\"}
    text=${text//$'\n'/\\n}
    text=${text//$'\t'/\\t}
    text=${text//$'\r'/\\r}
    [[ $text != *[[:cntrl:]]* ]] || bad "an argument holds a control character"
    ((first)) || out+=', '
    first=0 out+="\"$text\""
  done
  printf '%s' "$out"
}
