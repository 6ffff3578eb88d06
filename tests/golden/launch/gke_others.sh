#!/usr/bin/env bash
set -euo pipefail
kubectl --namespace=research get jobset pretrain
kubectl --namespace=research get pods --selector=jobset.sigs.k8s.io/jobset-name=pretrain --output=wide
kubectl --namespace=research logs --selector=jobset.sigs.k8s.io/jobset-name=pretrain --prefix --tail=100 --max-log-requests=8
kubectl --namespace=research delete jobset pretrain --ignore-not-found
