"""The formats that a network leaves in, and the way out: written, run by its own runtime, compared, moved.

What stands under the asked name is whole and has been compared, or is not there.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnx2_jax.errors import RunError, UserError
from cnx2_jax.files import creating
from cnx2_jax.interop import safetensors
from cnx2_jax.interop.facts import Facts
from cnx2_jax.interop.inference import InferenceModel

# Largest difference over largest value. float32: sums in another order change atto's logits by less than 1e-6
# of the largest; deeper networks and other processors may take a hundred times that. bfloat16 has 8 bits, so
# weights are off by up to 1/512, at random; that makes less than 1% of atto's logits, five times it passes.
BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2}
IMAGES = 3  # a batch of no size that any writer knows


@dataclasses.dataclass(frozen=True)
class Job:
    """One export.

    Attributes:
      checkpoint: the folder (see `train.checkpoint.find`), for formats that take more than the network.
      model: the network.
      facts: what users of the network must know besides its weights.
      dtype: of the parameters, `float32` or `bfloat16`.
    """

    checkpoint: Path
    model: InferenceModel
    facts: Facts
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
      summary: one line for `--help`.
      write: writes a job's result as a file or folder; OSError if it cannot.
      run: loads that and maps images `[B, H, W, C]` to results `[B, width]`.
      writer: the package that `write` needs.
      runtime: the package that `run` needs.
      extra: the one of cnx2_jax that installs both; empty where they are always there.
    """

    summary: str
    write: Callable[[Path, Job], None]
    run: Callable[[Path, np.ndarray], np.ndarray]
    writer: str
    runtime: str
    extra: str = ""


def of_model(summary: str, module: str, writer: str, runtime: str, extra: str = "") -> Format:
    """Returns the format of a module of this room, which is imported when it is used."""

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
    }[naming]
    return Format(
        "a folder that transformers or timm loads",
        write=lambda path, job: safetensors.write(path, job.model.params, job.facts, naming),
        run=run,
        writer="safetensors",
        runtime=runtime,
        extra=runtime,
    )


FORMATS = {
    "safetensors": of_weights("huggingface"),
    "stablehlo": of_model("a file that JAX alone runs, on CPU, GPU and TPU", "stablehlo", "jax", "jax"),
    "savedmodel": of_model("a folder for TensorFlow", "savedmodel", "tensorflow", "tensorflow"),
    "onnx": of_model("a file for ONNX runtimes", "onnx", "onnx", "onnxruntime", "onnx"),
}


def check_writable(form: Format) -> None:
    """Raises UserError unless the package that writes a format is installed."""
    if importlib.util.find_spec(form.writer) is None:
        raise UserError(f"package '{form.writer}' is not installed; pip install 'cnx2_jax[{form.extra}]'")


def export(out: Path, form: Format, job: Job) -> dict[str, Any]:
    """Writes a job to `out` and returns how far its results are from this network's.

    Returns:
      `runtime` with its version, `max_difference` and, to compare it with, the `largest` value; each None
      where the runtime is not installed.

    Raises:
      UserError: something is there already, or it cannot be written.
      RunError: the results differ by more than `BOUNDS`; nothing is left at `out`.
    """
    with creating(out) as place:
        form.write(place, job)
        return _compare(place, form, job)


def _compare(path: Path, form: Format, job: Job) -> dict[str, Any]:
    package = form.runtime.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return {"runtime": None, "max_difference": None, "largest": None}
    images = job.model.some_images(IMAGES)
    try:
        found = form.run(path, images)
    except safetensors.NoRuntimeError:  # there, but what it needs is not, or does not fit
        return {"runtime": None, "max_difference": None, "largest": None}
    expected = job.model.reference(images)
    if found.shape != expected.shape:
        raise RunError(f"{form.runtime} gives {found.shape} for {expected.shape}; nothing was exported")
    difference, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    bound = BOUNDS[job.dtype]
    if not difference <= bound * largest:  # NaN as well
        raise RunError(
            f"{form.runtime} gives results that differ by {difference:.1e} where the largest is "
            f"{largest:.1e}, more than {bound:.0e} of it, the bound for {job.dtype}; nothing was exported, "
            "please report this"
        )
    version = importlib.import_module(form.runtime).__version__
    return {
        "runtime": f"{form.runtime} {version}",
        "max_difference": difference,
        "largest": largest,
    }
