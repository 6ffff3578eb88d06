"""`cnx2 launch`."""

import argparse
import shlex
from pathlib import Path

from cnx2_jax.errors import UserError
from cnx2_jax.files import local_path
from cnx2_jax.launch import control, request
from cnx2_jax.launch import job as record
from cnx2_jax.launch.backends import BACKENDS

TAKES_OVERRIDES = False
TAKES_COMMAND = True

ACTIONS = {"status": control.status, "logs": control.logs, "stop": control.stop}
EXAMPLES = """\
Every host runs the commit that is checked out here, unpacked afresh for each attempt; the command starts in
that tree. --dry-run prints the commands as a shell script without running them. docs/launch.md has an
example for each backend.

  cnx2 launch local run --name digits --hosts 2 -- \\
      cnx2 train --config pretrain:digits --workdir "$PWD/runs/digits"
  cnx2 launch local status --name digits
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    backends = parser.add_subparsers(
        dest="backend", metavar="BACKEND", required=True, help=", ".join(BACKENDS)
    )
    for name, backend in BACKENDS.items():
        actions = backends.add_parser(name, description=backend.LINE).add_subparsers(
            dest="action", metavar="ACTION", required=True, help="run, status, logs or stop"
        )
        for action in ("run", *ACTIONS):
            action_parser = actions.add_parser(action)
            action_parser.add_argument("--name", required=True, help="of the job: a-z, 0-9 and -")
            action_parser.add_argument(
                "--record",
                type=local_path,
                default=Path("runs/launch"),
                metavar="FOLDER",
                help="where NAME/job.json and NAME/logs/ go; %(default)s by default",
            )
            action_parser.add_argument(
                "--dry-run", action="store_true", help="print the shell commands without running them"
            )
            if action == "run":
                action_parser.usage = f"cnx2 launch {name} run --name NAME [OPTION ...] -- COMMAND ..."
                _add_run_arguments(action_parser)
                backend.add_arguments(action_parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="an environment variable to pass on; its value never appears on a command line; repeatable",
    )
    parser.add_argument(
        "--retries", type=int, default=3, metavar="N", help="after a failed attempt; %(default)s by default"
    )
    parser.add_argument(
        "--backoff",
        type=float,
        default=10,
        metavar="SECONDS",
        help="before the first retry, doubling after each; %(default)s by default",
    )
    parser.add_argument(
        "--grace",
        type=float,
        default=60,
        metavar="SECONDS",
        help="from SIGTERM to SIGKILL; %(default)s by default",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    record.check_name(args.name)
    folder = (args.record / args.name).absolute()
    if args.action == "run":
        where = ("verb", "backend", "action", "name", "record", "dry_run", "command")
        options = {name: value for name, value in vars(args).items() if name not in where}
        job = request.new_job(folder, args.backend, args.command, options)
        control.run(job, dry_run=args.dry_run)
        return
    if args.command:
        raise UserError(f"{args.action} takes no command, but got '{shlex.join(args.command)}'; leave it out")
    found = record.read(folder)
    if found is None or found.backend != args.backend:
        raise UserError(f"no {args.backend} job '{args.name}' has its record in '{args.record}'")
    ACTIONS[args.action](found, dry_run=args.dry_run)
