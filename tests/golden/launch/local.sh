#!/usr/bin/env bash
set -euo pipefail
# local job 'pretrain', commit 0123456789abcdef0123456789abcdef01234567.

mkdir -p '/my jobs/pretrain/logs'

# Prepare.
rm -rf '/my jobs/pretrain/source'
mkdir -p '/my jobs/pretrain/source'
git -C /home/me/cnx2_jax archive 0123456789abcdef0123456789abcdef01234567 | tar -x -C '/my jobs/pretrain/source'

# All processes at once. This script waits for all; `cnx2 launch` ends the others when one fails.
cd '/my jobs/pretrain/source'
export PYTHONPATH='/my jobs/pretrain/source'
export PATH=/venv/bin:/usr/bin
processes=() status=0
cnx2 train --config configs/pretrain.py:tiny --workdir '/shared/runs/a b' --coordinator 127.0.0.1:1234 --num-processes 2 --process-id 0 >>'/my jobs/pretrain/logs/host0.log' 2>&1 & processes+=($!)
cnx2 train --config configs/pretrain.py:tiny --workdir '/shared/runs/a b' --coordinator 127.0.0.1:1234 --num-processes 2 --process-id 1 >>'/my jobs/pretrain/logs/host1.log' 2>&1 & processes+=($!)
for process in "${processes[@]}"; do wait "$process" || status=$?; done
exit "$status"
