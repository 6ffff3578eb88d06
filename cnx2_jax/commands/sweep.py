"""Runs the sweep of a config: a run per set of overrides, here or through launch.py, and a table of results.

  python experiments/sweep.py --config configs/finetune.py:digits --sweep lr --out runs/lr --workers 2
  python experiments/sweep.py --config configs/finetune.py:tiny --sweep lr --out /shared/lr -- \\
      slurm --nodes 4 --time 24:00:00

A sweep is a function `sweep_NAME()` of the config file. Each run has its workdir in the folder --out. The
same command again goes on with the runs that broke off and leaves out those that are finished. The table,
results.csv, results.json and results.png are of each run's latest evaluation, best first.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import RunError
from cnx2_jax.launch import results, runs
from cnx2_jax.launch.local import programs
from cnx2_jax.observe.plots import draw_into

LAUNCH = Path(__file__).parent / "launch.py"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _main(words), "sweep")


def _main(words: list[str]) -> None:
    split = words.index("--") if "--" in words else len(words)
    common = [word for word in words[:split] if word.startswith("--config.")]
    args = _parser().parse_args([word for word in words[:split] if word not in common])
    launch = words[split + 1 :]
    planned = runs.expand(args.config, args.sweep, common, args.out)
    metric = args.metric or results.default_metric(load_config(args.config, common))
    commands = {
        each.name: _launched(each, args.out, launch) if launch else each.command
        for each in planned
        if each.state() != "finished"
    }
    if args.dry_run:
        for each in planned:
            print(f"# {each.name}: {each.state()}")
            if each.name in commands:
                print(shlex.join(commands[each.name]))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    statuses: dict[str, int] = {}
    if not args.table:
        environment = {**os.environ, "PATH": programs()}
        statuses = runs.run_all(commands, args.out.absolute(), args.workers, environment)
    rows = results.collect(planned, metric)
    results.write(rows, args.out)
    print(results.table(rows))
    swept = dict.fromkeys(key for each in planned for key in each.overrides)
    keys = [key for key in swept if len({str(row[key]) for row in rows}) > 1]
    if rows[0][metric] is not None and keys:
        picture = args.out / "results.png"
        print(draw_into(picture, lambda figure: results.draw(figure, rows, keys, metric)), file=sys.stderr)
    print(json.dumps({"best": rows[0], "results": str(args.out / "results.json")}))
    broken = [
        each.name
        for each in planned
        if each.name in statuses and (statuses[each.name] or not (launch or each.state() == "finished"))
    ]
    if broken:
        raise RunError(
            f"{len(broken)} of {len(planned)} runs broke off ({', '.join(broken[:3])}), see "
            f"{args.out}/{runs.LOG_FOLDER}; the same command goes on with them"
        )


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="sweep.py",
        usage="sweep.py --config FILE:RECIPE --sweep NAME --out FOLDER [OPTION ...] [-- BACKEND ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE:RECIPE", help="as for cnx2 train, --config.KEY=VALUE too"
    )
    parser.add_argument("--sweep", required=True, metavar="NAME", help="of the file's function sweep_NAME")
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="of the runs' workdirs")
    parser.add_argument("--workers", type=count, default=1, metavar="N", help="runs at a time; %(default)s")
    parser.add_argument(
        "--metric", help="of an evaluation, to order by; accuracy, or loss for pretraining, by default"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, and run nothing")
    parser.add_argument("--table", action="store_true", help="run nothing; results of what there is")
    return parser


def _launched(each: runs.Run, out: Path, launch: Sequence[str]) -> list[str]:
    """Returns the words that launch a run; its job's name is short, and the same every time."""
    sweep = re.sub("[^a-z0-9]+", "-", out.absolute().name.lower()).strip("-")[:24]
    name = f"sweep-{sweep}-{hashlib.sha256(each.name.encode()).hexdigest()[:8]}"
    backend, *options = launch
    record = ["--name", name, "--record", str(out.absolute() / "launch")]
    return [sys.executable, str(LAUNCH), backend, "run", *record, *options, "--", *each.command]


if __name__ == "__main__":
    sys.exit(main())
