# shellcheck shell=bash disable=SC2034,SC2154 # what is set here, the launchers use; _program they set
# What the launchers share; sourced, never run.
#
# Every command that changes or asks something outside goes through `run` (or `ask`, for its output), which with
# --dry-run prints it, quoted for bash, and runs nothing.
#
# Variables begin with _ where a command of the user's runs: had the caller exported one of the same name, as PORT, bash
# would pass ours on, and the training would find it in the place of the caller's.

set -euo pipefail
shopt -s inherit_errexit

# The exit codes of `refine-jax train`, and of a batch that is finished but for some requests.
readonly _failed=1 _bad_input=2 _partly=3 _preempted=75

_dry_run=0
_config=${LAUNCH_CONFIG:-}
_workdir=${LAUNCH_WORKDIR:-}
_overrides=()
_command=()

say() { printf '%s: %s\n' "$_program" "$*" >&2; }

# die CODE MESSAGE: one line, then end.
die() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}

bad() { die "$_bad_input" "$*; see $_program --help"; }

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
  if ((_dry_run)); then
    quoted "$@"
    printf '\n'
  else
    "$@"
  fi
}

# ask NAME ASSUMED ARG...: set the variable NAME to what a command says; with --dry-run print it, and assume.
ask() {
  local _into=$1 _said=$2
  shift 2
  if ((_dry_run)); then
    run "$@"
  else
    _said=$("$@") || return # in an `until` bash would go on
  fi
  printf -v "$_into" '%s' "$_said"
}

# pause SECONDS
pause() { ((_dry_run)) || sleep "$1"; }

# need TOOL REMEDY
need() {
  if ! ((_dry_run)) && ! command -v "$1" >/dev/null; then
    die "$_bad_input" "$1 is not installed; $2"
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

# common_flag ARG...: take one flag that every launcher has; sets _taken to the number of arguments, 0 for none.
common_flag() {
  _taken=2
  case $1 in
    --config) _config=$(value "$@") ;;
    --workdir) _workdir=$(value "$@") ;;
    --config.?*=*) _overrides+=("$1") _taken=1 ;;
    --config.*) bad "$1: write --config.KEY=VALUE, with an equals sign and no space" ;;
    --dry-run) _dry_run=1 _taken=1 ;;
    *) _taken=0 ;;
  esac
}

# training: sets _training to the command of every process: what came after `--`, or refine-jax train.
training() {
  if ((${#_command[@]})); then
    [[ -z $_config$_workdir && ${#_overrides[@]} == 0 ]] ||
      bad "--config and --workdir say what a command after -- would"
    _training=("${_command[@]}")
    return
  fi
  given --config "$_config"
  given --workdir "$_workdir"
  _training=(refine-jax train --config "$_config" --workdir "$_workdir" ${_overrides[@]+"${_overrides[@]}"})
}

# verdict CODE...: what the exit codes of all processes of a run say together: done, again, stop CODE or crash CODE.
# A process whose neighbour was preempted may fail in any way, so one 75 outweighs everything but bad input.
verdict() {
  local code worst=0
  for code in "$@"; do
    case $code in
      "$_bad_input") printf 'stop %s' "$_bad_input" && return ;;
      "$_preempted") worst=$_preempted ;;
      0) ;;
      "$_failed") ((worst == _preempted)) || worst=$_failed ;;
      "$_partly") ((worst)) || worst=$_partly ;;
      *) ((worst == _preempted || worst == _failed)) || worst=$code ;;
    esac
  done
  case $worst in
    0) printf 'done' ;;
    "$_preempted") printf 'again' ;;
    "$_failed" | "$_partly") printf 'stop %s' "$worst" ;;
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
