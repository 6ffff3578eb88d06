"""Composes the network from layers of frameworks that do not read StableHLO."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np

from cnx2_jax.interop.detector import detect
from cnx2_jax.interop.inference import InferenceModel
from cnx2_jax.models import MaskRCNN
from cnx2_jax.models.layers import BATCH_NORM_EPSILON
from cnx2_jax.models.resampling import bilinear_weights, pooling_weights

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

    def conv(self, x: T, name: str) -> T:
        """Convolves with a kernel `[k, k, in, out]`, padded to the same size, and adds its bias, if any."""
        ...

    def scale_shift(self, x: T, name: str, scale: np.ndarray, shift: np.ndarray) -> T:
        """Multiplies and adds numbers per channel."""
        ...

    def relu(self, x: T) -> T: ...

    def resample(self, x: T, name: str, rows: np.ndarray, columns: np.ndarray) -> T:
        """Multiplies the rows of each map by a matrix `[h', h]` and its columns by one `[w', w]`."""
        ...

    def concatenate(self, maps: Sequence[T], name: str) -> T:
        """Concatenates along the channels."""
        ...


def compose(model: InferenceModel, layers: Layers[T], images: T) -> dict[str, T]:
    """Runs the network in a framework's layers and returns its results by name.

    For a detector, `layers` implements `operations.Operations` too.
    """
    maps = _encode(model, layers, layers.normalise(images) if model.uint8 else images)
    if isinstance(model.network, MaskRCNN):
        return detect(model, layers, maps)
    (name,) = model.outputs
    if model.pool_scales:
        return {name: _segment(model, layers, maps)}
    x = layers.layer_norm(layers.mean(maps[-1]), "norm")
    return {name: layers.linear(x, "head") if name == "logits" else x}


def _encode(model: InferenceModel, layers: Layers[T], x: T) -> list[T]:
    """Returns the map of each stage."""
    maps = []
    for stage, depth in enumerate(model.depths):
        down = f"{model.encoder_prefix}downsample_layers.{stage}"
        if stage == 0:
            x = layers.layer_norm(layers.patch_conv(x, f"{down}.0"), f"{down}.1")
        else:
            x = layers.patch_conv(layers.layer_norm(x, f"{down}.0"), f"{down}.1")
        for index in range(depth):
            block = f"{model.encoder_prefix}stages.{stage}.{index}"
            y = layers.layer_norm(layers.depthwise(x, f"{block}.dwconv"), f"{block}.norm")
            y = layers.gelu(layers.linear(y, f"{block}.pwconv1"))
            y = layers.linear(layers.grn(y, f"{block}.grn"), f"{block}.pwconv2")
            x = layers.add(x, y)
        maps.append(x)
    return maps


def _segment(model: InferenceModel, layers: Layers[T], maps: list[T]) -> T:
    """Returns the logits of every pixel: UperNet's decoding head, module by module, without its shortcuts."""
    head = "decode_head"
    patch = model.params[f"{model.encoder_prefix}downsample_layers.0.0.kernel"].shape[0]
    sizes = [tuple(side // (patch * 2**stage) for side in model.shape[:2]) for stage in range(len(maps))]
    maps = [layers.layer_norm(x, f"{model.encoder_prefix}norm{stage}") for stage, x in enumerate(maps)]

    def module(x: T, name: str) -> T:
        norm = {leaf: model.params[f"{name}.bn.{leaf}"] for leaf in ("scale", "bias", "mean", "var")}
        scale = norm["scale"] / np.sqrt(norm["var"] + BATCH_NORM_EPSILON)
        x = layers.conv(x, f"{name}.conv")
        return layers.relu(layers.scale_shift(x, f"{name}.bn", scale, norm["bias"] - norm["mean"] * scale))

    def resized(x: T, name: str, size: tuple[int, ...], to: tuple[int, ...]) -> T:
        rows, columns = (bilinear_weights(*sides) for sides in zip(size, to, strict=True))
        return layers.resample(x, name, rows.astype(np.float32), columns.astype(np.float32))

    pooled = [maps[-1]]
    for index, bins in enumerate(model.pool_scales):
        name = f"{head}.psp_modules.{index}"
        weights = [pooling_weights(side, bins).astype(np.float32) for side in sizes[-1]]
        x = module(layers.resample(maps[-1], f"{name}.0", *weights), f"{name}.1")
        pooled.append(resized(x, f"{name}.resized", (bins, bins), sizes[-1]))
    levels = {3: module(layers.concatenate(pooled, f"{head}.pooled"), f"{head}.bottleneck")}
    for stage in (2, 1, 0):
        above = resized(levels[stage + 1], f"{head}.above{stage}", sizes[stage + 1], sizes[stage])
        levels[stage] = layers.add(above, module(maps[stage], f"{head}.lateral_convs.{stage}"))
    fused = [module(levels[stage], f"{head}.fpn_convs.{stage}") for stage in range(3)] + [levels[3]]
    fused = [fused[0]] + [
        resized(fused[stage], f"{head}.fused{stage}", sizes[stage], sizes[0]) for stage in (1, 2, 3)
    ]
    x = module(layers.concatenate(fused, f"{head}.fused"), f"{head}.fpn_bottleneck")
    x = layers.conv(x, f"{head}.conv_seg")
    return resized(x, f"{head}.logits", sizes[0], model.shape[:2])
