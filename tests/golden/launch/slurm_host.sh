#!/usr/bin/env bash
#SBATCH --job-name=pretrain
#SBATCH --chdir='/my jobs/pretrain/source'
#SBATCH --output='/my jobs/pretrain/logs/batch.log'
#SBATCH --open-mode=append
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
# Requeue on other nodes when one fails; leave time to save before the limit.
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --gpus-per-node=8
#SBATCH --partition=gpu
set -uo pipefail
for wait in 10 20 40 never; do
  srun --kill-on-bad-exit=1 '--output=/my jobs/pretrain/logs/host%t.log' --open-mode=append cnx2 train --config configs/pretrain.py:tiny --workdir '/shared/runs/a b'
  status=$?
  if [ "$status" = 0 ] || [ "$status" = 2 ] || [ "$wait" = never ]; then exit "$status"; fi
  echo "failed with status $status, trying again in $wait s" >&2
  sleep "$wait"
done
