"""Pretrain, fine-tune, evaluate, predict, reconstruct and export on a CPU in minutes.

  python -m experiments.demo

Runs the `cnx2` commands that a user would type, prints each of them, and ends with one JSON line: `accuracy`
after FCMAE pretraining and fine-tuning, `accuracy_scratch` with the same fine-tuning budget from random
weights, both again with 10 labels per class, `seconds`, and the paths of the results. The data are
scikit-learn's digits; all accuracies are those on the 359 that training never sees.
"""

import argparse
import contextlib
import io
import json
import shlex
import sys
import time
from pathlib import Path

import jax
from PIL import Image

from cnx2_jax import cli
from cnx2_jax.configuration import load_config
from cnx2_jax.data.images import ImageData

PREDICTED = 3  # images


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="a new folder; runs/demo-DATE-TIME by default")
    out = parser.parse_args().out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    begin = time.monotonic()
    out.mkdir(parents=True)

    # Fine-tuning and training from scratch share one compiled program.
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "compiled"))

    pretrain, finetune = "pretrain:digits", "finetune:digits"
    cnx2("train", "--config", pretrain, "--workdir", out / "pretrained")
    runs = {
        "accuracy": ("finetuned", finetune, True),
        "accuracy_scratch": ("scratch", finetune, False),
        "accuracy_10_per_class": ("finetuned_10", f"{finetune},labels=10", True),
        "accuracy_scratch_10_per_class": ("scratch_10", f"{finetune},labels=10", False),
    }
    result: dict[str, object] = {}
    for metric, (name, config, pretrained) in runs.items():
        start = [f"--config.init_from={out / 'pretrained'}"] if pretrained else []
        trained = cnx2("train", "--config", config, *start, "--workdir", out / name)
        result[metric] = json.loads(trained.splitlines()[-1])["accuracy"]

    cnx2("evaluate", "--workdir", out / "finetuned")
    picture, exported = out / "reconstructions.png", out / "exported"
    cnx2("reconstruct", "--workdir", out / "pretrained", "--out", picture)
    cnx2("export", "--checkpoint", out / "finetuned", "--format", "orbax", "--out", exported)
    print(cnx2("predict", "--checkpoint", exported, *digit_files(finetune, out / "images")))

    for metric, value in result.items():
        print(f"{metric:<30} {value:.2%}")
    print(f"{'reconstructions':<30} {picture}")
    print(f"{'exported checkpoint':<30} {exported}")
    result["seconds"] = round(time.monotonic() - begin, 1)
    paths = {"reconstructions": picture, "exported": exported, "pretrained": out / "pretrained"}
    print(json.dumps({**result, **{name: str(path) for name, path in paths.items()}}))


def cnx2(*values: object) -> str:
    """Runs `cnx2` with these arguments, shows the command and its progress, and returns its standard output.

    Runs in this process, because starting Python, JAX and TensorFlow for each command would take a minute.
    """
    arguments = [str(value) for value in values]
    print(f"\n$ cnx2 {shlex.join(arguments)}", file=sys.stderr, flush=True)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = cli.main(arguments)
    if status:
        sys.exit(status)  # the command has printed the reason
    if not output.getvalue():
        sys.exit(1)  # a signal stopped the command, which has printed so
    return output.getvalue()


def digit_files(config: str, folder: Path) -> list[Path]:
    """Writes a few validation digits as PNG files named after their labels, and returns the paths."""
    folder.mkdir()
    batch = next(iter(ImageData(load_config(config)).eval_batches()))
    paths = []
    for index in range(PREDICTED):
        paths.append(folder / f"{index}_is_a_{batch['label'][index]}.png")
        Image.fromarray(batch["image"][index, :, :, 0]).save(paths[-1])
    return paths


if __name__ == "__main__":
    main()
