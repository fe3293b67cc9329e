#!/usr/bin/env bash
# Runs a config as a job of a Ray cluster, from any machine that reaches its dashboard, and follows it to its end.
# Paths in the config are the cluster's and absolute. The token is in RAY_AUTH_TOKEN, as on the cluster.
#
#   launch/ray_job.sh CONFIG [a.b=value ...] [--resume]     RAY_API_SERVER_ADDRESS=http://HEAD:8265 (default: this machine)
set -euo pipefail
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
exec "$(dirname "$0")/../.venv/bin/dist-ft" submit "$@" --to ray --follow
