#!/usr/bin/env bash
set -euo pipefail
# slurm job 'pretrain', commit 0123456789abcdef0123456789abcdef01234567.

mkdir -p '/my jobs/pretrain/logs'

# Prepare.
if [ -n "$(squeue --me --noheader --format=%i --name=pretrain)" ]; then
  echo 'job pretrain is in the queue already' >&2 && exit 1
fi
rm -rf '/my jobs/pretrain/source'
mkdir -p '/my jobs/pretrain/source'
git -C /home/me/cnx2_jax archive 0123456789abcdef0123456789abcdef01234567 | tar -x -C '/my jobs/pretrain/source'
cat >'/my jobs/pretrain/batch.sh' <<'END_OF_FILE'
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
END_OF_FILE

# All processes at once. This script waits for all; `cnx2 launch` ends the others when one fails.
cd '/my jobs/pretrain/source'
export PYTHONPATH='/my jobs/pretrain/source'
export PATH=/venv/bin:/usr/bin
processes=() status=0
sbatch --export=ALL '/my jobs/pretrain/batch.sh' >>'/my jobs/pretrain/logs/submit.log' 2>&1 & processes+=($!)
for process in "${processes[@]}"; do wait "$process" || status=$?; done
exit "$status"
