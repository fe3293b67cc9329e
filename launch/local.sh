#!/usr/bin/env bash
# Runs a config on this machine and follows it. Ctrl-C, or a terminal that closes, ends the following and not the run.
#
#   launch/local.sh CONFIG [a.b=value ...] [--resume]
set -euo pipefail
exec "$(dirname "$0")/../.venv/bin/dist-ft" submit "$@" --to local --follow
