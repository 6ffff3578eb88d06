"""The model that is exported: a network with the size of its images and, optionally, their normalisation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2, MaskRCNN, UperNet
from cnx2_jax.models.convnextv2 import check_size
from cnx2_jax.models.mask_rcnn.heads import MASK_SIDE
from cnx2_jax.models.pixels import normalise

Network = ConvNeXtV2 | UperNet | MaskRCNN

# An array `[B, ...]`, or a detector's by name; see `InferenceModel.outputs`.
Results = Any

NOISE_SQUARE = 32  # pixels; a detector finds nothing in noise without larger shapes


class InferenceModel:
    """A network for inference in float32, with its weights on the host, for images of one size.

    Args:
      model: the network, in any compute dtype; a classifier without a head returns features `[B, dims[3]]`,
        an UperNet logits of every pixel, a MaskRCNN several arrays, see `outputs`.
      size: height and width of the images, which have no padding.
      mean, std: per channel, of the normalisation in training: for pixels from 0 to 1 if `stored` is uint8,
        else in the data's unit.
      uint8: whether the input is uint8 `[B, H, W, C]`, which the model normalises; otherwise it is
        normalised float32.
      stored: the dtype of images before they are normalised.

    Attributes:
      params: float32 arrays by official dotted name, running averages included.
      depths: blocks in each stage.
      shape: `(H, W, C)` of an image.
      dtype: dtype of the images, `float32` or `uint8`.
      outputs: shape and dtype of each result for one image, by name. One of float32: `logits` `(classes,)`,
        `features` `(dim,)`, or an UperNet's `logits` `(H, W, classes)`. A detector's, by falling score:
        `boxes` float32 `(n, 4)`, y0, x0, y1, x1 in pixels; `scores` float32 `(n,)`; `classes` int32 `(n,)`;
        `masks` float32 `(n, 28, 28)`, the probability of each cell of the box; and `count` int32 `()`, how
        many of the n places hold an object. Boxes, scores and classes of the others are 0, their masks
        meaningless.
      network: the network's structure, without arrays.
      encoder_prefix: what precedes the encoder's names in `params`.
      pool_scales: of an UperNet; empty for other networks.

    Raises:
      UserError: the size is not a multiple of the stride.
    """

    def __init__(
        self,
        model: Network,
        size: tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        uint8: bool,
        stored: str = "uint8",
    ):
        check_size(*size, model.stride)
        self.depths = model.config.depths
        self.shape = (*size, model.config.in_chans)
        self.mean, self.std = tuple(mean), tuple(std)
        self.uint8, self.stored = uint8, stored
        self.dtype = np.dtype(np.uint8 if uint8 else np.float32)
        self.encoder_prefix = model.encoder_prefix
        self.pool_scales = model.pool_scales if isinstance(model, UperNet) else ()
        self.outputs = _outputs(model, size)
        self._compiled = jax.jit(self.apply)
        self.network: Network = nnx.eval_shape(lambda: _for_inference(model))
        leaves = nnx.to_flat_state(nnx.state(model))
        self.params = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in leaves}

    def apply(
        self, params: Mapping[str, Array | np.ndarray], images: Shaped[Array, "b height width c"]
    ) -> Results:
        """Returns the results of a batch; JAX traces it."""
        graph, empty = nnx.split(self.network)
        leaves = [
            (path, leaf.replace(jnp.asarray(params[".".join(map(str, path))])))
            for path, leaf in nnx.to_flat_state(empty)
        ]
        if self.uint8:
            images = normalise(images, self.mean, self.std)
        network = nnx.merge(graph, nnx.from_flat_state(leaves))
        if isinstance(network, MaskRCNN):
            return _detected(network, images)
        return network.segment(images) if isinstance(network, UperNet) else network(images)

    def reference(self, images: Shaped[np.ndarray, "b height width c"]) -> Results:
        """Returns the results of the network on the CPU, to which those of an exported one are compared."""
        with jax.default_device(cpu()):
            return jax.tree.map(np.asarray, self._compiled(self.params, images))

    def some_images(self, count: int) -> Shaped[np.ndarray, "b height width c"]:
        """Returns images of noise, the same at every call; for a detector with squares of colour."""
        rng = np.random.default_rng(0)
        height, width, channels = self.shape
        shape = (count, height, width, channels)
        if isinstance(self.network, MaskRCNN):
            cells = (count, -(-height // NOISE_SQUARE), -(-width // NOISE_SQUARE), channels)
            squares = rng.standard_normal(cells, np.float32)
            squares = squares.repeat(NOISE_SQUARE, axis=1).repeat(NOISE_SQUARE, axis=2)
            images = squares[:, :height, :width] + 0.3 * rng.standard_normal(shape, np.float32)
            return np.clip(128 + 64 * images, 0, 255).astype(np.uint8) if self.uint8 else images
        if self.uint8:
            return rng.integers(0, 256, shape, np.uint8)
        return rng.standard_normal(shape, np.float32)


def _outputs(model: Network, size: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the results' shapes and dtypes; see InferenceModel."""
    if isinstance(model, MaskRCNN):
        count = model.detections
        return {
            "boxes": jax.ShapeDtypeStruct((count, 4), jnp.float32),
            "scores": jax.ShapeDtypeStruct((count,), jnp.float32),
            "classes": jax.ShapeDtypeStruct((count,), jnp.int32),
            "masks": jax.ShapeDtypeStruct((count, MASK_SIDE, MASK_SIDE), jnp.float32),
            "count": jax.ShapeDtypeStruct((), jnp.int32),
        }
    width = model.num_classes or model.config.dims[-1]
    shape = (*size, width) if isinstance(model, UperNet) else (width,)
    return {"logits" if model.num_classes else "features": jax.ShapeDtypeStruct(shape, jnp.float32)}


def _detected(network: MaskRCNN, images: Float[Array, "b height width c"]) -> dict[str, Array]:
    """Returns the objects in images that have no padding."""
    batch, height, width, _ = images.shape
    size = jnp.broadcast_to(jnp.array([height, width], jnp.int32), (batch, 2))
    found = network.detect(images, size)
    return {
        "boxes": found.boxes,
        "scores": found.scores,
        "classes": found.classes,
        "masks": found.masks,
        "count": found.valid.sum(axis=1, dtype=jnp.int32),
    }


def _for_inference(model: Network) -> Network:
    """Returns a network of the same arrays that computes in float32."""
    # Not scanned: a scan would stack the weights of its blocks at every call.
    config = dataclasses.replace(model.config, drop_path=0.0, remat="none", scan=False, dtype=jnp.float32)
    if isinstance(model, UperNet):
        return UperNet(
            config,
            num_classes=model.num_classes,
            channels=model.channels,
            auxiliary_channels=model.auxiliary_channels,
            pool_scales=model.pool_scales,
            rngs=nnx.Rngs(0),
        )
    if isinstance(model, MaskRCNN):
        candidates, proposals = model.testing_counts
        return MaskRCNN(
            config,
            num_classes=model.num_classes,
            channels=model.channels,
            fc_channels=model.fc_channels,
            candidates=candidates,
            proposals=proposals,
            detections=model.detections,
            rngs=nnx.Rngs(0),
        )
    return ConvNeXtV2(config, num_classes=model.num_classes, rngs=nnx.Rngs(0))


def cpu() -> jax.Device:
    """Returns the CPU, on which results are compared: accelerators may round the operands of products.

    Raises:
      UserError: JAX_PLATFORMS excludes the CPU.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        raise UserError("an export is checked on the CPU; add cpu to JAX_PLATFORMS") from None
