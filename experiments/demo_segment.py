"""Pretrain on made-up scenes, segment their digits, and draw the result, on a CPU.

  python -m experiments.demo_segment

Runs the `cnx2` commands that a user would type, prints each of them, and ends with one JSON line: `miou`
after FCMAE pretraining on the same images, `miou_scratch` with the same training from random weights,
`seconds`, and the paths of the results. Scores are of 400 scenes of digits that training never sees.
"""

import argparse
import json
import time
from pathlib import Path

import jax
from PIL import Image

from cnx2_jax.configuration import load_config
from cnx2_jax.data.segmentation import SegmentationData
from experiments.demo import cnx2

PREDICTED = 4  # images


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.demo_segment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, help="a new folder; runs/segment-DATE-TIME by default")
    parser.add_argument(
        "--pretrained", type=Path, help="a run of pretrain:scenes to use instead of a new one"
    )
    parser.add_argument("--steps", type=int, help="of segmentation; those of segment:digits by default")
    args = parser.parse_args()
    out = args.out or Path("runs") / time.strftime("segment-%Y%m%d-%H%M%S")
    begin = time.monotonic()
    out.mkdir(parents=True)
    jax.config.update("jax_compilation_cache_dir", str(out.absolute() / "compiled"))

    pretrained = args.pretrained or out / "pretrained"
    if args.pretrained is None:
        cnx2("train", "--config", "pretrain:scenes", "--workdir", pretrained)
    segment = f"segment:digits,steps={args.steps}" if args.steps else "segment:digits"
    result: dict[str, object] = {}
    for metric, start in {"miou": [f"--config.init_from={pretrained}"], "miou_scratch": []}.items():
        workdir = out / metric.replace("miou", "segmented")
        trained = cnx2("train", "--config", segment, *start, "--workdir", workdir)
        result[metric] = json.loads(trained.splitlines()[-1])["miou"]

    workdir, report, drawn = out / "segmented", out / "report", out / "drawn"
    cnx2("evaluate", "--workdir", workdir, "--report", report)
    print(cnx2("predict", "--checkpoint", workdir, "--out", drawn, *scene_files(segment, out / "images")))
    pictures = max((workdir / "segmentations").glob("*.png"))

    for metric, value in result.items():
        print(f"{metric:<30} {value:.2%}")
    paths = {"pictures": pictures, "report": report, "drawn": drawn, "pretrained": pretrained}
    for name, path in paths.items():
        print(f"{name:<30} {path}")
    result["seconds"] = round(time.monotonic() - begin, 1)
    print(json.dumps({**result, **{name: str(path) for name, path in paths.items()}}))


def scene_files(config: str, folder: Path) -> list[Path]:
    """Writes a few validation scenes as PNG files and returns the paths."""
    folder.mkdir()
    batch = next(iter(SegmentationData(load_config(config)).eval_batches()))
    paths = []
    for index in range(PREDICTED):
        paths.append(folder / f"scene_{index}.png")
        Image.fromarray(batch["image"][index]).save(paths[-1])
    return paths


if __name__ == "__main__":
    main()
