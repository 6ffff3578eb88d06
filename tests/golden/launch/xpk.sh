#!/usr/bin/env bash
set -euo pipefail
# xpk job 'pretrain', commit 0123456789abcdef0123456789abcdef01234567.

mkdir -p '/my jobs/pretrain/logs'

# Prepare.
rm -rf '/my jobs/pretrain/source'
mkdir -p '/my jobs/pretrain/source'
git -C /home/me/cnx2_jax archive 0123456789abcdef0123456789abcdef01234567 | tar -x -C '/my jobs/pretrain/source'
cat >'/my jobs/pretrain/environment' <<'END_OF_FILE'
WANDB_API_KEY
END_OF_FILE

# All processes at once. This script waits for all; `cnx2 launch` ends the others when one fails.
cd '/my jobs/pretrain'
processes=() status=0
xpk workload create --cluster=pods --zone=us-central1-a --project=my-project --workload=pretrain --tpu-type=v5litepod-16 --num-slices=2 --base-docker-image=python:3.11 '--script-dir=/my jobs/pretrain/source' '--env-file=/my jobs/pretrain/environment' --max-restarts=3 --restart-on-exit-codes=1,3-126 --termination-grace-period-seconds=60 '--command=pip install --quiet --constraint constraints.txt '"'"'.[tpu]'"'"' && exec cnx2 train --config configs/pretrain.py:tiny --workdir '"'"'/shared/runs/a b'"'"'' >>'/my jobs/pretrain/logs/submit.log' 2>&1 & processes+=($!)
for process in "${processes[@]}"; do wait "$process" || status=$?; done
exit "$status"
