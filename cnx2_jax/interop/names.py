"""Converts our arrays to state dicts of other libraries and back, and checks all names and shapes."""

import dataclasses
import functools
import math
import re
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from cnx2_jax.errors import UserError, nearest
from cnx2_jax.interop.dialects import (
    BACKBONE_PREFIX,
    BATCHES,
    BLOCKS,
    HUGGINGFACE_PREFIX,
    MARKERS,
    NAMINGS,
    TIMM_CONV_MLP,
    dense,
    our_layout,
    renamer,
    their_layout,
)
from cnx2_jax.models import FCMAE, VARIANTS, ConvNeXtV2, EncoderConfig, MaskRCNN, UperNet
from cnx2_jax.models.convnextv2 import STAGES
from cnx2_jax.models.state import split

_DECODER = ("decoder.", "proj.", "pred.", "mask_token")
_NORM = ("norm.scale", "norm.bias")
_LISTED = 4

# Every naming with each of its prefixes; no file has the markers of two.
_FORMS = (
    ("official", ""),
    ("official", "encoder."),
    ("timm", ""),
    ("huggingface", ""),
    ("huggingface", HUGGINGFACE_PREFIX),
    ("mmdetection", BACKBONE_PREFIX),
    ("official", BACKBONE_PREFIX),  # mmsegmentation's, and mmdetection's with the authors' encoder
    ("huggingface", BACKBONE_PREFIX),
)


@dataclasses.dataclass(frozen=True)
class Heads:
    """The widths of an UperNet's heads.

    Attributes:
      channels: of the decoding head.
      auxiliary_channels: of the auxiliary head.
      pools: levels of pyramid pooling. Their scales are in no tensor; see `facts.read`.
    """

    channels: int
    auxiliary_channels: int
    pools: int


@dataclasses.dataclass(frozen=True)
class DetectorWidths:
    """The widths of a Mask R-CNN's heads.

    Attributes:
      channels: of the feature pyramid, the region proposals and the mask head.
      fc_channels: of the box head.
    """

    channels: int
    fc_channels: int


@dataclasses.dataclass(frozen=True)
class Imported:
    """The arrays of a model, and the properties that follow from their names and shapes.

    Attributes:
      params: parameters and running averages by our dotted name, in our layout, in their original dtype.
      depths, dims, in_chans, patch_size: of the encoder.
      num_classes: 0 if there is no head.
      naming: one of NAMINGS.
      decoder_dim, decoder_depth: of FCMAE's decoder; 0 for a ConvNeXtV2, which has none.
      fresh_norm: whether the final norm was missing, as in all FCMAE encoders; its scale is 1 and its bias 0
        then.
      heads: of an UperNet, otherwise None.
      detector: of a Mask R-CNN, otherwise None.
    """

    params: dict[str, np.ndarray]
    depths: tuple[int, ...]
    dims: tuple[int, ...]
    in_chans: int
    patch_size: int
    num_classes: int
    naming: str
    decoder_dim: int
    decoder_depth: int
    fresh_norm: bool
    heads: Heads | None
    detector: DetectorWidths | None

    @property
    def has_decoder(self) -> bool:
        """Whether this is an FCMAE."""
        return bool(self.decoder_dim)

    @property
    def variant(self) -> str:
        """The key of `models.VARIANTS` with these depths and dims, or `custom`."""
        return variant_of(self.depths, self.dims)


def variant_of(depths: Iterable[int], dims: Iterable[int]) -> str:
    """Returns the key of `models.VARIANTS` with these depths and dims, or `custom`."""
    sizes = (tuple(depths), tuple(dims))
    return next((name for name, v in VARIANTS.items() if (v.depths, v.dims) == sizes), "custom")


def sizes_of(params: Mapping[str, np.ndarray]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns depths and dims of a ConvNeXtV2's, UperNet's or Mask R-CNN's parameters by our names."""
    prefix = BACKBONE_PREFIX if _is_upernet(params) or is_detector(params) else ""
    dims = tuple(len(params[f"{prefix}stages.{stage}.0.dwconv.bias"]) for stage in range(STAGES))
    return _count_blocks(params, re.escape(prefix) + BLOCKS["official"]), dims


def _is_upernet(params: Mapping[str, np.ndarray]) -> bool:
    return "decode_head.conv_seg.bias" in params


def is_detector(names: Iterable[str]) -> bool:
    """Whether these are a Mask R-CNN's names, ours or another library's."""
    return any(name.startswith("roi_head.") for name in names)


def to_torch(params: Mapping[str, np.ndarray], naming: str) -> dict[str, np.ndarray]:
    """Returns a model's arrays under the names and in the layouts of another library.

    Linear weights are `[out, in]`, convolutions `[out, in, rows, columns]`, GRN `[1, 1, 1, C]` (timm: `[C]`).
    Names for Hugging Face are those of ConvNextV2ForImageClassification, without a head of ConvNextV2Model.
    An FCMAE gets the names of the authors' training code with a dense encoder. An UperNet gets those of
    UperNetForSemanticSegmentation, or of mmsegmentation for `official`. A Mask R-CNN gets mmdetection's,
    with the authors' names of the encoder for `official`.

    Args:
      params: parameters of a ConvNeXtV2, an FCMAE, an UperNet or a Mask R-CNN by our names, with all running
        averages.
      naming: one of NAMINGS; only `official` has an FCMAE, timm has no UperNet, timm and `huggingface` have
        no Mask R-CNN, and `mmdetection` has nothing else.

    Returns:
      Contiguous arrays in the dtype of `params`.

    Raises:
      UserError: the naming is unknown, or the library has no such model.
    """
    if naming not in NAMINGS:
        raise UserError(f"unknown naming '{naming}'{nearest(naming, NAMINGS)} (known: {', '.join(NAMINGS)})")
    if "mask_token" in params and naming != "official":
        raise UserError(f"{naming} has no FCMAE; export the encoder alone, or use naming official")
    if _is_upernet(params) and naming == "timm":
        raise UserError("timm has no UperNet; use naming huggingface or official")
    if is_detector(params) and naming in ("timm", "huggingface"):
        raise UserError(f"{naming} has no Mask R-CNN of ConvNeXt V2; use naming mmdetection or official")
    if naming == "mmdetection" and not is_detector(params):
        raise UserError("naming mmdetection is for detectors; use official, timm or huggingface")
    prefixed = naming == "huggingface" and "head.kernel" in params
    rename = renamer(naming, HUGGINGFACE_PREFIX if prefixed else "")
    conv_mlp = naming == "timm" and variant_of(*sizes_of(params)) in TIMM_CONV_MLP
    tensors = {
        rename(name): np.ascontiguousarray(their_layout(name, np.asarray(value), naming, conv_mlp))
        for name, value in params.items()
    }
    averages = [name.removesuffix("running_var") for name in tensors if name.endswith(".running_var")]
    return tensors | {f"{module}{BATCHES}": np.array(0, np.int64) for module in averages}


def from_torch(tensors: Mapping[str, np.ndarray], source: str) -> Imported:
    """Recognises the naming of a state dict and returns its arrays under our names.

    A prefix `module.` is dropped, and so are BatchNorm's numbers of batches. An official state dict may be a
    fine-tuned model, an FCMAE with its decoder, or an encoder with or without the prefix `encoder.`; encoders
    may be dense or MinkowskiEngine's. With the prefix `backbone.` it is an UperNet of mmsegmentation or
    transformers, or a Mask R-CNN of mmdetection, whose encoder may have mmpretrain's names or the authors'.

    Args:
      tensors: the state dict.
      source: the name of the tensors in error messages, such as a path.

    Raises:
      UserError: no naming is recognised, or names are unknown or missing, or shapes are wrong; it lists them.
    """
    if all(name.startswith("module.") for name in tensors):  # DistributedDataParallel's
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
    tensors = {name: value for name, value in tensors.items() if not name.endswith(f".{BATCHES}")}
    form = next((form for form in _FORMS if form[1] + MARKERS[form[0]] in tensors), None)
    if form is None:
        raise UserError(
            f"'{source}' is not a ConvNeXt V2 in official, timm, Hugging Face or mmdetection naming; the "
            f"first of its {len(tensors)} tensor(s): {_listed(tensors) or 'none'}"
        )
    naming, prefix = form
    has_decoder = naming == "official" and any(name.startswith(_DECODER) for name in tensors)
    detects = naming == "mmdetection" or (form == ("official", BACKBONE_PREFIX) and is_detector(tensors))
    segments = prefix == BACKBONE_PREFIX and not detects
    has_heads = detects or segments
    if naming == "official" and not (has_decoder or has_heads):
        tensors, prefix = {name.removeprefix(prefix): value for name, value in tensors.items()}, ""
    if naming == "official":
        tensors = dense(tensors)
    # In an FCMAE and an UperNet, the prefix is part of our names too.
    inside = prefix if has_decoder or has_heads else ""
    rename = renamer(naming, "" if inside else prefix)

    def shape(ours: str) -> tuple[int, ...]:
        if rename(ours) not in tensors:
            raise UserError(f"'{source}' is not a complete {naming} ConvNeXt V2: '{rename(ours)}' is missing")
        return tensors[rename(ours)].shape

    stem = shape(f"{inside}downsample_layers.0.0.kernel")
    if len(stem) != 4:
        name = rename(f"{inside}downsample_layers.0.0.kernel")
        raise UserError(f"'{source}': '{name}' {list(stem)} does not have 4 axes")
    down = [f"{inside}downsample_layers.{stage}.{min(stage, 1)}.bias" for stage in range(STAGES)]
    dims = tuple(math.prod(shape(name)) for name in down)
    depths = _count_blocks(tensors, re.escape(prefix) + BLOCKS[naming])
    head = "decode_head.conv_seg" if segments else "roi_head.bbox_head.fc_cls" if detects else "head"
    has_head = has_heads or any(rename(f"{head}.{leaf}") in tensors for leaf in ("kernel", "bias"))
    in_decoder = {match[1] for name in tensors if (match := re.match(r"decoder\.(\d+)\.", name))}
    imported = Imported(
        params={},
        depths=depths,
        dims=dims,
        in_chans=stem[1],
        patch_size=stem[2],
        # A detector has the background too.
        num_classes=math.prod(shape(f"{head}.bias")) - detects if has_head else 0,
        naming=naming,
        decoder_dim=math.prod(shape("mask_token")) if has_decoder else 0,
        decoder_depth=max(1, len(in_decoder)) if has_decoder else 0,
        fresh_norm=not (has_decoder or has_head or any(rename(name) in tensors for name in _NORM)),
        heads=_heads(tensors, shape) if segments else None,
        detector=_detector_widths(shape) if detects else None,
    )
    absent = _NORM if imported.fresh_norm else ()
    wanted = {name: shape for name, shape in _model_shapes(imported).items() if name not in absent}
    _check(tensors, wanted, rename, naming, source)
    params = {name: our_layout(name, tensors[rename(name)], shape) for name, shape in wanted.items()}
    if imported.fresh_norm:
        params["norm.scale"] = np.ones(dims[-1], np.float32)
        params["norm.bias"] = np.zeros(dims[-1], np.float32)
    return dataclasses.replace(imported, params=params)


def _heads(names: Iterable[str], shape: Callable[[str], tuple[int, ...]]) -> Heads:
    """Returns the widths of an UperNet's heads; `shape` returns a tensor's shape by our name."""
    levels = {match[1] for name in names if (match := re.match(r"decode_head\.psp_modules\.(\d+)\.", name))}
    return Heads(
        channels=math.prod(shape("decode_head.bottleneck.bn.bias")),
        auxiliary_channels=math.prod(shape("auxiliary_head.convs.0.bn.bias")),
        pools=max(1, len(levels)),
    )


def _detector_widths(shape: Callable[[str], tuple[int, ...]]) -> DetectorWidths:
    """Returns the widths of a Mask R-CNN's heads; `shape` returns a tensor's shape by our name."""
    return DetectorWidths(
        channels=math.prod(shape("rpn_head.rpn_conv.bias")),
        fc_channels=math.prod(shape("roi_head.bbox_head.shared_fcs.1.bias")),
    )


def _count_blocks(names: Iterable[str], pattern: str) -> tuple[int, ...]:
    """Returns the number of blocks of each stage, at least 1: then a missing stage is reported."""
    found = {match.groups() for name in names if (match := re.match(pattern, name))}
    return tuple(max(1, sum(stage == str(s) for stage, _ in found)) for s in range(STAGES))


def _model_shapes(model: Imported) -> Mapping[str, tuple[int, ...]]:
    """Returns the shapes of our arrays by name, from the model itself."""
    config = EncoderConfig(model.depths, model.dims, in_chans=model.in_chans, patch_size=model.patch_size)

    if model.detector:
        widths = dataclasses.asdict(model.detector)
        return _shapes(MaskRCNN, config, num_classes=max(1, model.num_classes), **widths)
    if model.heads:
        return _shapes(
            UperNet,
            config,
            num_classes=model.num_classes,
            channels=model.heads.channels,
            auxiliary_channels=model.heads.auxiliary_channels,
            pool_scales=(1,) * model.heads.pools,
        )
    if model.has_decoder:
        return _shapes(FCMAE, config, decoder_dim=model.decoder_dim, decoder_depth=model.decoder_depth)
    return _shapes(ConvNeXtV2, config, num_classes=model.num_classes)


@functools.lru_cache(maxsize=8)  # two seconds for a deep model, and an export reads back what it wrote
def _shapes(kind: type, config: EncoderConfig, **options: Any) -> Mapping[str, tuple[int, ...]]:
    model = nnx.eval_shape(lambda: kind(config, **options, rngs=nnx.Rngs(0)))
    return types.MappingProxyType({name: leaf.shape for name, leaf in split(model)[1].items()})


def _check(
    tensors: Mapping[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    rename: Callable[[str], str],
    naming: str,
    source: str,
) -> None:
    """Raises UserError unless the tensors have exactly the wanted names and shapes."""
    theirs = {rename(name): name for name in wanted}
    misshapen = {}
    for name in theirs.keys() & tensors.keys():
        ours = theirs[name]
        empty = np.broadcast_to(np.float32(0), wanted[ours])  # takes no memory
        right = {their_layout(ours, empty, naming, conv_mlp).shape for conv_mlp in {False, naming == "timm"}}
        if tensors[name].shape not in right:
            shapes = " or ".join(str(list(shape)) for shape in sorted(right, key=len))
            misshapen[name] = f" {list(tensors[name].shape)}, not {shapes}"
    wrong = {
        "unknown": tensors.keys() - theirs.keys(),
        "missing": theirs.keys() - tensors.keys(),
        "misshapen": misshapen.keys(),
    }
    problems = [f"{len(names)} {kind}: {_listed(names, misshapen)}" for kind, names in wrong.items() if names]
    if problems:
        raise UserError(f"'{source}' is not a complete {naming} ConvNeXt V2; tensors {'; '.join(problems)}")


def _listed(names: Iterable[str], remarks: Mapping[str, str] | None = None) -> str:
    """Returns the first names in quotes, each with its remark, and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(f"'{name}'{(remarks or {}).get(name, '')}" for name in names[:_LISTED]) + more
