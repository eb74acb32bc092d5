#!/usr/bin/env bash
# Runs a command, and runs it again whenever it exits with 75 (preempted, everything saved).
#
#   launch/restart.sh [--restarts=1000] [--delay=5] [--print] -- COMMAND...
#
# Any other status ends the loop and is the status of this script. SIGTERM and SIGINT are passed on as SIGTERM, and
# end the loop after the command has saved and left.

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$(dirname "$0")/common.sh"

restarts=1000 delay=5
while [ "$#" -gt 0 ]; do
  case $1 in
    --restarts=*) restarts=${1#*=} ;;
    --delay=*) delay=${1#*=} ;;
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
need_match --delay "$delay" '[0-9]{1,9}' "seconds"
[ "$#" -gt 0 ] || die "no command: put it after --"

if [ "$PRINT" = 1 ]; then
  echo "# until its status is not 75, at most $restarts times more:"
  quote "$@"
  exit 0
fi

child="" stopping=0 signalled=0
pass_on() {
  stopping=1 signalled=1
  [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true
}
trap pass_on TERM INT

for ((attempt = 0; ; attempt++)); do
  "$@" &
  child=$!
  while :; do
    signalled=0 status=0
    wait "$child" || status=$?
    [ "$signalled" = 1 ] || break # else the signal ended the wait, not the child
  done
  [ "$status" = 75 ] && [ "$stopping" = 0 ] || exit "$status"
  [ "$attempt" -lt "$restarts" ] || exit 75
  echo "restart.sh: status 75, starting again in $delay s ($((attempt + 1)) of $restarts)" >&2
  sleep "$delay"
  [ "$stopping" = 0 ] || exit 75
done
