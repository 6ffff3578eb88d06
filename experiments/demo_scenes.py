"""Pretrain on made-up scenes, segment or detect their digits, and draw the result, on a CPU.

  python -m experiments.demo_scenes segment
  python -m experiments.demo_scenes detect --pretrained runs/segment-DATE-TIME/pretrained

Runs the `cnx2` commands that a user would type, prints each of them, and ends with one JSON line: the scores
on 400 scenes of digits that training never sees, `seconds`, and the paths of the results.
`python -m experiments.scenes` compares with training from random weights.
"""

import argparse
import json
import time
from pathlib import Path

import jax
from PIL import Image

from cnx2_jax.data.sources.digits import split_digits
from cnx2_jax.data.sources.scenes import make_scene
from experiments.demo import cnx2
from experiments.scenes import METRICS

PREDICTED = 4  # images
PICTURES = {"segment": "segmentations", "detect": "detections"}  # where training draws


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo_scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=METRICS, help="what to train")
    parser.add_argument("--out", type=Path, help="a new folder; runs/TASK-DATE-TIME by default")
    parser.add_argument(
        "--pretrained", type=Path, help="a run of pretrain:scenes to use instead of a new one"
    )
    args = parser.parse_args()
    out = args.out or Path("runs") / time.strftime(f"{args.task}-%Y%m%d-%H%M%S")
    begin = time.monotonic()
    out.mkdir(parents=True)
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "compiled"))

    pretrained, workdir = args.pretrained or out / "pretrained", out / "trained"
    if args.pretrained is None:
        cnx2("train", "--config", "pretrain:scenes", "--workdir", pretrained)
    recipe = f"{args.task}:digits"
    trained = cnx2("train", "--config", recipe, f"--config.init_from={pretrained}", "--workdir", workdir)
    scores = json.loads(trained.splitlines()[-1])
    result: dict[str, object] = {metric: scores[metric] for metric in METRICS[args.task]}

    report, drawn = out / "report", out / "drawn"
    cnx2("evaluate", "--workdir", workdir, "--report", report)
    print(cnx2("predict", "--checkpoint", workdir, "--out", drawn, *scene_files(out / "images")))
    pictures = max((workdir / PICTURES[args.task]).glob("*.png"))

    for metric, value in result.items():
        print(f"{metric:<30} {value:.2%}")
    paths = {"pictures": pictures, "report": report, "drawn": drawn, "pretrained": pretrained}
    for name, path in paths.items():
        print(f"{name:<30} {path}")
    result["seconds"] = round(time.monotonic() - begin, 1)
    print(json.dumps({**result, **{name: str(path) for name, path in paths.items()}}))


def scene_files(folder: Path) -> list[Path]:
    """Writes a few validation scenes as PNG files and returns the paths."""
    folder.mkdir()
    digits = split_digits("val")
    paths = [folder / f"scene_{index}.png" for index in range(PREDICTED)]
    for index, path in enumerate(paths):
        Image.fromarray(make_scene(digits, "val", index).image).save(path)
    return paths


if __name__ == "__main__":
    main()
