#!/usr/bin/env bash
# Two processes with four virtual CPU devices each, on this machine: a small model of a pod.
#   RUN=runs/two ./experiments/pods/two_processes.sh --preset=tiny --steps=20 --mesh_fsdp=2
set -uo pipefail
: "${RUN:=runs/two}" "${PORT:=9911}"

export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=4
for host in 0 1; do
  .venv/bin/python -m experiments.pretrain --coordinator_address="localhost:$PORT" \
    --num_processes=2 --process_id=$host --run_dir="$RUN" "$@" &
done
code=0
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
