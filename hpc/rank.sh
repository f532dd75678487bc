#!/usr/bin/env bash
# One process of several that srun starts on one node or more: torchrun's variables from SLURM's, then the command.
# srun instead of torchrun: torchrun dies of the SIGUSR1 that a job gets before its time is up, and turns the exit code
# 75 (stopped, can go on) into 1. MASTER_ADDR and MASTER_PORT are the job's.
set -euo pipefail
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
# As 2(x3): each of 3 nodes has 2. The script asks for as many on every node.
export LOCAL_WORLD_SIZE=${SLURM_STEP_TASKS_PER_NODE%%(*}
exec "$@"
