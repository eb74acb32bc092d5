#!/usr/bin/env bash
# Trains on a Cloud TPU slice, one host or many: makes the slice or attaches to it, installs this repository on every
# worker, trains, and starts again after a preemption. Running the same line again attaches and resumes.
#
#   launch/cloud_tpu.sh --name=NAME --zone=ZONE --type=TYPE [options] -- --config=configs/llama1b.py --workdir=gs://BUCKET/RUN
#
#   --name=NAME         of the slice; after a preemption the next ones are NAME-2, NAME-3, ... (with --delete: NAME again)
#   --zone=ZONE         for example us-west4-a
#   --type=TYPE         accelerator type: v5litepod-16 (v5e), v6e-16, v5p-8, v4-8, ...
#   --version=IMAGE     TPU runtime image; default: the one for the type
#   --project=ID        default: that of gcloud
#   --no-queue          create a TPU VM at once instead of a queued resource
#   --spot              cheaper, and may be preempted
#   --repo=URL          clone this instead of copying the HEAD of this checkout; --ref=BRANCH_OR_COMMIT (default: main)
#   --restarts=N        after preemptions and lost connections (default: 100)
#   --delete            delete preempted slices, and the slice when training ends, whatever its status; else nothing is deleted
#   --poll=SECONDS      between looks at the state of the slice (default: 30)
#   --print             show the commands
#
# Keep this script running (tmux): it waits for the training, and is what notices a preemption.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

name="" zone="" type="" version="" project="" queue=1 spot=0 repo="" ref=main restarts=100 delete=0 poll=30
while [ "$#" -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} && need_match --project "$project" '[a-z][-a-z0-9:.]*' "a project id" ;;
    --no-queue) queue=0 ;;
    --spot) spot=1 ;;
    --repo=*) repo=${1#*=} && need_match --repo "$repo" '(https://|ssh://|git@)[^[:space:]]+' "a git URL" ;;
    --ref=*) ref=${1#*=} ;;
    --restarts=*) restarts=${1#*=} ;;
    --delete) delete=1 ;;
    --poll=*) poll=${1#*=} ;;
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
need_match --name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "lower-case letters, digits and hyphens, at most 40"
need_match --zone "$zone" '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-west4-a"
need_match --type "$type" '(v[2-4]|v5p|v5litepod|v6e)-[0-9]+' "an accelerator type such as v5litepod-16"
need_match --ref "$ref" '[A-Za-z0-9][-A-Za-z0-9._/]*' "a branch, tag or commit"
need_match --restarts "$restarts" '[0-9]{1,9}' "a number"
need_match --poll "$poll" '[0-9]{1,9}' "seconds"
need_training_arguments "$@"
need_bucket "$@"
[ -n "$repo" ] || need_config_file "$@"
need_tool gcloud "see https://cloud.google.com/sdk/docs/install"
if [ -z "$version" ]; then
  case $type in
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
need_match --version "$version" '[a-z0-9][-a-z0-9.]*' "a TPU runtime image"

place=("--zone=$zone")
[ -z "$project" ] || place+=("--project=$project")
# A TPU VM's environment does not tell how many workers there are, so that auto would take each for a run of its own.
[ -n "$(flag_value --config.mesh.distributed "$@")" ] || set -- "$@" --config.mesh.distributed=on

tpu() { run gcloud compute tpus "$@" "${place[@]}" --quiet; }
worker() { run gcloud compute tpus tpu-vm ssh "$slice" "${place[@]}" --quiet --worker=all --command="$1" -- -o ServerAliveInterval=30; }

create() {
  local options=("--accelerator-type=$type")
  [ "$spot" = 0 ] || options+=(--spot)
  if [ "$queue" = 1 ]; then
    tpu queued-resources create "$slice" "--node-id=$slice" "${options[@]}" "--runtime-version=$version"
  else
    tpu tpu-vm create "$slice" "${options[@]}" "--version=$version"
  fi
}

remove() {
  if [ "$queue" = 1 ]; then tpu queued-resources delete "$slice" --force; else tpu tpu-vm delete "$slice"; fi
}

# READY, WAITING, DEAD or NONE.
state() {
  local kind=tpu-vm field=state answer
  [ "$queue" = 0 ] || kind=queued-resources field=state.state
  if ! answer=$(gcloud compute tpus "$kind" describe "$slice" "${place[@]}" "--format=value($field)" 2>&1); then
    if grep -qiE 'NOT_FOUND|not found|was not found' <<<"$answer"; then
      echo NONE
      return
    fi
    die "gcloud: $(grep -m1 . <<<"$answer")"
  fi
  case $(tail -n1 <<<"$answer") in
    READY | ACTIVE) echo READY ;;
    PREEMPTED | TERMINATED | FAILED | SUSPENDED | SUSPENDING) echo DEAD ;;
    STOPPED | STOPPING | HIDING | HIDDEN) die "$slice is stopped: start it, or choose another --name" ;;
    *) echo WAITING ;;
  esac
}

acquire() {
  local number=1 now
  slice=$name
  while :; do
    now=$(state)
    case $now in
      READY) return ;;
      WAITING) sleep "$poll" ;;
      NONE) create ;;
      DEAD)
        if [ "$delete" = 1 ]; then
          remove
        else
          number=$((number + 1)) slice=$name-$number
          echo "cloud_tpu.sh: preempted, going on with $slice (the old one is kept: no --delete)" >&2
        fi
        ;;
    esac
  done
}

install() {
  if [ -n "$repo" ]; then
    worker "$(quote test -d lawcat/.git) || $(quote git clone --quiet "$repo" lawcat); cd lawcat && $(quote git fetch --quiet origin "$ref") && git checkout --quiet FETCH_HEAD" || return
  else
    git -C "$ROOT" diff --quiet HEAD || echo "cloud_tpu.sh: uncommitted changes are not copied" >&2
    run git -C "$ROOT" archive --format=tar.gz "--output=$archive" HEAD || return
    run gcloud compute tpus tpu-vm scp "$archive" "$slice:lawcat.tar.gz" "${place[@]}" --quiet --worker=all || return
    worker "mkdir -p lawcat && tar -xzf lawcat.tar.gz -C lawcat" || return
  fi
  # The images' own Python is too old; uv brings one.
  worker "set -e; cd lawcat; command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh; test -d .venv || ~/.local/bin/uv venv --quiet --python 3.12 .venv; ~/.local/bin/uv pip install --quiet --python .venv/bin/python -r requirements-tpu.txt -e ."
}

train() {
  # The lock is held until the training ends, also when only the connection to it was lost.
  worker "cd lawcat && exec 9>.running && { flock -w 60 9 || { echo 'error: a training still runs on this worker' >&2; exit 75; }; } && exec launch/restart.sh --restarts=$restarts -- $(quote .venv/bin/python -m lawcat_jax.train "$@")"
}

# Whether the slice is lost. gcloud's state lags behind a preemption.
lost() {
  local look now
  for look in 1 2 3; do
    now=$(state) || return 1
    [ "$now" = READY ] || return 0
    [ "$look" = 3 ] || sleep "$poll"
  done
  return 1
}

slice=$name
folder=$(mktemp -d 2>/dev/null) || die "TMPDIR=${TMPDIR:-/tmp}: no folder can be made there"
archive=$folder/lawcat.tar.gz
trap 'rm -rf "$folder"' EXIT
if [ "$PRINT" = 1 ]; then
  create
  install
  train "$@"
  [ "$delete" = 0 ] || remove
  exit 0
fi

status=1 broken=0
for ((attempt = 0; attempt <= restarts; attempt++)); do
  acquire
  status=0
  if install; then
    broken=0
    train "$@" || status=$?
  else
    broken=$((broken + 1)) status=255
  fi
  case $status in
    0 | 2) break ;;                                             # finished, or an error for the user
    75 | 255) [ "$broken" -lt 3 ] || die "installing on $slice failed 3 times" ;; # shut down, or the connection was lost
    *) lost || break ;;                                         # the training's own failure, unless the slice is gone
  esac
  echo "cloud_tpu.sh: status $status, starting again ($((attempt + 1)) of $restarts)" >&2
  sleep "$poll"
done
[ "$delete" = 0 ] || remove
exit "$status"
