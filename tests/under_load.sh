#!/usr/bin/env bash
# Runs a command some times in a row with busy loops beside it, and stops at the first failure.
#
#     tests/under_load.sh LOOPS TIMES COMMAND...
set -eu
[ $# -ge 3 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2; }
loops=$1 times=$2
shift 2
busy=()
trap 'kill "${busy[@]}" 2>/dev/null || true' EXIT
for _ in $(seq "$loops"); do
  # Each looks now and then whether this script is still there: it may have been killed.
  (while kill -0 $$ 2>/dev/null; do for _ in {1..100000}; do :; done; done) &
  busy+=($!)
done
for run in $(seq "$times"); do
  echo "run $run of $times beside $loops busy loops"
  "$@"
done
