"""Runs a command on hosts: here, on Cloud TPUs, on GKE, under Slurm; and again when a host dies.

  python experiments/launch.py local run --name digits --hosts 2 -- \\
      cnx2 train --config configs/pretrain.py:digits --workdir "$PWD/runs/digits"
  python experiments/launch.py local status --name digits     # and logs, stop

What runs is the commit that is checked out, unpacked on every host; the command starts in that tree.
`--dry-run` prints the very shell lines instead. docs/launch.md has commands for each backend.
"""

import argparse
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from cnx2_jax.commandline import Parser, run
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.launch import job as record
from cnx2_jax.launch import local, pid_files, slurm, tpu_vm, xpk
from cnx2_jax.launch.job import LAUNCHER, Job
from cnx2_jax.launch.plan import render, script
from cnx2_jax.launch.source import commit_of
from cnx2_jax.launch.supervise import USER_ERROR, held, supervise

BACKENDS: dict[str, ModuleType] = {"local": local, "tpu-vm": tpu_vm, "xpk": xpk, "slurm": slurm}
SHOWN_LINES = 100


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _main(words), "launch")


def _main(words: list[str]) -> None:
    split = words.index("--") if "--" in words else len(words)
    args = _parser().parse_args(words[:split])
    record.check_name(args.name)
    folder = (args.record / args.name).absolute()
    command = words[split + 1 :]
    if args.verb == "run":
        _run(_new_job(args, folder, command), dry_run=args.dry_run)
        return
    if command:
        raise UserError(f"{args.verb} takes no command, and '{shlex.join(command)}' is one")
    job = record.read(folder)
    if job is None or job.backend != args.backend:
        raise UserError(f"no {args.backend} job '{args.name}' has its record in '{args.record}'")
    VERBS[args.verb](job, dry_run=args.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="launch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    backends = parser.add_subparsers(
        dest="backend", metavar="BACKEND", required=True, help=", ".join(BACKENDS)
    )
    for name, backend in BACKENDS.items():
        verbs = backends.add_parser(name, description=backend.LINE).add_subparsers(
            dest="verb", metavar="VERB", required=True, help="run, status, logs or stop"
        )
        for verb in ("run", *VERBS):
            verb_parser = verbs.add_parser(verb)
            verb_parser.add_argument("--name", required=True, help="of the job: a-z, 0-9 and -")
            verb_parser.add_argument(
                "--record",
                type=Path,
                default=Path("runs/launch"),
                metavar="FOLDER",
                help="where NAME/job.json and NAME/logs/ go; %(default)s",
            )
            verb_parser.add_argument(
                "--dry-run",
                action="store_true",
                help="print the shell lines that would be run, and run nothing",
            )
            if verb == "run":
                verb_parser.usage = f"launch.py {name} run --name NAME [OPTION ...] -- COMMAND ..."
                _add_run_arguments(verb_parser)
                backend.add_arguments(verb_parser)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="an environment variable that the command needs; its value is on no command line; repeatable",
    )
    parser.add_argument(
        "--retries", type=int, default=3, metavar="N", help="of a failed attempt; %(default)s"
    )
    parser.add_argument(
        "--backoff",
        type=float,
        default=10,
        metavar="SECONDS",
        help="before the first, then doubling; %(default)s",
    )
    parser.add_argument(
        "--grace", type=float, default=60, metavar="SECONDS", help="from SIGTERM to SIGKILL; %(default)s"
    )


def _new_job(args: argparse.Namespace, folder: Path, command: list[str]) -> Job:
    if not command:
        raise UserError("run needs a command after --, such as: -- cnx2 train --config ... --workdir ...")
    for name, least in (("retries", 0), ("backoff", 0), ("grace", 0)):
        if not least <= getattr(args, name) <= 86_400:
            raise UserError(f"--{name} {getattr(args, name):g} must be {least} to 86400")
    for name in args.env:
        if not name.isidentifier():
            raise UserError(f"--env takes the name of a variable, not '{name.partition('=')[0]}=...'")
        if name not in os.environ:
            raise UserError(f"--env {name}: there is no such environment variable; export it first")
    _check_workdir(command)
    repository, commit = commit_of(Path.cwd())
    fields = {field.name for field in dataclasses.fields(Job)}
    options = {
        key: value
        for key, value in vars(args).items()
        if key not in fields and key not in ("verb", "record", "dry_run")
    }
    job = Job(
        folder=folder,
        name=args.name,
        backend=args.backend,
        command=command,
        commit=commit,
        repository=repository,
        env=args.env,
        options=options,
        retries=args.retries,
        backoff=args.backoff,
        grace=args.grace,
    )
    before = record.read(folder)
    same = before is None or (before.backend, before.command) == (job.backend, job.command)
    if before is not None and not same and before.state != "failed":  # what failed may be put right
        raise UserError(
            f"job '{job.name}' is of another command ({before.backend}: {shlex.join(before.command)}); "
            "give this one another --name"
        )
    return job


def _check_workdir(command: list[str]) -> None:
    for index, word in enumerate(command):
        flag, equals, value = word.partition("=")
        if flag == "--workdir":
            path = value if equals else "".join(command[index + 1 : index + 2])
            if path and not path.startswith("/"):
                raise UserError(
                    f"--workdir {path} would be inside the tree that is unpacked for each attempt; give a "
                    f"path from the root that every host sees, such as {Path.cwd() / path}"
                )


def _run(job: Job, *, dry_run: bool) -> None:
    backend = BACKENDS[job.backend]
    if dry_run:
        print(render(job, backend.plan(job)), end="")
        return
    with held(job):
        supervise(job, backend.plan, submits=backend.SUBMITS)
    print(json.dumps(_summary(job)))
    if job.state == "failed":
        if job.status == USER_ERROR:
            raise UserError(f"job '{job.name}' was asked wrongly, and was not tried again; see its logs")
        raise RunError(
            f"job '{job.name}' failed in attempt {job.attempt} with status {job.status}; see its logs"
        )


def _status(job: Job, *, dry_run: bool) -> None:
    if not dry_run:
        print(json.dumps(_summary(job)))
    _shell(BACKENDS[job.backend].status(job), dry_run)


def _logs(job: Job, *, dry_run: bool) -> None:
    for log in sorted(job.log("*").parent.glob("*.log")):
        if dry_run:
            print(shlex.join(["tail", "-n", str(SHOWN_LINES), str(log)]))
            continue
        print(f"==> {log.stem} <==")
        print("\n".join(log.read_text(errors="replace").splitlines()[-SHOWN_LINES:]))
    _shell(BACKENDS[job.backend].logs(job), dry_run)


def _stop(job: Job, *, dry_run: bool) -> None:
    alive = job.alive()
    if dry_run:
        for name, pid in alive.items():
            if name == LAUNCHER or LAUNCHER not in alive:
                print(f"kill -TERM {'' if name == LAUNCHER else '-'}{pid}  # {name}")
    elif LAUNCHER in alive:
        # It ends the others, and what they left elsewhere.
        os.kill(alive[LAUNCHER], signal.SIGTERM)
        while LAUNCHER in job.alive():
            time.sleep(pid_files.POLL_SECONDS)
    else:
        pid_files.end_groups([job.pid_file(name) for name in alive], job.grace)
    _shell(BACKENDS[job.backend].stop(job), dry_run)
    if not dry_run:
        job = record.read(job.folder) or job
        if job.state in ("running", "submitted"):
            job.state = "stopped"
            job.write()
        print(json.dumps(_summary(job)))


VERBS = {"status": _status, "logs": _logs, "stop": _stop}


def _shell(lines: Sequence[str], dry_run: bool) -> None:
    if dry_run:
        print("\n".join(lines))
        return
    sys.stdout.flush()
    for line in lines:
        try:
            done = subprocess.run(["bash", "-c", script([line])])
        except OSError as error:
            raise UserError(f"cannot run '{error.filename}': {error.strerror}") from None
        if done.returncode:
            raise RunError(f"`{line}` failed with status {done.returncode}")


def _summary(job: Job) -> dict:
    """What is to be known of a job, as JSON."""
    alive = job.alive()
    state = job.state
    if state == "running" and LAUNCHER not in alive:
        state = "orphaned" if alive else "lost"  # the launcher was killed; its processes live on, or not
    summary = {"name": job.name, "backend": job.backend, "state": state, "attempt": job.attempt}
    return {
        **summary,
        "status": job.status,
        "commit": job.commit,
        "alive": sorted(alive),
        "logs": str(job.log("*")),
    }


if __name__ == "__main__":
    sys.exit(main())
