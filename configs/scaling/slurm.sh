#!/bin/bash
# Four machines of 8 GPUs; sbatch configs/scaling/slurm.sh. The learning rate is that of 4 × 8 × 128 images a step.
#SBATCH --job-name=decoupled
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=16
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
# Two minutes before the time is over; before a job is preempted, SLURM sends SIGTERM itself.
#SBATCH --signal=TERM@120

srun python train.py fit --config configs/scaling/imagenet.yaml --config configs/scaling/ddp.yaml \
  --trainer.num_nodes 4 --model.learning_rate 1.6 --checkpoint.dirpath outputs/imagenet
status=$?
# Stopped by SIGTERM, with everything saved: the same command goes on.
if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
