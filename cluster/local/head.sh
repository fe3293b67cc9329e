#!/usr/bin/env bash
# Starts a Ray head on this machine in the foreground; Ctrl-C ends it. Needs a token in RAY_AUTH_TOKEN, because
# whoever reaches a Ray port runs code as you.
#
#   export RAY_AUTH_TOKEN=$(openssl rand -hex 32)
#   cluster/local/head.sh            # then, in another terminal with the same token:
#   launch/ray_address.sh configs/smoke/full.yaml                              # from this machine, or
#   launch/ray_job.sh configs/smoke/full.yaml run.output_dir=$PWD/runs         # as a job, through the dashboard
set -euo pipefail
: "${RAY_AUTH_TOKEN:?set RAY_AUTH_TOKEN, see the comment in $0}"
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
cd "$(dirname "$0")/../.."
PATH="$PWD/.venv/bin:$PATH" exec ray start --head --block --port "${RAY_PORT:-6379}" --num-cpus "${RAY_CPUS:-8}" \
  --dashboard-host 127.0.0.1 --dashboard-port "${RAY_DASHBOARD_PORT:-8265}"
