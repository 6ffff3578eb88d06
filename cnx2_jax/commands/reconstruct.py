"""`cnx2 reconstruct`."""

import argparse

from cnx2_jax.errors import UserError
from cnx2_jax.files import local_path, to_path
from cnx2_jax.models import FCMAE
from cnx2_jax.observe.pictures import check_picture, write_picture
from cnx2_jax.tasks import make_task, weights
from cnx2_jax.tasks.pretrain import reconstruct, some_images

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir", required=True, type=to_path, help="a pretraining run, or a checkpoint of one"
    )
    parser.add_argument("--out", required=True, type=to_path, metavar="GRID.png", help="the picture to write")
    parser.add_argument("--seed", type=int, help="seed of the masks; the run's by default")
    parser.add_argument(
        "images",
        nargs="*",
        type=local_path,
        metavar="IMAGE",
        help="JPEG, PNG or WebP files, or arrays; by default some of the run's validation images",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    check_picture(args.out)
    model, config, _ = weights.load(args.workdir)
    if not isinstance(model, FCMAE):
        raise UserError(
            f"'{args.workdir}' is a '{config.task}' run without a decoder; give a pretraining run"
        )
    if args.images:
        from cnx2_jax.data.images import preprocess_files  # loads TensorFlow, so not before it is needed

        images = preprocess_files(args.images, config)
    else:
        images = some_images(make_task(config).data)
    grid = reconstruct(model, config, images, args.seed)
    write_picture(grid, args.out)
    print(args.out)
