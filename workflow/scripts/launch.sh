#!/usr/bin/env bash
# launch.sh NODES GPUS COMMAND...   Start a training on NODES nodes with GPUS GPUs on each.
#
# One process runs on each GPU that was asked for and is there, or one on each node. On one node without several GPUs,
# a laptop say, that is the command itself. Everything is started with `exec`, so that SIGTERM reaches the trainers.
set -euo pipefail
nodes=$1 gpus=$2
shift 2

# In the job of several nodes, but not yet on each of them. A task that ends early, because it failed or was told to
# stop, leaves the others time to save.
if [ "$nodes" -gt 1 ] && [ -n "${SLURM_JOB_ID-}" ]; then
    gres=()
    [ "$gpus" -eq 0 ] || gres=("--gres=gpu:$gpus")
    exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$OMP_NUM_THREADS" --wait=45 \
        "${gres[@]}" "$0" 1 "$gpus" "$@"
fi

if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    IFS=, read -ra visible <<< "$CUDA_VISIBLE_DEVICES"
    there=${#visible[@]}
else
    there=$(nvidia-smi --list-gpus 2> /dev/null | wc -l || true)
fi
processes=$((gpus < there ? gpus : there))
processes=$((processes > 0 ? processes : 1))
export OMP_NUM_THREADS=$((OMP_NUM_THREADS > processes ? OMP_NUM_THREADS / processes : 1))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=45 # seconds that torchrun waits for the others when one process has failed

if [ "${SLURM_STEP_NUM_NODES:-1}" -gt 1 ]; then
    exec torchrun --no-python --nnodes "$SLURM_STEP_NUM_NODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$processes" \
        --master-addr "$SLURM_LAUNCH_NODE_IPADDR" --master-port $((20000 + SLURM_JOB_ID % 10000)) \
        --rdzv-id "$SLURM_JOB_ID" -- "$@"
elif [ "$processes" -gt 1 ]; then
    exec torchrun --no-python --standalone --nproc-per-node "$processes" -- "$@"
else
    exec "$@"
fi
