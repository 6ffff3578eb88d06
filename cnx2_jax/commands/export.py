"""`cnx2 export`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cnx2_jax.bands import used_names
from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.commandline import count
from cnx2_jax.configuration import image_hw
from cnx2_jax.data.imagenet import describe
from cnx2_jax.errors import UserError
from cnx2_jax.files import check_new, to_path
from cnx2_jax.interop import export
from cnx2_jax.interop.export import Format, Job
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.inference import InferenceModel, Network, Results
from cnx2_jax.interop.safetensors import NAMINGS
from cnx2_jax.models import MaskRCNN, UperNet
from cnx2_jax.observe.progress import say
from cnx2_jax.tasks import models, weights

TAKES_OVERRIDES = False

# As checkpoints, which hold all anyway. A detector in bfloat16 finds other boxes, so its encoder is compared.
COMPARED_WHOLE = (UperNet,)


def _write_orbax(path: Path, job: Job) -> None:
    stored = checkpoint.read_params(job.checkpoint)  # for pretraining including the decoder
    params = {name: leaf.astype(job.dtype) for name, leaf in stored.items()}
    checkpoint.write(path, params, checkpoint.read_metadata(job.checkpoint))


def _run_orbax(path: Path, images: np.ndarray) -> Results:
    return _inference_model(path, whole=COMPARED_WHOLE).reference(images)


def _inference_model(
    path: Path,
    *,
    whole: tuple[type, ...] = (UperNet, MaskRCNN),
    uint8: bool = False,
    image_size: Sequence[int] | None = None,
) -> InferenceModel:
    """Returns the network of a checkpoint; of one that is neither a classifier nor in `whole`, the encoder.

    Args:
      path: see `checkpoint.find`.
      whole: classes of models.
      uint8: see InferenceModel.
      image_size: a side, or height and width; by default those of evaluation.
    """
    loaded, task = weights.load_task(path)
    model, config = task.exported(loaded), task.config
    network: Network = model
    if not isinstance(model, whole):
        network = models.without_decoder(model)
    if image_size:
        size = image_size[0], image_size[-1]
    elif isinstance(network, MaskRCNN):  # of its largest landscape images, with the padding that all have
        height, width = config.data.eval_short, config.data.eval_long
        size = -(-height // network.stride) * network.stride, -(-width // network.stride) * network.stride
    else:
        size = image_hw(config)
    data = config.data
    return InferenceModel(network, size, mean=data.mean, std=data.std, uint8=uint8, stored=data.dtype)


def _facts(folder: Path, model: InferenceModel) -> Facts:
    metadata = checkpoint.read_metadata(folder)
    config = metadata["config"]
    size, data = config["image_size"], config["data"]
    sides = (data["eval_long"], data["eval_short"]) if config["task"] == "detect" else ()
    names = () if "features" in model.outputs else tuple(map(describe, metadata["class_names"]))
    facts = Facts(names, (size[0], size[-1]), data["eval_crop"], model.mean, model.std, sides, model.stored)
    if facts.of_pixels:
        return facts
    return dataclasses.replace(facts, bands=used_names(ConfigDict(data), len(model.mean)))


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
    "image_size": ("stablehlo", "savedmodel", "onnx"),
}

DETECTORS = """\
A detector is exported whole, from images without padding to the objects in each, by falling score: boxes
(y0, x0, y1, x1 in pixels), scores, classes, masks (28x28 probabilities over the box), and count: how many of
the places hold an object. The image size is fixed, the batch size is not.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        type=to_path,
        help="a workdir, its checkpoints/STEP, or an exported checkpoint; for pretraining, all formats but "
        "orbax export only the encoder, which returns features",
    )
    parser.add_argument(
        "--format",
        required=True,
        choices=FORMATS,
        help="; ".join(f"{name}: {form.summary}" for name, form in FORMATS.items()),
    )
    parser.add_argument("--out", required=True, type=to_path, help="the new file or folder")
    parser.add_argument(
        "--dtype",
        choices=export.BOUNDS,
        help=f"dtype of the parameters; float32 by default (for {', '.join(OPTIONS['dtype'])})",
    )
    parser.add_argument(
        "--naming",
        choices=NAMINGS,
        help="names of the parameters; huggingface by default, for a detector mmdetection, its only one (for "
        f"{', '.join(OPTIONS['naming'])})",
    )
    parser.add_argument(
        "--input",
        choices=("float32", "uint8"),
        help="the model's input: normalised float32 images (the default), or uint8 images from 0 to 255 that "
        f"the model normalises (for {', '.join(OPTIONS['input'])})",
    )
    parser.add_argument(
        "--image-size",
        type=count,
        nargs="+",
        metavar="N",
        help="side, or height and width, of the images in pixels; by default those of evaluation, for a "
        f"detector of its largest landscape images (for {', '.join(OPTIONS['image_size'])})",
    )
    parser.epilog = DETECTORS


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    for option, formats in OPTIONS.items():
        if getattr(args, option) is not None and args.format not in formats:
            name = option.replace("_", "-")
            raise UserError(f"--{name} is for --format {', '.join(formats)}, not for {args.format}")
    if args.image_size and len(args.image_size) > 2:
        raise UserError(f"--image-size takes a side, or height and width, not {len(args.image_size)} numbers")
    check_new(args.out, "--out")
    form = FORMATS[args.format]
    export.check_writable(form)
    folder = checkpoint.find(args.checkpoint)  # once: a running training may save a later one meanwhile
    dtype = checkpoint.read_metadata(folder)["config"]["data"].get("dtype", "uint8")
    if args.input == "uint8" and dtype != "uint8":
        raise UserError(f"--input uint8: '{args.checkpoint}' is of images of {dtype}; give --input float32")
    if args.format == "orbax":
        model = _inference_model(folder, whole=COMPARED_WHOLE)
    else:
        model = _inference_model(folder, uint8=args.input == "uint8", image_size=args.image_size)
    if args.format == "safetensors":
        usual = "mmdetection" if isinstance(model.network, MaskRCNN) else "huggingface"
        form = export.of_weights(args.naming or usual)
        if model.stored != "uint8":
            say(
                f"neither library prepares arrays of {model.stored}: config.json has the mean and deviation "
                "of the bands, and (x - mean) / std is yours to compute"
            )
    job = Job(folder, model, _facts(folder, model), args.dtype or "float32")
    result = export.export(args.out, form, job)
    if form.run is None:
        say("read back bit for bit, but not run: no runtime is known for these names")
    elif result["runtime"] is None:
        say(f"not checked: '{form.runtime}' cannot be imported; pip install 'cnx2_jax[{form.extra}]'")
    print(json.dumps({"out": str(args.out), "format": args.format, **result}))
