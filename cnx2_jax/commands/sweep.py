"""`cnx2 sweep`."""

import argparse
import json
import shlex
import sys

from cnx2_jax.commandline import count
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import RunError
from cnx2_jax.files import local_path
from cnx2_jax.launch import results, runs
from cnx2_jax.tasks import TASKS
from cnx2_jax.train.task import ranked_by

TAKES_OVERRIDES = True
TAKES_COMMAND = True

EXAMPLES = """\
A sweep NAME is a function sweep_NAME() of the config's file. Each run has its workdir in the folder --out.
The same command again resumes the runs that broke off and skips those that have finished. With a backend of
`cnx2 launch` and its options after --, each run is launched as a job of its own. The printed table,
results.csv, results.json and results.png show each run's result, or its latest evaluation, best first.

  cnx2 sweep --config finetune:digits --sweep lr --out runs/lr --workers 2
  cnx2 sweep --config finetune:tiny --sweep lr --out /shared/lr -- slurm --nodes 4 --time 24:00:00
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "cnx2 sweep --config NAME:RECIPE --sweep NAME --out FOLDER [OPTION ...] [-- BACKEND [OPTION ...]]"
    )
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--config",
        required=True,
        metavar="NAME:RECIPE",
        help="a recipe such as finetune:digits, or FILE.py:RECIPE, as for train; change it for all runs with "
        "--config.KEY=VALUE",
    )
    parser.add_argument("--sweep", required=True, metavar="NAME", help="of the function sweep_NAME")
    parser.add_argument(
        "--out", required=True, type=local_path, metavar="FOLDER", help="of the runs' workdirs"
    )
    parser.add_argument(
        "--workers", type=count, default=1, metavar="N", help="runs at a time; %(default)s by default"
    )
    parser.add_argument(
        "--metric", help="of an evaluation, to rank by; by default the one that chooses the best checkpoint"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    parser.add_argument(
        "--table", action="store_true", help="run nothing; show the results of the runs so far"
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    planned = runs.expand(args.config, args.sweep, overrides, args.out)
    config = load_config(args.config, overrides)
    metric = args.metric or ranked_by(TASKS[config.task].best, config)[0]
    commands = {
        one.name: runs.launch_command(one, args.out, args.command) if args.command else one.command
        for one in planned
        if one.state() != "finished"
    }
    if args.dry_run:
        for one in planned:
            print(f"# {one.name}: {one.state()}")
            if one.name in commands:
                print(shlex.join(commands[one.name]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    statuses = {} if args.table else runs.run_all(commands, args.out.absolute(), args.workers)
    rows = results.collect(planned, metric)
    results.write(rows, args.out)
    print(results.table(rows))
    if drawn := results.draw(rows, planned, metric, args.out / "results.png"):
        print(drawn, file=sys.stderr)
    print(json.dumps({"best": rows[0], "results": str(args.out / "results.json")}))
    broken = runs.broken(planned, statuses, launched=bool(args.command))
    if broken:
        raise RunError(
            f"{len(broken)} of {len(planned)} runs broke off ({', '.join(broken[:3])}), see "
            f"{args.out}/{runs.LOG_FOLDER}; the same command resumes them"
        )
