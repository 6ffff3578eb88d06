"""`cnx2 predict`."""

import argparse
from pathlib import Path

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.pipeline import preprocess_files
from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2
from cnx2_jax.tasks import base
from cnx2_jax.tasks.classify import probabilities

TAKES_OVERRIDES = False
TOP = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a workdir, its checkpoints/STEP, or an exported checkpoint",
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="JPEG, PNG or WebP files")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    model, config, class_names = base.load(args.checkpoint)
    if not isinstance(model, ConvNeXtV2) or not model.num_classes:
        raise UserError(
            f"checkpoint '{args.checkpoint}' is of pretraining and names no classes; fine-tune it first"
        )
    images = preprocess_files(
        args.images, size=image_hw(config), channels=config.model.in_chans, eval_crop=config.data.eval_crop
    )
    width = max(map(len, class_names))
    for path, shares in zip(args.images, probabilities(model, config, images), strict=True):
        print(path)
        for index in shares.argsort()[::-1][:TOP]:
            print(f"  {class_names[index]:<{width}}  {shares[index]:6.2%}")
