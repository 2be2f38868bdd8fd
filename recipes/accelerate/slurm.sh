#!/bin/bash
# One run on several machines under SLURM: sbatch recipes/accelerate/slurm.sh MODEL OUT --recipe ... data.train=... [...]
# MODEL, OUT and the data must lie on a file system that all machines see. LAUNCHER chooses the profile.
#SBATCH --job-name=loopwise
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --requeue
# SIGTERM, which saves a checkpoint and ends with 0, two minutes before the time is up; --resume below goes on from it.
#SBATCH --signal=TERM@120
set -euo pipefail

LAUNCHER=${LAUNCHER:-fsdp2}
PROFILES=$(python -c 'from loopwise.recipe import RECIPES; print(RECIPES / "accelerate")')
export PROFILE=$PROFILES/$LAUNCHER.yaml GPUS=${SLURM_GPUS_ON_NODE:-8}
export MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun bash -c 'exec accelerate launch --config_file $PROFILE --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * GPUS)) \
  --machine_rank $SLURM_NODEID --main_process_ip $MAIN --main_process_port 29500 --module loopwise train "$@" --resume' _ "$@"
