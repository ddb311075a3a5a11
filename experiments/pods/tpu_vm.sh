#!/usr/bin/env bash
# A TPU VM pod: runs the same command on every worker and restarts it until it is done.
#   NAME=my-pod ZONE=us-west4-a RUN=gs-mounted/runs/large ./tpu_vm.sh --flagfile=... --mesh_fsdp=16
# Every worker must have the repository in ~/prelnroberta, set up with `make install` and
# `.venv/bin/python -m pip install 'jax[tpu]==0.10.2'`. RUN must be on a disk that all share.
set -uo pipefail
: "${NAME:?name of the TPU}" "${ZONE:?its zone}" "${RUN:?a folder that all workers share}"

arguments=$(printf ' %q' "$@")
while true; do
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
    cd ~/prelnroberta && exec .venv/bin/python -m experiments.pretrain --multihost \
      --run_dir=$RUN --compilation_cache_dir=$RUN-compiled $arguments"
  code=$?
  # 0: done. 2: invalid input. Any other code (143: preempted, 75: lost host): restart.
  if [ $code -eq 0 ] || [ $code -eq 2 ]; then exit $code; fi
  sleep 30
done
