"""The model that is exported: a network with the size of its images and, optionally, their normalisation."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from cnx2_jax.errors import UserError
from cnx2_jax.models import ConvNeXtV2, UperNet
from cnx2_jax.models.convnextv2 import check_size
from cnx2_jax.models.pixels import normalise


class InferenceModel:
    """A network for inference in float32, with its weights on the host, for images of one size.

    Args:
      model: the network, in any compute dtype; a classifier without a head returns features `[B, dims[3]]`,
        an UperNet logits of every pixel.
      size: height and width of the images.
      mean, std: per channel, for pixels from 0 to 1, of the normalisation in training.
      uint8: whether the input is uint8 `[B, H, W, C]`, which the model normalises; otherwise it is
        normalised float32.

    Attributes:
      params: float32 arrays by official dotted name, running averages included.
      depths: blocks in each stage.
      shape: `(H, W, C)` of an image.
      dtype: dtype of the images, `float32` or `uint8`.
      output: name of the result, `logits` or `features`.
      result: shape of the result for one image: `(classes,)` or `(dim,)`, and `(H, W, classes)` of an
        UperNet.
      encoder_prefix: what precedes the encoder's names in `params`.
      pool_scales: of an UperNet; empty for a classifier.

    Raises:
      UserError: the size is not a multiple of the stride.
    """

    def __init__(
        self,
        model: ConvNeXtV2 | UperNet,
        size: tuple[int, int],
        *,
        mean: Sequence[float],
        std: Sequence[float],
        uint8: bool,
    ):
        check_size(*size, model.stride)
        self.depths = model.config.depths
        self.shape = (*size, model.config.in_chans)
        self.mean, self.std = tuple(mean), tuple(std)
        self.uint8 = uint8
        self.dtype = np.dtype(np.uint8 if uint8 else np.float32)
        self.output = "logits" if model.num_classes else "features"
        self.encoder_prefix = model.encoder_prefix
        self.pool_scales = model.pool_scales if isinstance(model, UperNet) else ()
        width = model.num_classes or model.config.dims[-1]
        self.result = (*size, width) if self.pool_scales else (width,)
        self._empty = nnx.eval_shape(lambda: _for_inference(model))
        leaves = nnx.to_flat_state(nnx.state(model))
        self.params = {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in leaves}

    def apply(
        self, params: Mapping[str, Array | np.ndarray], images: Shaped[Array, "b height width c"]
    ) -> Float[Array, "b *result"]:
        """Returns logits or features `[B, *result]` in float32; JAX traces it."""
        graph, empty = nnx.split(self._empty)
        leaves = [
            (path, leaf.replace(jnp.asarray(params[".".join(map(str, path))])))
            for path, leaf in nnx.to_flat_state(empty)
        ]
        if self.uint8:
            images = normalise(images, self.mean, self.std)
        network = nnx.merge(graph, nnx.from_flat_state(leaves))
        return network.segment(images) if isinstance(network, UperNet) else network(images)

    def reference(self, images: Shaped[np.ndarray, "b height width c"]) -> Float[np.ndarray, "b *result"]:
        """Returns the result of the network on the CPU, to which that of an exported one is compared."""
        with jax.default_device(cpu()):
            return np.asarray(jax.jit(self.apply)(self.params, images))

    def some_images(self, count: int) -> Shaped[np.ndarray, "b height width c"]:
        """Returns images of noise, the same at every call."""
        rng = np.random.default_rng(0)
        shape = (count, *self.shape)
        if self.uint8:
            return rng.integers(0, 256, shape, np.uint8)
        return rng.standard_normal(shape, np.float32)


def _for_inference(model: ConvNeXtV2 | UperNet) -> ConvNeXtV2 | UperNet:
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
