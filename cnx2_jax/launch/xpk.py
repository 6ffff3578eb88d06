"""A workload on a GKE cluster, created by xpk; the cluster does the retries."""

import argparse
import shlex

from cnx2_jax.commandline import count
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.local import tree
from cnx2_jax.launch.plan import Plan, written

LINE = "a GKE workload, created by xpk"
SUBMITS = True

# Exit statuses beside xpk's own 42 and 127 to 255; 2 is a user's mistake, which a restart would only repeat.
RESTARTED = "1,3-126"
SETUP = "pip install --quiet --constraint constraints.txt '.[tpu]'"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cluster", required=True)
    parser.add_argument("--zone", required=True)
    parser.add_argument("--project", required=True)
    parser.add_argument("--tpu-type", required=True, metavar="TYPE", help="such as v5litepod-16")
    parser.add_argument("--num-slices", type=count, default=1, metavar="N", help="%(default)s by default")
    parser.add_argument(
        "--base-docker-image",
        default="python:3.11",
        metavar="IMAGE",
        help="image to add the source tree to; %(default)s by default",
    )
    parser.add_argument(
        "--setup", default=SETUP, help="shell line that installs the source tree; %(default)s"
    )


def plan(job: Job) -> Plan:
    """Returns the submission: xpk adds the commit's tree to an image and creates the workload.

    The file `environment` holds names only; xpk takes their values from its environment.
    """
    names = job.folder / "environment"
    create = [
        *_xpk(job, "create"),
        f"--workload={job.name}",
        f"--tpu-type={job.options['tpu_type']}",
        f"--num-slices={job.options['num_slices']}",
        f"--base-docker-image={job.options['base_docker_image']}",
        f"--script-dir={job.source}",
        *([f"--env-file={names}"] if job.env else []),
        f"--max-restarts={job.retries}",
        f"--restart-on-exit-codes={RESTARTED}",
        f"--termination-grace-period-seconds={job.grace:.0f}",
        f"--command={job.options['setup']} && exec {shlex.join(job.command)}",
    ]
    return Plan(
        prepare=[*tree(job), *(written(names, "\n".join(job.env)) if job.env else [])],
        processes={"submit": create},
        directory=job.folder,
    )


def status(job: Job) -> list[str]:
    return [shlex.join([*_xpk(job, "list"), f"--filter-by-job={job.name}"])]


def logs(job: Job) -> list[str]:
    query = (
        f'resource.type="k8s_container" AND resource.labels.cluster_name="{job.options["cluster"]}"'
        f' AND resource.labels.pod_name:"{job.name}-slice-job-"'
    )
    form = "--format=value(resource.labels.pod_name,textPayload)"
    command = ["gcloud", "logging", "read", query, f"--project={job.options['project']}", "--order=asc", form]
    return [shlex.join(command)]


def stop(job: Job) -> list[str]:
    return [shlex.join([*_xpk(job, "delete"), f"--workload={job.name}", "--force"])]


def _xpk(job: Job, verb: str) -> list[str]:
    places = [f"--{key}={job.options[key]}" for key in ("cluster", "zone", "project")]
    return ["xpk", "workload", verb, *places]
