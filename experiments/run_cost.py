"""Answers how long a run takes and what it costs, where hosts fail and are preempted.

  cnx2 preflight --config pretrain:base --topology v5e:16x16 --config.model.scan=on | tail -1 > base.json
  python -m experiments.run_cost --preflight base.json --epochs 800 --failures-per-day 4 --price 1.2

Failures come at random and independently of each other, as many per day as you say: all hosts together, with
preemptions. A failure loses the updates since the last checkpoint and the time until the run goes on. The
result is the expected time and what `--simulations` drawn runs took, for the best interval between
checkpoints and for shorter and longer ones. Both formulas are Daly's ("A higher order estimate of the optimum
checkpoint interval for restart dumps", 2006); Young's of 1974 is the first order of the interval.

A step takes the time that preflight estimates, which is a guess until you have measured: give --step-seconds
then. `python -m experiments.benchmarks.saving` measures --save-seconds, and the log of a run that starts
again shows --restart-seconds.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.errors import UserError
from cnx2_jax.observe.tables import markdown_table

DAY = 24 * 3600.0
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the best interval


def best_interval(save: float, between: float) -> float:
    """Returns the seconds of work between checkpoints that make a run shortest.

    Args:
      save: seconds that a checkpoint stops the work.
      between: mean seconds between failures.
    """
    if save >= 2 * between:
        return between
    ratio = math.sqrt(save / (2 * between))
    return math.sqrt(2 * save * between) * (1 + ratio / 3 + ratio**2 / 9) - save


def expected_seconds(work: float, interval: float, save: float, restart: float, between: float) -> float:
    """Returns how long a run takes on average.

    Args:
      work: seconds of all steps.
      interval: seconds of work between checkpoints.
      save, between: see `best_interval`.
      restart: seconds from a failure to the first step after it.
    """
    if math.isinf(between):
        return work * (1 + save / interval)
    return between * math.exp(restart / between) * math.expm1((interval + save) / between) * work / interval


def simulate(
    work: float, interval: float, save: float, restart: float, between: float, rng: np.random.Generator
) -> float:
    """Returns how long one run takes whose failures are drawn; arguments as for `expected_seconds`."""
    pieces = work / interval  # the last one may be a part of one
    elapsed, done, starting = 0.0, 0.0, 0.0
    while True:
        alive = rng.exponential(between) if math.isfinite(between) else math.inf
        needed = starting + (pieces - done) * (interval + save)
        if alive >= needed:
            return elapsed + needed
        done += max(0, math.floor((alive - starting) / (interval + save)))
        elapsed += alive
        starting = restart


def step_seconds(preflight: dict) -> float:
    """Returns the seconds per step that `cnx2 preflight` estimates.

    Raises:
      UserError: it has no estimate.
    """
    if "images_per_second_per_host" not in preflight:
        raise UserError("--preflight has no data rate to take the time of a step from; give --step-seconds")
    return preflight["batch_size"] / (preflight["images_per_second_per_host"] * preflight["hosts"])


def parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m experiments.run_cost", description=__doc__)
    parser.add_argument(
        "--preflight", type=Path, required=True, metavar="FILE", help="the JSON line of `cnx2 preflight`"
    )
    parser.add_argument("--epochs", type=_positive, required=True, help="of the run")
    parser.add_argument("--images", type=count, default=1_281_167, help="per epoch; ImageNet-1K's by default")
    parser.add_argument("--step-seconds", type=_positive, help="measured; by default preflight's estimate")
    parser.add_argument("--failures-per-day", type=_not_negative, required=True, help="of all hosts together")
    parser.add_argument(
        "--save-seconds", type=_positive, default=5.0, help="that a checkpoint stops the run; %(default)s"
    )
    parser.add_argument(
        "--restart-seconds",
        type=_not_negative,
        default=300.0,
        help="from a failure to the next step; %(default)s",
    )
    parser.add_argument("--price", type=_not_negative, help="of one chip for an hour, in any currency")
    parser.add_argument("--simulations", type=count, default=1000, help="%(default)s by default")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    return run(lambda: study(parser().parse_args(arguments)), "run_cost")


def study(args: argparse.Namespace) -> None:
    """Prints the table and the JSON line."""
    preflight = _read(args.preflight)
    seconds = args.step_seconds or step_seconds(preflight)
    steps = math.ceil(args.epochs * args.images / preflight["batch_size"])
    between, best = math.inf, steps * seconds  # without failures one checkpoint, at the end, is best
    if args.failures_per_day:
        between = DAY / args.failures_per_day
        best = min(best, best_interval(args.save_seconds, between))
    rng = np.random.default_rng(args.seed)
    rows, results = [], []
    for factor in FACTORS:
        every = min(max(1, round(factor * best / seconds)), steps)
        costs = (steps * seconds, every * seconds, args.save_seconds, args.restart_seconds, between)
        expected = expected_seconds(*costs)
        drawn = np.percentile([simulate(*costs, rng) for _ in range(args.simulations)], (10, 50, 90))
        result = {
            "checkpoint_steps": every,
            "hours": expected / 3600,
            "simulated_hours": [value / 3600 for value in drawn.tolist()],
            "goodput": steps * seconds / expected,
            "chip_hours": expected / 3600 * preflight["devices"],
        }
        shown = {
            "checkpoint_steps": f"{every:,}" + (" (best)" if factor == 1 else ""),
            "minutes between": f"{every * seconds / 60:.3g}",
            "hours": f"{result['hours']:.1f}",
            "10% to 90% of runs": f"{drawn[0] / 3600:.1f} to {drawn[2] / 3600:.1f}",
            "goodput": f"{result['goodput']:.1%}",
            "chip hours": f"{result['chip_hours']:,.0f}",
        }
        if args.price is not None:
            result["cost"] = result["chip_hours"] * args.price
            shown["cost"] = f"{result['cost']:,.0f}"
        rows.append(list(shown.values()))
        results.append(result)
    print(f"{steps:,} steps of {preflight['batch_size']} images on {preflight['devices']} chips,")
    print(f"{seconds:.3g} s each: {steps * seconds / 3600:.1f} hours of steps alone")
    print(markdown_table(list(shown), rows))
    print(json.dumps({"steps": steps, "step_seconds": seconds, "best": results[FACTORS.index(1.0)]}))


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text().strip().splitlines()[-1])
        return {name: found[name] for name in ("batch_size", "devices", "hosts")} | found
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror or error}") from error
    except (ValueError, KeyError, IndexError, TypeError):
        raise UserError(f"'{path}' does not end with the JSON line that `cnx2 preflight` prints") from None


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} must not be negative")
    return value


def _positive(text: str) -> float:
    value = _not_negative(text)
    if not value:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())
