#!/usr/bin/env bash
set -euo pipefail
xpk workload list --cluster=pods --zone=us-central1-a --project=my-project --filter-by-job=pretrain
gcloud logging read 'resource.type="k8s_container" AND resource.labels.cluster_name="pods" AND resource.labels.pod_name:"pretrain-slice-job-"' --project=my-project --order=asc '--format=value(resource.labels.pod_name,textPayload)'
xpk workload delete --cluster=pods --zone=us-central1-a --project=my-project --workload=pretrain --force
