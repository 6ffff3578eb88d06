"""A Cloud TPU slice, requested as a queued resource, with the command run on all its hosts by ssh."""

import argparse
import shlex

from cnx2_jax.launch.job import Job
from cnx2_jax.launch.plan import Plan, written

LINE = "a Cloud TPU slice: a queued resource, then ssh to all its hosts"
SUBMITS = False

POLL_SECONDS = 30
SHOWN_LINES = 50  # of a failed host's output
# The TPU images have Python 3.10, but cnx2 needs 3.11; uv downloads it.
SETUP = (
    "python3 -m pip install --quiet --user uv"
    " && python3 -m uv venv --quiet --allow-existing --python 3.11 ../venv"
    " && python3 -m uv pip install --quiet --python ../venv --constraint constraints.txt --editable '.[tpu]'"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--zone", required=True)
    parser.add_argument("--accelerator-type", required=True, metavar="TYPE", help="such as v5litepod-16")
    parser.add_argument(
        "--runtime-version", required=True, metavar="VERSION", help="such as v2-alpha-tpuv5-lite"
    )
    parser.add_argument("--spot", action="store_true", help="cheaper, but can be preempted at any time")
    parser.add_argument(
        "--setup",
        default=SETUP,
        help="shell line that installs the source tree on a host; by default cnx2 into ../venv",
    )


def plan(job: Job) -> Plan:
    """Returns an attempt: request the slice if necessary, copy the tree to its hosts, run the command."""
    zone = shlex.quote(f"--zone={job.options['zone']}")
    queued = "gcloud compute tpus queued-resources"
    create = [
        f"--zone={job.options['zone']}",
        f"--node-id={job.name}",
        f"--accelerator-type={job.options['accelerator_type']}",
        f"--runtime-version={job.options['runtime_version']}",
        *(["--spot"] if job.options["spot"] else []),
    ]
    archive, run, environment = (
        shlex.quote(str(job.folder / name)) for name in ("source.tar.gz", "run.sh", "environment")
    )
    values = [f"printf 'export {name}=%q\\n' \"${name}\"" for name in job.env]
    prepare = [
        f'state() {{ {queued} describe {job.name} {zone} --format="value(state.state)" || echo NONE; }}',
        'case "$(state)" in',
        f"  FAILED | SUSPENDING | SUSPENDED) {queued} delete {job.name} {zone} --force --quiet ;;",
        "esac",
        'if [ "$(state)" = NONE ]; then',
        f"  {queued} create {job.name} {shlex.join(create)}",
        "fi",
        'until now=$(state) && [ "$now" = ACTIVE ]; do',
        '  case "$now" in FAILED | SUSPENDING | SUSPENDED | NONE) echo "state: $now" >&2 && exit 1 ;; esac',
        f"  sleep {POLL_SECONDS}",
        "done",
        *clear(job),
        f"git -C {shlex.quote(str(job.repository))} archive --format=tar.gz --output={archive} {job.commit}",
        *written(job.folder / "run.sh", run_script(job)),
        # Values go into a file that only its owner can read. printf is a shell builtin: no process shows
        # them.
        f"trap {shlex.quote(f'rm -f {environment}')} EXIT",
        f"(umask 077 && {{ {'; '.join(['true', *values])}; }} >{environment})",
        shlex.join(_ssh(job, f"mkdir -p cnx2/{job.name}")),
        f"gcloud compute tpus tpu-vm scp {archive} {run} {environment} {job.name}:cnx2/{job.name}/ {zone}"
        " --worker=all --quiet",
    ]
    return Plan(
        prepare=prepare,
        processes={"hosts": _ssh(job, f"bash cnx2/{job.name}/run.sh")},
        directory=job.folder,
        clear=clear(job),
    )


def run_script(job: Job) -> str:
    """Returns the script that every host runs; it logs on the host, so the log survives a lost connection."""
    return "\n".join(
        [
            "#!/usr/bin/env bash",
            "set -euo pipefail",
            f'cd "$HOME/cnx2/{job.name}"',
            "# Locked while any process of this script runs.",
            "exec 9>lock",
            "flock --nonblock 9",
            "# shellcheck disable=SC1091",
            "source ./environment",
            "rm -rf environment source",
            "mkdir source",
            "tar -xzf source.tar.gz -C source",
            "cd source",
            'export PATH="$PWD/../venv/bin:$PATH"',
            "status=0",
            f"{{ {job.options['setup']}; }} >>../log 2>&1 || status=1",
            f'[ "$status" != 0 ] || {shlex.join(job.command)} >>../log 2>&1 || status=$?',
            f'[ "$status" = 0 ] || tail -n {SHOWN_LINES} ../log',
            'exit "$status"',
            "",
        ]
    )


def clear(job: Job) -> list[str]:
    """Returns shell lines that end the command on every host: SIGTERM, then SIGKILL after the grace."""
    lock = f"cnx2/{job.name}/lock"
    return [
        shlex.join(
            _ssh(
                job,
                f"test ! -e {lock} || ! fuser -s -k -TERM {lock} || flock --wait {job.grace:g} {lock} true"
                f" || fuser -s -k -KILL {lock} || true",
            )
        )
    ]


def status(job: Job) -> list[str]:
    zone = f"--zone={job.options['zone']}"
    command = ["gcloud", "compute", "tpus", "queued-resources", "describe", job.name, zone]
    return [shlex.join([*command, "--format=value(state.state)"])]


def logs(job: Job) -> list[str]:
    return [shlex.join(_ssh(job, f"tail -n 100 cnx2/{job.name}/log"))]


def stop(job: Job) -> list[str]:
    zone = f"--zone={job.options['zone']}"
    command = [
        "gcloud",
        "compute",
        "tpus",
        "queued-resources",
        "delete",
        job.name,
        zone,
        "--force",
        "--quiet",
    ]
    return [shlex.join(command)]


def _ssh(job: Job, command: str) -> list[str]:
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", job.name, f"--zone={job.options['zone']}"]
    return [*ssh, "--worker=all", "--quiet", f"--command={command}"]
