"""Composes the network from layers of frameworks that do not read StableHLO."""

from typing import Protocol, TypeVar

from cnx2_jax.interop.inference import InferenceModel

T = TypeVar("T")


class Layers(Protocol[T]):
    """A framework's layers on its tensors `[B, h, w, C]`; `name` is the name of our module."""

    def normalise(self, images: T) -> T:
        """Maps uint8 images to float32, as `pixels.normalise` does."""
        ...

    def patch_conv(self, x: T, name: str) -> T:
        """Convolves with a kernel `[p, p, in, out]` at stride p."""
        ...

    def depthwise(self, x: T, name: str) -> T:
        """Convolves each channel with a kernel of `[7, 7, C]`, padded to the same size."""
        ...

    def layer_norm(self, x: T, name: str) -> T: ...

    def linear(self, x: T, name: str) -> T: ...

    def gelu(self, x: T) -> T:
        """Computes the exact GELU, with the error function."""
        ...

    def grn(self, x: T, name: str) -> T:
        """See `models.layers.GRN`."""
        ...

    def add(self, x: T, y: T) -> T: ...

    def mean(self, x: T) -> T:
        """Averages over positions, to `[B, C]`."""
        ...


def compose(model: InferenceModel, layers: Layers[T], images: T) -> T:
    """Runs the network in a framework's layers and returns its logits or features."""
    x = layers.normalise(images) if model.uint8 else images
    for stage, depth in enumerate(model.depths):
        down = f"downsample_layers.{stage}"
        if stage == 0:
            x = layers.layer_norm(layers.patch_conv(x, f"{down}.0"), f"{down}.1")
        else:
            x = layers.patch_conv(layers.layer_norm(x, f"{down}.0"), f"{down}.1")
        for index in range(depth):
            block = f"stages.{stage}.{index}"
            y = layers.layer_norm(layers.depthwise(x, f"{block}.dwconv"), f"{block}.norm")
            y = layers.gelu(layers.linear(y, f"{block}.pwconv1"))
            y = layers.linear(layers.grn(y, f"{block}.grn"), f"{block}.pwconv2")
            x = layers.add(x, y)
    x = layers.layer_norm(layers.mean(x), "norm")
    return layers.linear(x, "head") if model.output == "logits" else x
