"""Processes on this machine that stand in for hosts."""

import argparse
import os
import shlex
import socket
import sys
from pathlib import Path

from cnx2_jax.commandline import count
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.plan import Plan

LINE = "processes on this machine that stand in for hosts"
SUBMITS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hosts", type=count, default=1, metavar="N", help="processes; %(default)s by default"
    )


def plan(job: Job) -> Plan:
    """Returns an attempt: unpack the commit's tree and run the command in it, once per host.

    With several hosts the command gets `--coordinator`, `--num-processes` and `--process-id` of `cnx2 train`.
    """
    hosts = job.options["hosts"]
    address = f"127.0.0.1:{free_port()}"

    def process_arguments(host: int) -> list[str]:
        if hosts == 1:
            return []
        return ["--coordinator", address, "--num-processes", str(hosts), "--process-id", str(host)]

    return Plan(
        prepare=tree(job),
        processes={f"host{host}": [*job.command, *process_arguments(host)] for host in range(hosts)},
        directory=job.source,
        exports=exports(job),
    )


def status(job: Job) -> list[str]:
    return []


def logs(job: Job) -> list[str]:
    return []


def stop(job: Job) -> list[str]:
    return []


def tree(job: Job) -> list[str]:
    """Returns shell lines that unpack the commit's tree into `job.source`."""
    source, repository = shlex.quote(str(job.source)), shlex.quote(str(job.repository))
    return [
        f"rm -rf {source}",
        f"mkdir -p {source}",
        f"git -C {repository} archive {job.commit} | tar -x -C {source}",
    ]


def exports(job: Job) -> dict[str, str]:
    """Returns variables that make the shipped package importable and put this Python's `cnx2` on the PATH."""
    path = [str(job.source), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PATH": search_path()}


def search_path() -> str:
    """Returns a PATH that starts with the folder of this Python, where its `cnx2` is."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def free_port() -> int:
    """Returns a free port of this machine."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
