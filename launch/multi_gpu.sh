#!/usr/bin/env bash
# Trains on the GPUs of this machine: one process drives them all, and it is started again after a preemption.
#
#   launch/multi_gpu.sh [--gpus=0,1,2,3] [--restarts=1000] [--print] -- --config=configs/llama1b.py --workdir=runs/llama1b
#
#   --gpus=LIST      indices from nvidia-smi; default: all (or CUDA_VISIBLE_DEVICES)
#   --restarts=N     how often to start again after exit status 75
#   PYTHON=...       the interpreter; default: .venv/bin/python of the repository, else python3

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

gpus="" restarts=1000
while [ "$#" -gt 0 ]; do
  case $1 in
    --gpus=*) gpus=${1#*=} && need_match --gpus "$gpus" '[0-9]+(,[0-9]+)*' "a list like 0,1" ;;
    --restarts=*) restarts=${1#*=} ;;
    --print) PRINT=1 ;;
    --help | -h) usage ;;
    --)
      shift
      break
      ;;
    *) die "$1: unknown option (see --help)" ;;
  esac
  shift
done
need_match --restarts "$restarts" '[0-9]{1,9}' "a number"
need_training_arguments "$@"
need_config_file "$@"
need_tool nvidia-smi "this launcher needs the NVIDIA driver"

if [ "$PRINT" = 0 ]; then
  present=$(nvidia-smi --query-gpu=index --format=csv,noheader) || die "nvidia-smi fails: $present"
  for gpu in ${gpus//,/ }; do
    grep -qx "$gpu" <<<"$present" || die "--gpus=$gpus: there is no GPU $gpu here, only $(xargs <<<"$present")"
  done
fi

cd "$ROOT"
command=("$ROOT/launch/restart.sh" "--restarts=$restarts" --)
[ -z "$gpus" ] || command+=(env "CUDA_VISIBLE_DEVICES=$gpus")
command+=("$(python_command)" -m lawcat_jax.train "$@")
if [ "$PRINT" = 1 ]; then quote "${command[@]}"; else exec "${command[@]}"; fi
