#!/usr/bin/env bash
set -euo pipefail
# gke job 'pretrain', commit 0123456789abcdef0123456789abcdef01234567.

mkdir -p '/my jobs/pretrain/logs'

# Prepare.
rm -rf '/my jobs/pretrain/source'
mkdir -p '/my jobs/pretrain/source'
git -C /home/me/cnx2_jax archive 0123456789abcdef0123456789abcdef01234567 | tar -x -C '/my jobs/pretrain/source'
if ! docker manifest inspect us-docker.pkg.dev/my-project/images/cnx2:0123456789abcdef0123456789abcdef01234567 >/dev/null 2>&1; then
  docker build --quiet --tag us-docker.pkg.dev/my-project/images/cnx2:0123456789abcdef0123456789abcdef01234567 --file '/my jobs/pretrain/source/cnx2_jax/launch/Dockerfile' '/my jobs/pretrain/source'
  docker push --quiet us-docker.pkg.dev/my-project/images/cnx2:0123456789abcdef0123456789abcdef01234567
fi
cat >'/my jobs/pretrain/jobset.json' <<'END_OF_FILE'
{
  "apiVersion": "jobset.x-k8s.io/v1alpha2",
  "kind": "JobSet",
  "metadata": {
    "name": "pretrain",
    "namespace": "research",
    "annotations": {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    },
    "labels": {
      "kueue.x-k8s.io/queue-name": "pods"
    }
  },
  "spec": {
    "failurePolicy": {
      "maxRestarts": 3,
      "rules": [
        {
          "name": "mistake",
          "action": "FailJobSet",
          "onJobFailureReasons": [
            "PodFailurePolicy"
          ]
        }
      ]
    },
    "replicatedJobs": [
      {
        "name": "slice",
        "replicas": 2,
        "template": {
          "spec": {
            "parallelism": 4,
            "completions": 4,
            "completionMode": "Indexed",
            "backoffLimit": 0,
            "podFailurePolicy": {
              "rules": [
                {
                  "action": "FailJob",
                  "onExitCodes": {
                    "containerName": "cnx2",
                    "operator": "In",
                    "values": [
                      2
                    ]
                  }
                }
              ]
            },
            "template": {
              "spec": {
                "restartPolicy": "Never",
                "terminationGracePeriodSeconds": 60,
                "nodeSelector": {
                  "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
                  "cloud.google.com/gke-tpu-topology": "4x4",
                  "cloud.google.com/gke-spot": "true"
                },
                "containers": [
                  {
                    "name": "cnx2",
                    "image": "us-docker.pkg.dev/my-project/images/cnx2:0123456789abcdef0123456789abcdef01234567",
                    "command": [
                      "cnx2",
                      "train",
                      "--config",
                      "configs/pretrain.py:tiny",
                      "--workdir",
                      "/shared/runs/a b"
                    ],
                    "resources": {
                      "requests": {
                        "google.com/tpu": "4"
                      },
                      "limits": {
                        "google.com/tpu": "4"
                      }
                    },
                    "envFrom": [
                      {
                        "secretRef": {
                          "name": "tokens"
                        }
                      }
                    ],
                    "volumeMounts": [
                      {
                        "name": "runs",
                        "mountPath": "/mnt/runs"
                      },
                      {
                        "name": "images",
                        "mountPath": "/mnt/images"
                      }
                    ]
                  }
                ],
                "volumes": [
                  {
                    "name": "runs",
                    "persistentVolumeClaim": {
                      "claimName": "runs"
                    }
                  },
                  {
                    "name": "images",
                    "persistentVolumeClaim": {
                      "claimName": "images"
                    }
                  }
                ]
              }
            }
          }
        }
      }
    ]
  }
}
END_OF_FILE

# All processes at once. This script waits for all; `cnx2 launch` ends the others when one fails.
cd '/my jobs/pretrain'
processes=() status=0
kubectl --namespace=research create '--filename=/my jobs/pretrain/jobset.json' >>'/my jobs/pretrain/logs/submit.log' 2>&1 & processes+=($!)
for process in "${processes[@]}"; do wait "$process" || status=$?; done
exit "$status"
