"""A Slurm batch job with one process per node, retried inside the job."""

import argparse
import shlex

from cnx2_jax.commandline import count
from cnx2_jax.launch.job import Job
from cnx2_jax.launch.local import exports, tree
from cnx2_jax.launch.plan import Plan, delays, written

LINE = "a Slurm batch job; the current folder must be on a file system that the nodes share"
SUBMITS = True

SAVING_SECONDS = 120  # from SIGTERM to the time limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=count, default=1, metavar="N", help="%(default)s by default")
    parser.add_argument("--time", required=True, metavar="LIMIT", help="such as 24:00:00")
    parser.add_argument("--gpus-per-node", type=count, metavar="N")
    parser.add_argument("--partition")
    parser.add_argument("--account")


def plan(job: Job) -> Plan:
    """Returns the submission: unpack the commit's tree beside the record, then sbatch the batch script."""
    batch = job.folder / "batch.sh"
    return Plan(
        prepare=[
            # Slurm allows two jobs with the same name.
            f'if [ -n "$(squeue --me --noheader --format=%i --name={job.name})" ]; then',
            f"  echo 'job {job.name} is in the queue already' >&2 && exit 1",
            "fi",
            *tree(job),
            *written(batch, batch_script(job)),
        ],
        # The job inherits the environment of sbatch, so no secret appears on a command line.
        processes={"submit": ["sbatch", "--export=ALL", str(batch)]},
        directory=job.source,
        exports=exports(job),
    )


def batch_script(job: Job) -> str:
    """Returns the script for sbatch: srun, repeated after a failure other than a user error."""
    given = {key: job.options[key] for key in ("gpus_per_node", "partition", "account")}
    limits = [f"#SBATCH --{key.replace('_', '-')}={value}" for key, value in given.items() if value]
    waits = " ".join(f"{delay:g}" for delay in delays(job.retries, job.backoff))
    steps = [
        "srun",
        "--kill-on-bad-exit=1",
        f"--output={job.log('host%t')}",
        "--open-mode=append",
        *job.command,
    ]
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            f"#SBATCH --job-name={job.name}",
            f"#SBATCH --chdir={shlex.quote(str(job.source))}",
            f"#SBATCH --output={shlex.quote(str(job.log('batch')))}",
            "#SBATCH --open-mode=append",
            f"#SBATCH --nodes={job.options['nodes']}",
            "#SBATCH --ntasks-per-node=1",
            f"#SBATCH --time={job.options['time']}",
            "# Requeue on other nodes when one fails; leave time to save before the limit.",
            "#SBATCH --requeue",
            f"#SBATCH --signal=TERM@{SAVING_SECONDS}",
            *limits,
            "set -uo pipefail",
            f"for wait in {waits} never; do",
            f"  {shlex.join(steps)}",
            "  status=$?",
            '  if [ "$status" = 0 ] || [ "$status" = 2 ] || [ "$wait" = never ]; then exit "$status"; fi',
            '  echo "failed with status $status, trying again in $wait s" >&2',
            '  sleep "$wait"',
            "done",
            "",
        ]
    )


def status(job: Job) -> list[str]:
    form = "--format=JobID,State,ExitCode,Elapsed,NodeList"
    return [shlex.join(["sacct", f"--name={job.name}", "--allocations", form])]


def logs(job: Job) -> list[str]:
    return []


def stop(job: Job) -> list[str]:
    return [shlex.join(["scancel", "--me", f"--name={job.name}"])]
