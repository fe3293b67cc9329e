#!/usr/bin/env bash
# Runs a config as a Slurm job, from a login node, and follows it to its end. Looks at every node first.
# Which nodes: cluster/slurm/job.sbatch, or --sbatch=--partition=gpu --sbatch=--nodes=4 …
#
#   launch/slurm.sh CONFIG [a.b=value ...] [--resume] [--sbatch=OPTION ...]      DIST_FT_TEMPLATE=another batch script
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
exec "$root/.venv/bin/dist-ft" submit "$@" --to slurm --template "${DIST_FT_TEMPLATE:-$root/cluster/slurm/job.sbatch}" --follow
