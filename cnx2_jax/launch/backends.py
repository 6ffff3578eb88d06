"""The backends of `cnx2 launch`, and what a module must provide to be one."""

import argparse
from typing import Protocol

from cnx2_jax.launch import gke, local, slurm, tpu_vm, xpk
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.plan import Plan


class Backend(Protocol):
    """A place to run jobs.

    Attributes:
      LINE: one line for `--help`.
      SUBMITS: whether `run` ends once a queue has accepted the job; the queue then does the retries.
    """

    LINE: str
    SUBMITS: bool

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the options of `run`; `Job.options` holds their values."""

    def plan(self, job: Job) -> Plan:
        """Returns the next attempt at a job; raises UserError if the job asks for what cannot be had here."""

    def status(self, job: Job) -> list[str]:
        """Returns shell lines that show the job's state outside this machine."""

    def logs(self, job: Job) -> list[str]:
        """Returns shell lines that show output kept outside this machine."""

    def stop(self, job: Job) -> list[str]:
        """Returns shell lines that end the job outside this machine."""


BACKENDS: dict[str, Backend] = {
    "local": local,
    "gke": gke,
    "xpk": xpk,
    "tpu-vm": tpu_vm,
    "slurm": slurm,
}
