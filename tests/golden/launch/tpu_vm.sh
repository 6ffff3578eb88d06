#!/usr/bin/env bash
set -euo pipefail
# tpu-vm job 'pretrain', commit 0123456789abcdef0123456789abcdef01234567.

mkdir -p '/my jobs/pretrain/logs'

# Prepare.
state() { gcloud compute tpus queued-resources describe pretrain --zone=us-central1-a --format="value(state.state)" || echo NONE; }
case "$(state)" in
  FAILED | SUSPENDING | SUSPENDED) gcloud compute tpus queued-resources delete pretrain --zone=us-central1-a --force --quiet ;;
esac
if [ "$(state)" = NONE ]; then
  gcloud compute tpus queued-resources create pretrain --zone=us-central1-a --node-id=pretrain --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --spot
fi
until now=$(state) && [ "$now" = ACTIVE ]; do
  case "$now" in FAILED | SUSPENDING | SUSPENDED | NONE) echo "state: $now" >&2 && exit 1 ;; esac
  sleep 30
done
gcloud compute tpus tpu-vm ssh pretrain --zone=us-central1-a --worker=all --quiet '--command=test ! -e cnx2/pretrain/lock || ! fuser -s -k -TERM cnx2/pretrain/lock || flock --wait 60 cnx2/pretrain/lock true || fuser -s -k -KILL cnx2/pretrain/lock || true'
git -C /home/me/cnx2_jax archive --format=tar.gz --output='/my jobs/pretrain/source.tar.gz' 0123456789abcdef0123456789abcdef01234567
cat >'/my jobs/pretrain/run.sh' <<'END_OF_FILE'
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
END_OF_FILE
trap 'rm -f '"'"'/my jobs/pretrain/environment'"'"'' EXIT
(umask 077 && { true; printf 'export WANDB_API_KEY=%q\n' "$WANDB_API_KEY"; } >'/my jobs/pretrain/environment')
gcloud compute tpus tpu-vm ssh pretrain --zone=us-central1-a --worker=all --quiet '--command=mkdir -p cnx2/pretrain'
gcloud compute tpus tpu-vm scp '/my jobs/pretrain/source.tar.gz' '/my jobs/pretrain/run.sh' '/my jobs/pretrain/environment' pretrain:cnx2/pretrain/ --zone=us-central1-a --worker=all --quiet

# All processes at once. This script waits for all; `cnx2 launch` ends the others when one fails.
cd '/my jobs/pretrain'
processes=() status=0
gcloud compute tpus tpu-vm ssh pretrain --zone=us-central1-a --worker=all --quiet '--command=bash cnx2/pretrain/run.sh' >>'/my jobs/pretrain/logs/hosts.log' 2>&1 & processes+=($!)
for process in "${processes[@]}"; do wait "$process" || status=$?; done
if [ "$status" != 0 ]; then
gcloud compute tpus tpu-vm ssh pretrain --zone=us-central1-a --worker=all --quiet '--command=test ! -e cnx2/pretrain/lock || ! fuser -s -k -TERM cnx2/pretrain/lock || flock --wait 60 cnx2/pretrain/lock true || fuser -s -k -KILL cnx2/pretrain/lock || true'
fi
exit "$status"
