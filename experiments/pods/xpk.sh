#!/usr/bin/env bash
# GKE with xpk: a job set that is restarted after preemption.
#   CLUSTER=my-cluster TPU=v5litepod-256 IMAGE=... RUN=/shared/runs/large ./xpk.sh --flagfile=...
# IMAGE must contain the repository in /prelnroberta with its .venv and jax[tpu]. RUN must be on a
# shared mount.
set -euo pipefail
: "${CLUSTER:?}" "${TPU:?a TPU type}" "${IMAGE:?}" "${RUN:?a folder that all hosts share}"

arguments=$(printf ' %q' "$@")
xpk workload create --cluster="$CLUSTER" --workload="pretrain-$(date +%s)" \
  --tpu-type="$TPU" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" --max-restarts=100 \
  --command="cd /prelnroberta && exec .venv/bin/python -m experiments.pretrain --multihost \
    --run_dir=$RUN --compilation_cache_dir=$RUN-compiled $arguments"
