"""N processes on this machine, as N hosts are elsewhere."""

import argparse
import os
import shlex
import socket
import sys
from pathlib import Path

from cnx2_jax.commandline import count
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.plan import Plan

LINE = "processes on this machine, as hosts"
SUBMITS = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", type=count, default=1, metavar="N", help="processes; %(default)s")


def plan(job: Job) -> Plan:
    """Returns the attempt: the commit's tree, and in it the command once per host.

    Several are told `--coordinator`, `--num-processes` and `--process-id`, as `cnx2 train` takes them.
    """
    hosts = job.options["hosts"]
    address = f"127.0.0.1:{free_port()}"

    def together(host: int) -> list[str]:
        if hosts == 1:
            return []
        return ["--coordinator", address, "--num-processes", str(hosts), "--process-id", str(host)]

    return Plan(
        prepare=tree(job),
        processes={f"host{host}": [*job.command, *together(host)] for host in range(hosts)},
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
    """Shell lines that unpack the commit's tree into `job.source`."""
    source, repository = shlex.quote(str(job.source)), shlex.quote(str(job.repository))
    return [
        f"rm -rf {source}",
        f"mkdir -p {source}",
        f"git -C {repository} archive {job.commit} | tar -x -C {source}",
    ]


def exports(job: Job) -> dict[str, str]:
    """Variables by which the tree's package is imported, and this Python's programs are found."""
    path = [str(job.source), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "PATH": programs()}


def programs() -> str:
    """Returns a PATH on which this Python's programs come first, `cnx2` among them."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def free_port() -> int:
    """Returns a port of this machine that nothing listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
