#!/usr/bin/env bash
# Runs a config on a Ray that is up already, from a machine of it.
#
# Looks at every node first; --no-preflight leaves that out.
#
#   launch/ray_address.sh CONFIG [a.b=value ...]       RAY_HEAD=host:port (default: this machine, port 6379)
set -euo pipefail
cd "$(dirname "$0")/.."
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}"
head="${RAY_HEAD:-$(hostname -i | cut -d' ' -f1):6379}"
exec .venv/bin/dist-ft train --preflight "$@" --address "$head"
