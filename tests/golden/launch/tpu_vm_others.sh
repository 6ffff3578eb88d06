#!/usr/bin/env bash
set -euo pipefail
gcloud compute tpus queued-resources describe pretrain --zone=us-central1-a '--format=value(state.state)'
gcloud compute tpus tpu-vm ssh pretrain --zone=us-central1-a --worker=all --quiet '--command=tail -n 100 cnx2/pretrain/log'
gcloud compute tpus queued-resources delete pretrain --zone=us-central1-a --force --quiet
