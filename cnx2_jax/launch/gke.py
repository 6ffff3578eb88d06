"""A JobSet on a GKE cluster, applied by kubectl; the cluster does the retries."""

import argparse
import json
import math
import re
import shlex
from typing import Any

from cnx2_jax.commandline import count
from cnx2_jax.errors import UserError
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.local import tree
from cnx2_jax.launch.plan import Plan, written
from cnx2_jax.launch.supervise import USER_ERROR

LINE = "a JobSet on a GKE cluster, in an image that is built from the commit"
SUBMITS = True

DOCKERFILE = "cnx2_jax/launch/Dockerfile"
CONTAINER = "cnx2"
SLICE = "slice"
# The node label of each chip (Google's GKE documentation on TPUs), and the axes of its topologies.
CHIPS = {
    "v4": ("tpu-v4-podslice", 3),
    "v5e": ("tpu-v5-lite-podslice", 2),
    "v5p": ("tpu-v5p-slice", 3),
    "v6e": ("tpu-v6e-slice", 2),
    "tpu7x": ("tpu7x", 3),
}
CHIPS_PER_HOST = 4  # of every machine type for slices of several hosts; a smaller slice has one host


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--topology", required=True, type=topology, metavar="CHIP:SHAPE", help="of a slice, such as v6e:4x4"
    )
    parser.add_argument("--slices", type=count, default=1, metavar="N", help="%(default)s by default")
    parser.add_argument(
        "--image",
        required=True,
        metavar="REPOSITORY",
        help="image repository that docker pushes to and the cluster pulls from; the commit is the tag",
    )
    parser.add_argument(
        "--dockerfile",
        default=DOCKERFILE,
        metavar="FILE",
        help="in the source tree; an image that exists is not built again; %(default)s by default",
    )
    parser.add_argument("--namespace", default="default", help="%(default)s by default")
    parser.add_argument("--queue", metavar="NAME", help="Kueue's LocalQueue to wait in; none by default")
    parser.add_argument("--spot", action="store_true", help="cheaper, but can be preempted at any time")
    parser.add_argument(
        "--secret",
        metavar="NAME",
        help="Kubernetes secret whose keys become environment variables of the command",
    )
    parser.add_argument(
        "--claim",
        action="append",
        default=[],
        type=claim,
        metavar="NAME:FOLDER",
        help="persistent volume claim to mount at a folder, for data and workdirs; repeatable",
    )


def topology(text: str) -> str:
    """Checks a slice's `CHIP:SHAPE`, as an argument's `type`."""
    chip, _, shape = text.partition(":")
    if chip not in CHIPS:
        raise argparse.ArgumentTypeError(f"'{text}': unknown chip '{chip}'; one of {', '.join(CHIPS)}")
    axes = CHIPS[chip][1]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") != axes - 1:
        form = "x".join("2" * axes)
        raise argparse.ArgumentTypeError(
            f"'{text}' must be {chip}: and {axes} numbers, such as {chip}:{form}"
        )
    chips = _chips(text)
    if chips > CHIPS_PER_HOST and chips % CHIPS_PER_HOST:
        raise argparse.ArgumentTypeError(
            f"'{text}' has {chips} chips, which hosts of {CHIPS_PER_HOST} cannot hold"
        )
    return text


def claim(text: str) -> str:
    """Checks a volume's `NAME:FOLDER`, as an argument's `type`."""
    name, _, folder = text.partition(":")
    if not re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) or not folder.startswith("/"):
        raise argparse.ArgumentTypeError(
            f"'{text}' must be the name of a claim, a colon and an absolute folder"
        )
    return text


def plan(job: Job) -> Plan:
    """Returns the submission: build and push the image unless it exists, then create the JobSet.

    Raises:
      UserError: `--env` was given, whose values would be readable in the manifest.
    """
    if job.env:
        raise UserError(
            f"gke takes no --env, because the manifest would show {job.env[0]}; "
            "put it into a Kubernetes secret and give --secret NAME"
        )
    source, image = shlex.quote(str(job.source)), shlex.quote(_image(job))
    path = job.folder / "jobset.json"
    dockerfile = shlex.quote(f"{job.source}/{job.options['dockerfile']}")
    return Plan(
        prepare=[
            *tree(job),
            f"if ! docker manifest inspect {image} >/dev/null 2>&1; then",
            f"  docker build --quiet --tag {image} --file {dockerfile} {source}",
            f"  docker push --quiet {image}",
            "fi",
            *written(path, json.dumps(manifest(job), indent=2)),
        ],
        processes={"submit": [*_kubectl(job, "create"), f"--filename={path}"]},
        directory=job.folder,
    )


def manifest(job: Job) -> dict[str, Any]:
    """Returns the JobSet: a Kubernetes job for each slice, with a pod for each of its hosts.

    When a pod fails, its job fails and all jobs start again, at most `job.retries` times; but the exit status
    of a user's mistake fails the JobSet. A pod that is asked to end has `job.grace` seconds to save.
    """
    options = job.options
    chip, _, shape = options["topology"].partition(":")
    chips = _chips(options["topology"])
    hosts = _hosts(job)
    chips_of_host = {"google.com/tpu": str(min(chips, CHIPS_PER_HOST))}
    selector = {
        "cloud.google.com/gke-tpu-accelerator": CHIPS[chip][0],
        "cloud.google.com/gke-tpu-topology": shape,
    }
    if options["spot"]:
        selector["cloud.google.com/gke-spot"] = "true"
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": _image(job),
        "command": job.command,
        "resources": {"requests": chips_of_host, "limits": chips_of_host},
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(job.grace),
        "nodeSelector": selector,
        "containers": [container],
    }
    if options["secret"]:
        container["envFrom"] = [{"secretRef": {"name": options["secret"]}}]
    if options["claim"]:
        claims = [each.split(":", 1) for each in options["claim"]]
        container["volumeMounts"] = [{"name": name, "mountPath": folder} for name, folder in claims]
        pod["volumes"] = [
            {"name": name, "persistentVolumeClaim": {"claimName": name}} for name in dict(claims)
        ]
    mistake = {"containerName": CONTAINER, "operator": "In", "values": [USER_ERROR]}
    of_slice = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": mistake}]},
        "template": {"spec": pod},
    }
    metadata: dict[str, Any] = {
        "name": job.name,
        "namespace": options["namespace"],
        # A slice is a node pool, and each job takes one whole.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if options["queue"]:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": options["queue"]}
    final = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": job.retries, "rules": [final]},
            "replicatedJobs": [
                {"name": SLICE, "replicas": options["slices"], "template": {"spec": of_slice}}
            ],
        },
    }


def status(job: Job) -> list[str]:
    return [
        shlex.join([*_kubectl(job, "get"), "jobset", job.name]),
        shlex.join([*_kubectl(job, "get"), "pods", _selector(job), "--output=wide"]),
    ]


def logs(job: Job) -> list[str]:
    pods = _hosts(job) * job.options["slices"]
    shown = ["--prefix", "--tail=100", f"--max-log-requests={pods}"]
    return [shlex.join([*_kubectl(job, "logs"), _selector(job), *shown])]


def stop(job: Job) -> list[str]:
    return [shlex.join([*_kubectl(job, "delete"), "jobset", job.name, "--ignore-not-found"])]


def _chips(slice_topology: str) -> int:
    return math.prod(map(int, slice_topology.partition(":")[2].split("x")))


def _hosts(job: Job) -> int:
    """Returns the number of hosts of one slice."""
    return max(1, _chips(job.options["topology"]) // CHIPS_PER_HOST)


def _image(job: Job) -> str:
    return f"{job.options['image']}:{job.commit}"


def _selector(job: Job) -> str:
    return f"--selector=jobset.sigs.k8s.io/jobset-name={job.name}"


def _kubectl(job: Job, verb: str) -> list[str]:
    return ["kubectl", f"--namespace={job.options['namespace']}", verb]
