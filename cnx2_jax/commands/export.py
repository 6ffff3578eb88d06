"""`cnx2 export`."""

import argparse
from pathlib import Path

from cnx2_jax.train import checkpoint

TAKES_OVERRIDES = False
FORMATS = ("orbax",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="a workdir or its checkpoints/STEP")
    parser.add_argument("--format", required=True, choices=FORMATS, help="orbax: parameters and card")
    parser.add_argument("--out", required=True, type=Path, help="a new folder")


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    folder = checkpoint.find(args.checkpoint)
    checkpoint.write(args.out, checkpoint.read_params(folder), checkpoint.read_card(folder))
    print(args.out)
