#!/usr/bin/env bash
set -euo pipefail
cd "$HOME/cnx2/pretrain"
# Locked while any process of this script runs.
exec 9>lock
flock --nonblock 9
# shellcheck disable=SC1091
source ./environment
rm -rf environment source
mkdir source
tar -xzf source.tar.gz -C source
cd source
export PATH="$PWD/../venv/bin:$PATH"
status=0
{ python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing --python 3.11 ../venv && python3 -m uv pip install --quiet --python ../venv --constraint constraints.txt --editable '.[tpu]'; } >>../log 2>&1 || status=1
[ "$status" != 0 ] || cnx2 train --config configs/pretrain.py:tiny --workdir '/shared/runs/a b' >>../log 2>&1 || status=$?
[ "$status" = 0 ] || tail -n 50 ../log
exit "$status"
