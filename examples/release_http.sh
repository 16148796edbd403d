#!/bin/sh
# Release from automation with nothing but curl: launch, wait, branch on what came of it.
#
#   PREFECT_API_URL=http://127.0.0.1:4200/api examples/release_http.sh quickstart ['"KEY=VALUE", …']
#
# RELEASE_KEY: two calls with the same key are the same run; a commit's hash, say.
# RELEASE_TIMEOUT: seconds to wait. PREFECT_API_AUTH_STRING: user:password, where there is one.
set -eu
recipe=$1 settings=${2:-}
key=${RELEASE_KEY:-$(date +%s)-$$}
until=$(($(date +%s) + ${RELEASE_TIMEOUT:-3600}))

call() {
  curl --silent --show-error --fail-with-body --retry 5 --noproxy 127.0.0.1,localhost \
    ${PREFECT_API_AUTH_STRING:+--user "$PREFECT_API_AUTH_STRING"} "$@"
}
field() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p"; }
first() { grep -o "\"$1\":\"[^\"]*\"" | head -n 1 | field "$1"; }

deployment=$(call "$PREFECT_API_URL/deployments/name/release/release" | first id)
run=$(call "$PREFECT_API_URL/deployments/$deployment/create_flow_run" \
  --header "Content-Type: application/json" \
  --data "{\"idempotency_key\": \"$key\", \"state\": {\"type\": \"SCHEDULED\"},
           \"parameters\": {\"recipe\": \"$recipe\", \"settings\": [$settings]}}" | first id)
echo "run $run"

while :; do
  found=$(call "$PREFECT_API_URL/flow_runs/$run")
  state=$(echo "$found" | first state_type) name=$(echo "$found" | first state_name)
  case $state in
    COMPLETED | FAILED | CRASHED | CANCELLED | PAUSED) break ;;
  esac
  if [ "$(date +%s)" -ge "$until" ]; then
    echo "still running: come back later"
    exit 4
  fi
  sleep 2
done

case $state/$name in
  COMPLETED/Promoted) echo "promoted: deploy it" ;;
  COMPLETED/*) echo "$name: keep the champion" && exit 2 ;;
  PAUSED/*) echo "waiting for approval: ask a person" && exit 3 ;;
  *) echo "$name: $(echo "$found" | first message)" && exit 1 ;;
esac
