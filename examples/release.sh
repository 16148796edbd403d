#!/bin/sh
# Release from automation with the dpq command: launch, wait, branch on what came of it.
#
#   PREFECT_API_URL=http://127.0.0.1:4200/api examples/release.sh quickstart [KEY=VALUE …]
#
# RELEASE_KEY: two calls with the same key are the same run; a commit's hash, say.
# RELEASE_TIMEOUT: seconds to wait.
set -u
recipe=$1
shift
for setting in "$@"; do
  set -- "$@" --set "$setting"
  shift
done
dpq trigger release --recipe "$recipe" "$@" --wait --timeout "${RELEASE_TIMEOUT:-3600}" \
  ${RELEASE_KEY:+--idempotency-key "$RELEASE_KEY"}
code=$?
case $code in
  0) echo "deploy it" ;;
  2) echo "keep the champion" ;;
  3) echo "ask a person" ;;
  4) echo "come back later" ;;
  *) echo "look into it" ;;
esac
exit $code
