"""Scenes of digits: is FCMAE pretraining on the same images worth its time for segmentation and detection?

  python -m experiments.scenes segment --out runs/scenes
  python -m experiments.scenes detect --out runs/scenes        # takes the same pretraining

Trains `segment:digits` or `detect:digits` with several seeds, from one run of `pretrain:scenes` (`fcmae`) and
from random weights (`scratch`), and scores 400 scenes of digits that training never sees. A seed draws the
head, the order of the images and their crops; without pretraining, the encoder too. Scores are those of the
last evaluation.

Prints a table in Markdown and one JSON line, and writes both and a picture of the curves into a folder of the
task's name in --out. The same command resumes an interrupted study; several with other seeds may run side by
side, once pretraining is done.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.files import write_text
from cnx2_jax.observe.plots import draw_into
from cnx2_jax.observe.report import read_evaluations
from cnx2_jax.observe.tables import markdown_table
from experiments.demo import cnx2
from experiments.small_data import summary

# The metrics to compare, by task; the first one is drawn.
METRICS = {"segment": ("miou", "pixel_accuracy"), "detect": ("box_ap", "mask_ap50", "mask_ap")}
ARMS = ("fcmae", "scratch")

# By arm, the evaluations of each seed's run.
Results = dict[str, list[list[dict]]]


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _main(argv), "scenes")


def _main(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m experiments.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=METRICS, help="what to train")
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument("--seeds", type=count, nargs="+", default=[1, 2, 3, 4, 5], help="1 to 5 by default")
    args = parser.parse_args(argv)
    folder = args.out / args.task
    folder.mkdir(parents=True, exist_ok=True)
    # All runs of a task share one compiled program.
    jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))
    pretrained = args.out / "pretrained"
    if not (pretrained / "result.json").exists():
        cnx2("train", "--config", "pretrain:scenes", "--workdir", pretrained)

    results: Results = {arm: [] for arm in ARMS}
    for seed in args.seeds:
        for arm, runs in results.items():
            workdir = folder / f"{arm}-{seed}"
            if not (workdir / "result.json").exists():
                start = [f"--config.init_from={pretrained}"] if arm == "fcmae" else []
                options = ["--config", f"{args.task}:digits", f"--config.seed={seed}", *start]
                cnx2("train", "--workdir", workdir, *options)
            runs.append(read_evaluations(workdir / "metrics.jsonl", 2**31))
    report(results, METRICS[args.task], folder)


def report(results: Results, metrics: Sequence[str], out: Path) -> None:
    """Prints the table and the JSON line, and writes `table.md`, `results.json` and `curves.png`.

    Args:
      results: the evaluations of each seed's run, by arm; the seeds are the same in both.
      metrics: those to compare.
      out: an existing folder.
    """
    rows, lines = [], []
    for metric in metrics:
        final = {arm: [run[-1][metric] for run in runs] for arm, runs in results.items()}
        gains = [ours - theirs for ours, theirs in zip(*(final[arm] for arm in ARMS), strict=True)]
        columns = [summary(values) for values in (*final.values(), gains)]
        one = len(gains) == 1  # which has no standard error
        rows.append([metric, *(f"{m:.3f}" if one else f"{m:.3f} ± {error:.3f}" for m, error in columns)])
        gain, error = columns[-1]
        lines.append({"metric": metric, **final, "gain": gain, "gain_standard_error": None if one else error})
    table = markdown_table(["last evaluation", *ARMS, "gain, by seed"], rows)
    write_text(out / "table.md", table + "\n")
    write_text(out / "results.json", json.dumps(lines, indent=1) + "\n")
    print(table)
    print(draw_into(out / "curves.png", lambda figure: draw(figure, results, metrics[0])), file=sys.stderr)
    print(json.dumps({"out": str(out), "results": lines}))


def draw(figure, results: Results, metric: str) -> None:
    """Draws each run's metric against its updates, and each arm's mean."""
    figure.set_size_inches(5, 3.2)
    axes = figure.subplots()
    for (arm, runs), colour in zip(results.items(), ("#d94801", "#2171b5"), strict=True):
        steps = [evaluation["step"] for evaluation in runs[0]]
        values = np.array([[evaluation[metric] for evaluation in run] for run in runs])
        axes.plot(steps, values.T, color=colour, linewidth=0.6, alpha=0.5)
        axes.plot(steps, values.mean(axis=0), color=colour, linewidth=1.8, label=arm)
    axes.set_xlabel("updates")
    axes.set_ylabel(f"{metric} on held-out scenes")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    sys.exit(main())
