#!/usr/bin/env bash
# Train on this machine with all its GPUs, or on its CPU:  bash launch/torchrun.sh experiment=quickstart parallel=tp2 key=value ...
# NPROC=4                     processes on this machine; else one for each GPU, without GPUs one
# NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500     several machines: the same command on each, with its own NODE_RANK
# SHUTDOWN_S=600              how long ranks may take to save a checkpoint after Ctrl-C or TERM
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PATH="$root/.venv/bin:$PATH"
gpus=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | grep -c '^GPU' || true)
processes=${NPROC:-$((gpus > 0 ? gpus : 1))}
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores / processes > 0 ? cores / processes : 1))}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SHUTDOWN_S:-600}
if [ "${NNODES:-1}" -eq 1 ]; then # ends with what the trainer says, without torchrun's report
  exec hybridtrain train --nproc "$processes" "$@"
fi
: "${MASTER_ADDR:?the address of the machine with NODE_RANK=0}" "${NODE_RANK:?this machine, from 0 to NNODES - 1}"
exec torchrun --nnodes "$NNODES" --node-rank "$NODE_RANK" --rdzv-backend static --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" \
  --nproc-per-node "$processes" -m hybridtrain.train "$@"
