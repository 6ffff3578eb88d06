"""`cnx2 export`."""

import argparse
import json
from pathlib import Path

import numpy as np

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.configuration import image_hw
from cnx2_jax.data.imagenet import describe
from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new
from cnx2_jax.interop import export
from cnx2_jax.interop.export import Format, Job
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.inference import InferenceModel
from cnx2_jax.interop.safetensors import NAMINGS
from cnx2_jax.models import UperNet
from cnx2_jax.observe.progress import say
from cnx2_jax.tasks import models, weights

TAKES_OVERRIDES = False


def _write_orbax(path: Path, job: Job) -> None:
    stored = checkpoint.read_params(job.checkpoint)  # for pretraining including the decoder
    params = {name: leaf.astype(job.dtype) for name, leaf in stored.items()}
    checkpoint.write(path, params, checkpoint.read_metadata(job.checkpoint))


def _run_orbax(path: Path, images: np.ndarray) -> np.ndarray:
    return _inference_model(path, uint8=False).reference(images)


def _inference_model(path: Path, *, uint8: bool) -> InferenceModel:
    model, config, _ = weights.load(path)
    network = model if isinstance(model, UperNet) else models.without_decoder(model)
    return InferenceModel(network, image_hw(config), mean=config.data.mean, std=config.data.std, uint8=uint8)


def _facts(folder: Path, model: InferenceModel) -> Facts:
    metadata = checkpoint.read_metadata(folder)
    size = model.shape[0], model.shape[1]
    names = tuple(map(describe, metadata["class_names"])) if model.output == "logits" else ()
    return Facts(names, size, metadata["config"]["data"]["eval_crop"], model.mean, model.std)


FORMATS = {
    "orbax": Format(
        "a checkpoint folder, for `cnx2` and other readers of Orbax",
        _write_orbax,
        _run_orbax,
        writer="orbax",
        runtime="orbax.checkpoint",
    ),
    **export.FORMATS,
}

# The formats that each option applies to.
OPTIONS = {
    "dtype": ("orbax",),
    "naming": ("safetensors",),
    "input": ("stablehlo", "savedmodel", "onnx"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=Path,
        help="a workdir, its checkpoints/STEP, or an exported checkpoint; for pretraining, all formats but "
        "orbax export only the encoder, which returns features",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="; ".join(f"{name}: {form.summary}" for name, form in FORMATS.items()),
    )
    parser.add_argument("--out", required=True, type=Path, help="the new file or folder")
    parser.add_argument(
        "--dtype",
        choices=export.BOUNDS,
        help=f"dtype of the parameters; float32 by default (for {', '.join(OPTIONS['dtype'])})",
    )
    parser.add_argument(
        "--naming",
        choices=NAMINGS,
        help=f"names of the parameters; huggingface by default (for {', '.join(OPTIONS['naming'])})",
    )
    parser.add_argument(
        "--input",
        choices=("float32", "uint8"),
        help="the model's input: normalised float32 images (the default), or uint8 images from 0 to 255 that "
        f"the model normalises (for {', '.join(OPTIONS['input'])})",
    )


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    for option, formats in OPTIONS.items():
        if getattr(args, option) is not None and args.format not in formats:
            raise UserError(f"--{option} is for --format {', '.join(formats)}, not for {args.format}")
    check_new(args.out, "--out")
    form = FORMATS[args.format] if args.naming is None else export.of_weights(args.naming)
    export.check_writable(form)
    folder = checkpoint.find(args.checkpoint)  # once: a running training may save a later one meanwhile
    if args.format != "orbax" and checkpoint.read_metadata(folder)["config"]["task"] == "detect":
        raise UserError(f"'{folder}' is a detector, which only --format orbax exports so far")
    model = _inference_model(folder, uint8=args.input == "uint8")
    job = Job(folder, model, _facts(folder, model), args.dtype or "float32")
    result = export.export(args.out, form, job)
    if result["runtime"] is None:
        say(f"not checked: '{form.runtime}' cannot be imported; pip install 'cnx2_jax[{form.extra}]'")
    print(json.dumps({"out": str(args.out), "format": args.format, **result}))
