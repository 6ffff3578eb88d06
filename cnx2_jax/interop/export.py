"""Exports a network: writes a format, runs it in its runtime, compares the results, and moves it into place.

A file or folder at the requested path is complete and has been compared.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cnx2_jax.errors import RunError, UserError
from cnx2_jax.files import creating
from cnx2_jax.interop import safetensors
from cnx2_jax.interop.differences import difference
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.inference import InferenceModel, Results

# Bounds on the largest difference, relative to the largest value. float32: another order of summation changes
# atto's logits by less than 1e-6; deeper networks and other processors may need a hundred times that.
# bfloat16 has 8 bits of precision, so weights have random errors up to 1/512, which change atto's logits by
# less than 1%; the bound is five times that.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
# The least share of a detector's objects that must be alike (see `differences`). Rounding decides between
# boxes of equal score or overlap, and then other boxes follow.
ALIKE = 0.9
IMAGES = 3  # a batch size that no writer uses, as exports must work with any


@dataclasses.dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
      checkpoint: the folder (see `checkpoint.find`), for formats that hold more than the network.
      model: the network.
      facts: preprocessing and class names.
      dtype: dtype of the parameters, `float32` or `bfloat16`.
    """

    checkpoint: Path
    model: InferenceModel
    facts: Facts
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
      summary: one line for `--help`.
      write: writes a job to a file or folder; raises OSError.
      run: loads the file or folder and maps images `[B, H, W, C]` to `InferenceModel.outputs`; None if
        nothing here runs the format.
      writer: the package that `write` needs.
      runtime: the package that `run` needs; empty without `run`.
      extra: the extra of cnx2_jax that installs both; empty if they are always installed.
    """

    summary: str
    write: Callable[[Path, Job], None]
    run: Callable[[Path, np.ndarray], Results] | None
    writer: str
    runtime: str
    extra: str = ""


def of_model(summary: str, module: str, writer: str, runtime: str, extra: str = "") -> Format:
    """Returns the format that a module of this folder writes; the module is imported at its first use."""

    def load() -> Any:
        return importlib.import_module(f"cnx2_jax.interop.{module}")

    return Format(
        summary,
        write=lambda path, job: load().write(path, job.model),
        run=lambda path, images: load().run(path, images),
        writer=writer,
        runtime=runtime,
        extra=extra,
    )


def of_weights(naming: str) -> Format:
    """Returns the format of a folder of safetensors, with the names and the JSON of another library."""
    run, runtime = {
        "huggingface": (safetensors.run_huggingface, "transformers"),
        "timm": (safetensors.run_timm, "timm"),
        "mmdetection": (None, ""),
    }[naming]
    return Format(
        "a folder that transformers, timm or mmdetection loads",
        write=lambda path, job: safetensors.write(
            path, job.model.params, job.facts, naming, job.model.pool_scales
        ),
        run=run,
        writer="safetensors",
        runtime=runtime,
        extra=runtime,
    )


FORMATS = {
    "safetensors": of_weights("huggingface"),
    "stablehlo": of_model(
        "a file for JAX on CPU, GPU and TPU, in versions within 6 months", "stablehlo", "jax", "jax"
    ),
    "savedmodel": of_model("a folder for TensorFlow", "savedmodel", "tensorflow", "tensorflow"),
    "onnx": of_model("a file for ONNX runtimes", "onnx", "onnx", "onnxruntime", "onnx"),
}


def check_writable(form: Format) -> None:
    """Raises UserError unless the package that writes a format is installed."""
    if importlib.util.find_spec(form.writer) is None:
        raise UserError(f"package '{form.writer}' is not installed; pip install 'cnx2_jax[{form.extra}]'")


def export(out: Path, form: Format, job: Job) -> dict[str, Any]:
    """Writes a job to `out` and compares its results with those of this network.

    Returns:
      `runtime` with its version, `max_difference`, and the `largest` value to compare it with; all None if
      there is no runtime, or it is not installed. Of a detector also `objects`, how many were compared, and
      the share of them that was `alike`, among which `max_difference` is.

    Raises:
      UserError: `out` exists already or cannot be written.
      RunError: the results differ by more than `BOUNDS`; nothing is left at `out`.
    """
    with creating(out) as place:
        form.write(place, job)
        return _compare(place, form, job)


def _compare(path: Path, form: Format, job: Job) -> dict[str, Any]:
    package = form.runtime.partition(".")[0]
    if form.run is None or importlib.util.find_spec(package) is None:
        return {"runtime": None, "max_difference": None, "largest": None}
    images = job.model.some_images(IMAGES)
    try:
        found = form.run(path, images)
    except safetensors.NoRuntimeError:  # installed, but its requirements are not
        return {"runtime": None, "max_difference": None, "largest": None}
    expected = job.model.reference(images)
    shapes, right = (jax.tree.map(np.shape, results) for results in (found, expected))
    if shapes != right:
        raise RunError(f"{form.runtime} returns shape {shapes}, expected {right}; nothing was exported")
    bound = BOUNDS[job.dtype]
    apart = difference(found, expected, bound)
    if not apart.most <= bound * apart.largest:  # also True for NaN
        raise RunError(
            f"results of {form.runtime} differ by {apart.most:.1e}, more than {bound:.0e} of the largest "
            f"value {apart.largest:.1e}, the bound for {job.dtype}; nothing was exported, please report this"
        )
    if apart.alike < ALIKE:
        raise RunError(
            f"{form.runtime} finds only {apart.alike:.0%} of {apart.objects} objects like the network, less "
            f"than {ALIKE:.0%}; nothing was exported, please report this"
        )
    version = importlib.import_module(form.runtime).__version__
    result = {
        "runtime": f"{form.runtime} {version}",
        "max_difference": apart.most,
        "largest": apart.largest,
    }
    if apart.objects is not None:
        result |= {"objects": apart.objects, "alike": apart.alike}
    return result
