#!/usr/bin/env bash
# A job on GPUs under Slurm, one process a GPU. The processes find each other by themselves.
#
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/launch/slurm_gpus.sh ARGUMENT...
#
# ARGUMENTs go to `python -m bailing_jax.generate`; PYTHON is the interpreter (default: python).
# Paths must mean the same on every node. With DRY_RUN=1 it prints what it would run.
#
# Each process must see all GPUs of its node, because it takes the one of its own local number: so
# no --gpus-per-task and no --gpu-bind. Slurm sends SIGTERM two minutes before the time is up; the
# job then finishes what is running, and goes on where it was when it is submitted again.
#SBATCH --job-name=bailing-jax
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch --nodes=N --gpus-per-node=G --ntasks-per-node=G $0 ARGUMENT..." >&2
  exit 2
fi
if [[ -n "${SLURM_GPUS_PER_TASK-}" ]]; then
  echo "error: --gpus-per-task hides each process' GPUs from it; leave it out" >&2
  exit 2
fi
tasks=${SLURM_NTASKS_PER_NODE-} gpus=${SLURM_GPUS_PER_NODE-}
gpus=${gpus##*:}
if [[ -n "$tasks" && -n "$gpus" && "$tasks" != "$gpus" ]]; then
  echo "error: --ntasks-per-node=$tasks and --gpus-per-node=$gpus differ; one process a GPU" >&2
  exit 2
fi

# --kill-on-bad-exit: also a process that can't notice (a node that lost its network) is ended.
command=(srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m bailing_jax.generate "$@")
if [[ -n "${DRY_RUN-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
