# shellcheck shell=bash
# Sourced by the launchers: messages, --help, --print, and the checks they share.

PRINT=0
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

die() {
  local told="$*"
  echo "error: ${told//$'\n'/ }" >&2
  exit 2
}

# The comment at the top of the script is its help.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
  exit 0
}

quote() {
  local text
  printf -v text '%q ' "$@"
  echo "${text% }"
}

# Runs a command, or shows it under --print.
run() {
  if [ "$PRINT" = 1 ]; then quote "$@"; else "$@"; fi
}

need_tool() {
  [ "$PRINT" = 1 ] || command -v "$1" >/dev/null || die "$1 is not installed: $2"
}

# need_match FLAG VALUE REGEX MEANING
need_match() {
  [ -n "$2" ] || die "$1 is missing: $4"
  [[ $2 =~ ^($3)$ ]] || die "$1=$2: expected $4"
}

# The value that the training arguments give to a flag (both --flag=value and --flag value), or nothing.
flag_value() {
  local flag=$1 value="" argument previous=""
  shift
  for argument in "$@"; do
    [ "$previous" = "$flag" ] && value=$argument
    [[ $argument == "$flag="* ]] && value=${argument#*=}
    previous=$argument
  done
  echo "$value"
}

# Training arguments must name a configuration and a workdir: a restart resumes from the workdir.
need_training_arguments() {
  [ "$#" -gt 0 ] || die "no training arguments: end the line with -- --config=configs/... --workdir=..."
  local config workdir
  config=$(flag_value --config "$@")
  workdir=$(flag_value --workdir "$@")
  [ -n "$config" ] || die "the training arguments need --config=configs/..."
  [ -n "$workdir" ] || die "the training arguments need --workdir=...: a restart resumes from it"
}

need_config_file() {
  local config
  config=$(flag_value --config "$@")
  (cd "$ROOT" && [ -f "${config%%:*}" ]) || die "--config=$config: no such file under $ROOT"
}

need_bucket() {
  local workdir
  workdir=$(flag_value --workdir "$@")
  [[ $workdir == gs://?* ]] || die "--workdir=$workdir: expected gs://BUCKET/RUN, which outlives the machines and is seen by all"
}

python_command() {
  if [ -n "${PYTHON:-}" ]; then
    echo "$PYTHON"
  elif [ -x "$ROOT/.venv/bin/python" ]; then
    echo "$ROOT/.venv/bin/python"
  else
    echo python3
  fi
}
