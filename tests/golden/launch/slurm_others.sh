#!/usr/bin/env bash
set -euo pipefail
sacct --name=pretrain --allocations --format=JobID,State,ExitCode,Elapsed,NodeList
scancel --me --name=pretrain
