#!/usr/bin/env bash
# Starts N processes on this machine, joined by jax.distributed over loopback. When one fails the others are ended.
#
#   launch/local_multiprocess.sh --processes=2 [--cpu-devices=4] [options] -- --config=configs/tiny.py --workdir=runs/two
#   launch/local_multiprocess.sh --processes=2 -- COMMAND...        any command instead of the training
#
#   --processes=N     every process gets JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID
#   --cpu-devices=N   run on the CPU with N simulated devices a process
#   --gpus=0,1        run on these GPUs, dealt out evenly
#   --port=P          of the coordinator; default: a free one
#   --grace=10        seconds between SIGTERM and SIGKILL for the others; after status 75, 60 seconds to end by themselves
#   --print           show the commands
#
# The exit status is 0 when all succeed, else that of the first process that failed. SIGTERM goes to all of them.
# To start again after preemptions: launch/restart.sh -- launch/local_multiprocess.sh ...

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

processes="" cpu_devices="" gpus="" port="" grace=10
while [ "$#" -gt 0 ]; do
  case $1 in
    --processes=*) processes=${1#*=} ;;
    --cpu-devices=*) cpu_devices=${1#*=} && need_match --cpu-devices "$cpu_devices" '[1-9][0-9]{0,3}' "a number of devices" ;;
    --gpus=*) gpus=${1#*=} && need_match --gpus "$gpus" '[0-9]+(,[0-9]+)*' "a list like 0,1" ;;
    --port=*) port=${1#*=} && need_match --port "$port" '[1-9][0-9]{0,4}' "a TCP port" ;;
    --grace=*) grace=${1#*=} ;;
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
need_match --processes "$processes" '[1-9][0-9]{0,3}' "a number of processes"
need_match --grace "$grace" '[0-9]{1,9}' "seconds"
[ "$#" -gt 0 ] || die "no command: put the training arguments, or a command, after --"
[ -z "$cpu_devices" ] || [ -z "$gpus" ] || die "--cpu-devices and --gpus exclude each other"
IFS=, read -ra gpu_list <<<"$gpus"
[ $((${#gpu_list[@]} % processes)) = 0 ] || die "--gpus=$gpus: $processes processes cannot share them evenly"
if [[ $1 == --* ]]; then
  need_training_arguments "$@"
  need_config_file "$@"
  set -- "$(python_command)" -m lawcat_jax.train "$@"
  cd "$ROOT"
fi

# Below the range from which the kernel takes ports for outgoing connections.
while [ -z "$port" ]; do
  port=$((20000 + RANDOM % 12000))
  ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || port=""
done

pids=() status=0 ending=0 deadline=0
signal_all() {
  for pid in ${pids[@]+"${pids[@]}"}; do kill "-$1" -- "-$pid" 2>/dev/null || true; done
}
trap 'signal_all KILL' EXIT
trap 'ending=1; deadline=$((SECONDS + 60)); signal_all TERM' TERM INT

for ((i = 0; i < processes; i++)); do
  settings=("JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$i")
  [ -z "$cpu_devices" ] || settings+=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=$cpu_devices")
  if [ -n "$gpus" ]; then
    share=$((${#gpu_list[@]} / processes))
    mine=("${gpu_list[@]:i*share:share}")
    settings+=("CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]}")")
  fi
  if [ "$PRINT" = 1 ]; then
    quote env "${settings[@]}" "$@"
    continue
  fi
  # A process group of its own, so that the process and its helpers end together. The prefixer outlives SIGTERM to show
  # the last lines of its process.
  set -m
  env "${settings[@]}" "$@" > >(
    trap '' TERM INT
    while IFS= read -r line || [ -n "$line" ]; do printf '[%s] %s\n' "$i" "$line"; done
  ) 2>&1 </dev/null &
  set +m
  pids+=("$!")
done

exec 3>&2 2>/dev/null # where bash reports every process that was killed
running=(${pids[@]+"${pids[@]}"})
while [ "${#running[@]}" -gt 0 ]; do
  alive=()
  for pid in "${running[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      alive+=("$pid")
      continue
    fi
    code=0
    wait "$pid" || code=$?
    if [ "$code" != 0 ] && [ "$status" = 0 ]; then
      status=$code
      echo "local_multiprocess.sh: process $pid ended with status $code, ending the others" >&3
      if [ "$ending" = 0 ]; then
        ending=1
        if [ "$code" = 75 ]; then
          deadline=$((SECONDS + 60)) # they agreed to stop, and are saving
        else
          deadline=$((SECONDS + grace))
          signal_all TERM
        fi
      fi
    fi
  done
  running=(${alive[@]+"${alive[@]}"})
  if [ "$ending" = 1 ] && [ "$SECONDS" -ge "$deadline" ]; then signal_all KILL; fi
  [ "${#running[@]}" = 0 ] || sleep 0.2
done
exit "$status"
