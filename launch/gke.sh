#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster: fills launch/gke.yaml and hands it to kubectl. Needs a TPU node pool of the given
# type and topology (or auto-provisioning) and the JobSet controller.
#
#   launch/gke.sh --name=NAME --topology=4x4 [options] (--repo=URL | --image=IMAGE) -- --config=configs/llama1b.py --workdir=gs://BUCKET/RUN
#
#   --name=NAME               of the JobSet
#   --type=TYPE               node selector: tpu-v5-lite-podslice (v5e, default), tpu-v6e-slice, tpu-v5p-slice, tpu-v4-podslice
#   --topology=AxB[xC]        of the slice
#   --chips-per-host=N        default: 4; all chips on a v5e or v6e slice of 1x1
#   --repo=URL                cloned and installed when a host starts; --ref=BRANCH_OR_COMMIT (default: main)
#   --image=IMAGE             default: python:3.12; without --repo it must hold this repository, installed, in /lawcat
#   --service-account=NAME    Kubernetes service account with access to the bucket (workload identity)
#   --namespace=NAME          default: default
#   --spot                    spot nodes
#   --restarts=N              after preemptions and failures (default: 100)
#   --print                   show the manifest and the command
#
# Nothing is deleted: kubectl delete jobset NAME.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

name="" type=tpu-v5-lite-podslice topology="" chips="" repo="" ref=main image="" account="" namespace=default spot=0 restarts=100
while [ "$#" -gt 0 ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips-per-host=*) chips=${1#*=} ;;
    --repo=*) repo=${1#*=} && need_match --repo "$repo" 'https://[-A-Za-z0-9._~:/@%+]+' "an https URL" ;;
    --ref=*) ref=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --service-account=*) account=${1#*=} && need_match --service-account "$account" '[a-z0-9][-a-z0-9.]*' "a service account" ;;
    --namespace=*) namespace=${1#*=} ;;
    --spot) spot=1 ;;
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
need_match --name "$name" '[a-z]([-a-z0-9]{0,38}[a-z0-9])?' "lower-case letters, digits and hyphens, at most 40"
need_match --type "$type" 'tpu[-a-z0-9]+' "a TPU node selector such as tpu-v5-lite-podslice"
need_match --topology "$topology" '[1-9][0-9]*(x[1-9][0-9]*){1,2}' "a topology such as 4x4"
need_match --namespace "$namespace" '[a-z0-9]([-a-z0-9]*[a-z0-9])?' "a namespace"
need_match --restarts "$restarts" '[0-9]{1,9}' "a number"
need_match --ref "$ref" '[A-Za-z0-9][-A-Za-z0-9._/]*' "a branch, tag or commit"
[ -n "$repo$image" ] || die "name the code: --repo=URL, or --image=IMAGE with the repository in /lawcat"
image=${image:-python:3.12}
need_match --image "$image" '[A-Za-z0-9][-A-Za-z0-9._/:@]*' "a container image"
need_training_arguments "$@"
need_bucket "$@"
need_tool kubectl "see https://kubernetes.io/docs/tasks/tools"

total=$((${topology//x/ * }))
chips=${chips:-$((total < 4 ? total : 4))}
need_match --chips-per-host "$chips" '[1248]' "1, 2, 4 or 8"
[ $((total % chips)) = 0 ] || die "--topology=$topology: $total chips are not a multiple of --chips-per-host=$chips"
hosts=$((total / chips))
if [ "$hosts" -gt 1 ] && [ -z "$(flag_value --config.mesh.distributed "$@")" ]; then set -- "$@" --config.mesh.distributed=on; fi

# The training arguments as a YAML list of single-quoted strings.
arguments=""
for argument in "$@"; do
  [[ $argument != *$'\n'* ]] || die "a training argument holds a line break"
  arguments+="${arguments:+$'\n'                    }- '${argument//\'/\'\'}'"
done

manifest=$(<"$ROOT/launch/gke.yaml")
keep() { # keep OPTION 0|1: the lines marked #if-OPTION
  if [ "$2" = 1 ]; then manifest=${manifest// \#if-$1/}; else manifest=$(sed "/ #if-$1\$/d" <<<"$manifest"); fi
}
keep spot "$spot"
keep repo "$([ -n "$repo" ] && echo 1 || echo 0)"
keep service-account "$([ -n "$account" ] && echo 1 || echo 0)"
fill() { manifest=${manifest//"@$1@"/"$2"}; }
fill NAME "$name"
fill NAMESPACE "$namespace"
fill RESTARTS "$restarts"
fill HOSTS "$hosts"
fill CHIPS "$chips"
fill TYPE "$type"
fill TOPOLOGY "$topology"
fill SERVICE_ACCOUNT "$account"
fill IMAGE "$image"
fill REPO "'$repo'"
fill REF "'$ref'"
fill ARGUMENTS "$arguments" # last: the arguments may hold anything

if [ "$PRINT" = 1 ]; then
  echo "# kubectl apply -f -"
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
  echo "follow it: kubectl --namespace=$namespace logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$name --max-log-requests=$hosts"
fi
