"""StableHLO: one file for every platform and batch size, which needs only JAX.

`jax.export.deserialize(path.read_bytes()).call(images)` runs it, in the same JAX version and in those of the
six months that follow; JAX 0.11.1 and newer refuse an older file. In the other direction JAX promises three
weeks. `fun_name` of what `deserialize` returns names the versions that wrote the file.
"""

from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from jax import export
from jaxtyping import Shaped

from cnx2_jax.errors import UserError
from cnx2_jax.interop.inference import InferenceModel, Results, cpu

PLATFORMS = ("cpu", "cuda", "tpu")
LIMIT = 2**31 - 2**26  # bytes of weights: the file is a FlatBuffer of at most 2 GiB


def write(path: Path, model: InferenceModel) -> None:
    """Writes `images -> logits` (or features) with a symbolic batch size; the weights are in the file.

    A detector returns a dictionary; see `InferenceModel.outputs`.

    Raises:
      UserError: the weights are too large for one file.
      OSError: it cannot be written.
    """
    size = sum(value.nbytes for value in model.params.values())
    if size > LIMIT:
        raise UserError(
            f"the weights take {size / 2**30:.1f} GiB, and a stablehlo file holds less than 2; "
            "export as savedmodel or onnx"
        )
    (batch,) = export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *model.shape), model.dtype)

    def forward(images: jax.Array) -> Results:
        return model.apply(model.params, images)

    forward.__name__ = f"cnx2_jax_{version('cnx2_jax')}_with_jax_{version('jax')}_jaxlib_{version('jaxlib')}"
    path.write_bytes(export.export(jax.jit(forward), platforms=PLATFORMS)(images).serialize())


def run(path: Path, images: Shaped[np.ndarray, "b h w c"]) -> Results:
    """Runs a file written by `write`, on the CPU."""
    with jax.default_device(cpu()):
        found = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)(images)
        return jax.tree.map(np.asarray, found)
