"""The names and layouts of one parameter in each library: pure functions on names and NumPy arrays.

Sources: the authors' `models/convnextv2.py`, `models/fcmae.py` and `remap_checkpoint_keys` (`utils.py`);
timm's `models/convnext.py`; transformers' `modeling_convnextv2.py` and `modeling_upernet.py`; for UperNet the
authors' `semantic_segmentation/backbone/convnext.py`, mmsegmentation's `uper_head.py` and `fcn_head.py`; for
Mask R-CNN mmdetection's modules and, as its `projects/ConvNeXt-V2` uses them, `ConvNeXt` and `GRN` of
mmpretrain (`models/backbones/convnext.py`, `models/utils/norm.py`).
"""

import math
import re
from collections.abc import Callable, Mapping

import numpy as np

NAMINGS = ("official", "timm", "huggingface", "mmdetection")

# A name that every file in this naming has, and no file in another naming.
MARKERS = {
    "official": "downsample_layers.0.0.weight",
    "timm": "stem.0.weight",
    "huggingface": "embeddings.patch_embeddings.weight",
    "mmdetection": "stages.0.0.depthwise_conv.weight",
}

# The names of a block's parameters, with groups for stage and index.
BLOCKS = {
    "official": r"stages\.(\d+)\.(\d+)\.",
    "timm": r"stages\.(\d+)\.blocks\.(\d+)\.",
    "huggingface": r"encoder\.stages\.(\d+)\.layers\.(\d+)\.",
    "mmdetection": r"stages\.(\d+)\.(\d+)\.",
}

# transformers' classifier holds the encoder under this prefix; a bare encoder has no prefix.
HUGGINGFACE_PREFIX = "convnextv2."

# UperNet and Mask R-CNN hold the encoder under this prefix, in all namings and here.
BACKBONE_PREFIX = "backbone."

# Mask R-CNN's layers with a layout of their own: PyTorch flattens regions `[C, 7, 7]` for the first, and has
# transposed convolutions as `[in, out, rows, columns]`.
FLATTENED = "roi_head.bbox_head.shared_fcs.0.kernel"
TRANSPOSED = "roi_head.mask_head.upsample.kernel"

# PyTorch's BatchNorm counts its batches too; nothing reads the number while `momentum` is set.
BATCHES = "num_batches_tracked"

# timm computes the linear layers of these variants as 1x1 convolutions, whose weights have two more axes.
TIMM_CONV_MLP = ("atto", "femto", "pico", "nano")

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_HUGGINGFACE_HEADS = {"bn": "batch_norm", "conv_seg": "classifier"}
_MMDETECTION_LAYERS = {"dwconv": "depthwise_conv", "pwconv1": "pointwise_conv1", "pwconv2": "pointwise_conv2"}
_TIMM_LAYERS = {"dwconv": "conv_dw", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2", "grn": "mlp.grn"}


def renamer(naming: str, prefix: str = "") -> Callable[[str], str]:
    """Returns a function that maps our dotted name of a parameter or running average to the library's name.

    Args:
      naming: one of NAMINGS.
      prefix: a prefix for all names except the head's, such as HUGGINGFACE_PREFIX.
    """

    def rename(name: str) -> str:
        *modules, leaf = name.split(".")
        leaf = _LEAVES.get(leaf, leaf)
        if naming == "official":
            return ".".join([*modules, leaf])
        if naming == "mmdetection":
            return ".".join([*(_MMDETECTION_LAYERS.get(module, module) for module in modules), leaf])
        leaf = {"gamma": "weight", "beta": "bias"}.get(leaf, leaf)
        module = _timm_module(modules) if naming == "timm" else _huggingface_module(modules)
        return f"{'' if modules == ['head'] else prefix}{module}.{leaf}"

    return rename


def _timm_module(modules: list[str]) -> str:
    match modules:
        case ["downsample_layers", "0", index]:
            return f"stem.{index}"
        case ["downsample_layers", stage, index]:
            return f"stages.{stage}.downsample.{index}"
        case ["stages", stage, block, layer]:
            return f"stages.{stage}.blocks.{block}.{_TIMM_LAYERS.get(layer, layer)}"
        case ["head"]:
            return "head.fc"
    return "head.norm"


def _huggingface_module(modules: list[str]) -> str:
    match modules:
        case ["downsample_layers", "0", index]:
            return f"embeddings.{('patch_embeddings', 'layernorm')[int(index)]}"
        case ["downsample_layers", stage, index]:
            return f"encoder.stages.{stage}.downsampling_layer.{index}"
        case ["stages", stage, block, layer]:
            return f"encoder.stages.{stage}.layers.{block}.{'layernorm' if layer == 'norm' else layer}"
        case ["head"]:
            return "classifier"
        case ["backbone", norm] if norm.startswith("norm"):
            return f"backbone.hidden_states_norms.stage{int(norm.removeprefix('norm')) + 1}"
        case ["backbone", *inside]:
            return f"backbone.{_huggingface_module(inside)}"
        case ["decode_head" | "auxiliary_head", *inside]:
            return ".".join([modules[0], *(_HUGGINGFACE_HEADS.get(name, name) for name in inside)])
    return "layernorm"


def their_layout(name: str, value: np.ndarray, naming: str, conv_mlp: bool) -> np.ndarray:
    """Returns a view of one of our parameters in the layout of a library.

    Args:
      name: our name of the parameter.
      value: the parameter in our layout.
      naming: one of NAMINGS.
      conv_mlp: whether the block's linear layers are 1x1 convolutions, as in TIMM_CONV_MLP.
    """
    if name.endswith(".kernel"):
        if value.ndim == 3:  # depthwise [rows, columns, channels]
            return value.transpose(2, 0, 1)[:, None]
        if name == TRANSPOSED:
            return value.transpose(2, 3, 0, 1)
        if value.ndim == 4:  # [rows, columns, in, out]
            value = value.transpose(3, 2, 0, 1)
            return value.reshape(len(value), -1) if name == FLATTENED else value
        as_convolution = name in ("proj.kernel", "pred.kernel") or (conv_mlp and ".pwconv" in name)
        return value.T[..., None, None] if as_convolution else value.T
    if ".grn." in name and naming not in ("timm", "mmdetection"):
        return value.reshape(1, 1, 1, -1)
    return value.reshape(1, -1, 1, 1) if name == "mask_token" else value


def our_layout(name: str, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the inverse of `their_layout`: a contiguous array in our layout, of the given shape."""
    if name == TRANSPOSED:
        value = value.transpose(2, 3, 0, 1)
    elif len(shape) == 4:
        rows, columns, features_in, features_out = shape
        value = value.reshape(features_out, features_in, rows, columns).transpose(2, 3, 1, 0)
    elif len(shape) == 3:
        value = value[:, 0].transpose(1, 2, 0)
    elif len(shape) == 2:
        value = value.reshape(value.shape[:2]).T
    return np.ascontiguousarray(value.reshape(shape))


def dense(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts MinkowskiEngine's names and shapes to those of the official dense model; keeps all others.

    Its kernels are `[positions, in, out]`, those of depthwise convolutions `[positions, channels]`. Positions
    are counted column by column (index = column * rows + row). Linear layers and norms are named `.linear`
    and `.ln`; biases of convolutions and GRN are `[1, C]`.
    """
    if not any(name.endswith(".kernel") for name in tensors):
        return dict(tensors)
    found = {}
    for name, value in tensors.items():
        side = math.isqrt(value.shape[0]) if value.ndim else 0
        if name.endswith(".kernel") and value.ndim in (2, 3) and side * side == len(value):
            name = f"{name.removesuffix('kernel')}weight"
            # To [columns, rows, in, out]; depthwise convolutions have in = 1.
            value = value.reshape(side, side, -1, value.shape[-1]).transpose(3, 2, 1, 0)
        elif name.endswith(".bias") and value.ndim == 2 and len(value) == 1:
            value = value[0]
        elif ".grn." in name and value.ndim == 2 and len(value) == 1:
            value = value[None, None]
        found[re.sub(r"\.(linear|ln)\.(weight|bias)$", r".\2", name)] = value
    return found
