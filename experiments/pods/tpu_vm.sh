#!/usr/bin/env bash
# A TPU VM pod: the same command on every worker, again until it is done.
#   NAME=my-pod ZONE=us-west4-a RUN=gs-mounted/runs/large ./tpu_vm.sh --flagfile=... --mesh_fsdp=16
# The repository lies in ~/prelnroberta on every worker, with `make install` done and
# `.venv/bin/python -m pip install 'jax[tpu]==0.10.2'` after it; RUN is on a disk that all share.
set -uo pipefail
: "${NAME:?name of the TPU}" "${ZONE:?its zone}" "${RUN:?a folder that all workers share}"

arguments=$(printf ' %q' "$@")
while true; do
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
    cd ~/prelnroberta && exec .venv/bin/python -m experiments.pretrain --multihost \
      --run_dir=$RUN --compilation_cache_dir=$RUN-compiled $arguments"
  code=$?
  # 0: done. 2: the input is at fault. All else (143 preempted, 75 a host lost): again.
  if [ $code -eq 0 ] || [ $code -eq 2 ]; then exit $code; fi
  sleep 30
done
