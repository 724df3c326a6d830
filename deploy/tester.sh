#!/bin/sh
# The tester's entry point in its container: Locust with any experiment, wired to the server beside it.
#   tester.sh --headless --set load.users=20      a run of Locust
#   tester.sh twoclocks report output/A           any other command as it stands
set -eu
if ! [ -w output ]; then
  echo "twoclocks: ./output cannot be written by user $(id -u) of the container; it belongs to user $(stat -c %u output):" \
    "put TESTER_UID=$(stat -c %u output) and TESTER_GID=$(stat -c %g output) into .env" >&2
  exit 2
fi
case "${1:-}" in
  "" | -*) ;;
  *) exec "$@" ;;
esac
if [ -r /server/about ]; then # written by deploy/serve.py: the server's kind and model, one a line
  { read -r kind && read -r model; } </server/about
  set -- --set target.url=http://server:8000 --set "target.server=$kind" --set "target.name=$kind" \
    --set "target.model=$model" --set "collect.log=file:/server/$kind.log" "$@"
fi
# the receiver of spans and the page for Prometheus listen in the container, which publishes neither
exec python3 -m locust -f load_test.py --set collect.otlp_host=0.0.0.0 --set export.host=0.0.0.0 \
  --set export.prometheus_port=9646 "$@"
