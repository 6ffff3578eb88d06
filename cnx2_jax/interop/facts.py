"""Preprocessing and class names of a model, in the JSON files of transformers and timm."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from cnx2_jax.errors import UserError
from cnx2_jax.models import VARIANTS

# From this size up, images are warped to the square; below, the centre is cropped. This holds here, in timm's
# configs of ConvNeXt V2 (`crop_mode` squash) and in transformers' ConvNextImageProcessor.
WARP_FROM = 384

HUGGINGFACE_CLASSIFIER = "ConvNextV2ForImageClassification"
HUGGINGFACE_SEGMENTER = "UperNetForSemanticSegmentation"
DETECTOR = "mask_rcnn"
ARRAYS = "cnx2_jax_arrays"  # the key of what `_arrays` returns
IGNORED_LABEL = 255  # of pixels that have no class


@dataclasses.dataclass(frozen=True)
class Facts:
    """The preparation of images, and the names of the classes.

    Attributes:
      class_names: in the order of the logits; empty without a head.
      image_size: height and width.
      eval_crop: share of the resized image's side that is kept by the crop, below WARP_FROM.
      mean, std: per channel, for pixels from 0 to 1; in the data's unit if `dtype` is not uint8.
      eval_sides: the longer and the shorter side that a detector's images are resized to fit in evaluation;
        empty for other models.
      dtype: the images' dtype in files.
      bands: the name of each channel of arrays that are not uint8; empty for other images.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    eval_crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_sides: tuple[int, ...] = ()
    dtype: str = "uint8"
    bands: tuple[str, ...] = ()

    @property
    def of_pixels(self) -> bool:
        """Whether images are pixels of 8 bits, which are all that transformers can prepare."""
        return self.dtype == "uint8"


def huggingface_config(
    facts: Facts, depths: tuple[int, ...], dims: tuple[int, ...], in_chans: int, patch_size: int
) -> dict[str, Any]:
    """Returns the `config.json` that transformers reads; without classes it describes a ConvNextV2Model."""
    return {
        "architectures": [HUGGINGFACE_CLASSIFIER if facts.class_names else "ConvNextV2Model"],
        "model_type": "convnextv2",
        "depths": list(depths),
        "hidden_sizes": list(dims),
        "num_stages": len(dims),
        "num_channels": in_chans,
        "patch_size": patch_size,
        "image_size": _one_number(facts.image_size),
        "hidden_act": "gelu",
        "drop_path_rate": 0.0,
        "layer_norm_eps": 1e-6,  # of the final norm; transformers' default is 1e-12
        **(_labels(facts.class_names) if facts.class_names else {}),
        **_arrays(facts),
    }


def huggingface_upernet_config(
    facts: Facts,
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    in_chans: int,
    patch_size: int,
    *,
    channels: int,
    auxiliary_channels: int,
    pool_scales: tuple[int, ...],
) -> dict[str, Any]:
    """Returns the `config.json` of transformers' UperNetForSemanticSegmentation; see `models.UperNet`."""
    encoder = huggingface_config(
        dataclasses.replace(facts, class_names=()), depths, dims, in_chans, patch_size
    )
    del encoder["architectures"]
    return {
        "architectures": [HUGGINGFACE_SEGMENTER],
        "model_type": "upernet",
        "backbone_config": {**encoder, "out_features": [f"stage{i}" for i in range(1, len(dims) + 1)]},
        "hidden_size": channels,
        "pool_scales": list(pool_scales),
        "use_auxiliary_head": True,
        "auxiliary_loss_weight": 0.4,
        "auxiliary_in_channels": dims[2],
        "auxiliary_channels": auxiliary_channels,
        "auxiliary_num_convs": 1,
        "auxiliary_concat_input": False,
        "loss_ignore_index": IGNORED_LABEL,
        **_labels(facts.class_names),
    }


def _arrays(facts: Facts) -> dict[str, Any]:
    """Returns how arrays that are not uint8 are prepared, which neither library's JSON has a place for.

    Networks get (x - mean) / std of each band, without a division by 255. Both libraries skip the key.
    """
    if facts.of_pixels:
        return {}
    prepared = {"dtype": facts.dtype, "bands": list(facts.bands), "eval_crop": facts.eval_crop}
    return {ARRAYS: {**prepared, "mean": list(facts.mean), "std": list(facts.std)}}


def _labels(names: tuple[str, ...]) -> dict[str, Any]:
    """Returns transformers' names of classes by number, and the inverse."""
    return {
        "id2label": dict(enumerate(names)),
        "label2id": {name: index for index, name in enumerate(names)},
    }


def detector_config(facts: Facts) -> dict[str, Any]:
    """Returns a `config.json` for `read` alone: mmdetection keeps these facts in Python files."""
    return {
        "model_type": DETECTOR,
        "image_size": list(facts.image_size),
        **_labels(facts.class_names),
    }


def detector_preprocessor(facts: Facts) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of a detector, for `read` alone."""
    sides = dict(zip(("longest_edge", "shortest_edge"), facts.eval_sides, strict=True))
    return {"size": sides, "image_mean": list(facts.mean), "image_std": list(facts.std)}


def huggingface_segmenter_preprocessor(facts: Facts) -> dict[str, Any]:
    """Returns the `preprocessor_config.json` of an UperNet, which warps images to `image_size`.

    transformers has no sliding window, so results differ from those of our evaluation.
    """
    height, width = facts.image_size
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": 2,  # PIL's constant for bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts.mean),
        "image_std": list(facts.std),
        "do_reduce_labels": False,
    }


def huggingface_preprocessor(facts: Facts) -> dict[str, Any] | None:
    """Returns the `preprocessor_config.json` of our evaluation; None for oblong images or other dtypes."""
    size = _one_number(facts.image_size)
    if not isinstance(size, int) or not facts.of_pixels:
        return None
    return {
        "image_processor_type": "ConvNextImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size},
        "crop_pct": facts.eval_crop,
        "resample": 3,  # PIL's constant for bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(facts.mean),
        "image_std": list(facts.std),
    }


def timm_config(
    facts: Facts,
    variant: str,
    depths: tuple[int, ...],
    dims: tuple[int, ...],
    in_chans: int,
    patch_size: int,
) -> dict[str, Any]:
    """Returns the `config.json` that timm reads (timm/models/_hub.py, `_parse_model_cfg`).

    Raises:
      UserError: the stem patch is 2; timm would downsample the map once more after it.
    """
    if patch_size == 2:
        raise UserError("timm has no ConvNeXt V2 with model.patch_size 2; use naming huggingface or official")
    arguments: dict[str, Any] = {}
    if variant == "custom":
        arguments |= {"depths": list(depths), "dims": list(dims)}
    if patch_size != 4:
        arguments["patch_size"] = patch_size
    if in_chans != 3:
        arguments["in_chans"] = in_chans
    warped = max(facts.image_size) >= WARP_FROM
    return {
        "architecture": f"convnextv2_{'tiny' if variant == 'custom' else variant}",
        "num_classes": len(facts.class_names),
        "num_features": dims[-1],
        "global_pool": "avg",
        **({"label_names": list(facts.class_names)} if facts.class_names else {}),
        **({"model_args": arguments} if arguments else {}),
        "pretrained_cfg": {
            "tag": "cnx2_jax",
            "custom_load": False,
            "num_classes": len(facts.class_names),
            "input_size": [in_chans, *facts.image_size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0 if warped else facts.eval_crop,
            "crop_mode": "squash" if warped else "center",
            "mean": list(facts.mean),
            "std": list(facts.std),
            "pool_size": None,
            "first_conv": "stem.0",
            "classifier": "head.fc",
        },
        **_arrays(facts),
    }


def read(folder: Path) -> dict[str, Any]:
    """Returns the fields of Facts that the JSON files of transformers or timm in a folder contain.

    For an UperNet of transformers, `pool_scales` is a field too. If `config.json` describes another model
    than ConvNeXt V2, an UperNet or a detector of ours, all JSON files are ignored. Class names that only
    number the classes (`LABEL_0`) are ignored too.

    Raises:
      UserError: the JSON is damaged.
    """
    config, processor = _read_json(folder / "config.json"), _read_json(folder / "preprocessor_config.json")
    try:
        if str(config.get("architecture")).startswith("convnextv2"):
            found = _from_timm(config)
        elif config.get("model_type", "convnextv2") in ("convnextv2", "upernet", DETECTOR):
            found = _from_huggingface(config, processor)
        else:
            return {}
        if ARRAYS in config:
            found |= _from_arrays(config[ARRAYS])
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise UserError(
            f"the JSON in '{folder}' does not describe a model ({error!r}); move it away"
        ) from None
    return {name: value for name, value in found.items() if value}


def _from_arrays(arrays: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that `_arrays` wrote."""
    return {
        "dtype": str(arrays["dtype"]),
        "bands": tuple(map(str, arrays["bands"])),
        "eval_crop": float(arrays["eval_crop"]),
        "mean": tuple(map(float, arrays["mean"])),
        "std": tuple(map(float, arrays["std"])),
    }


def check_sizes(folder: Path, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
    """Raises UserError if the JSON of transformers or timm in a folder describes a model of other sizes."""
    config = _read_json(folder / "config.json")
    if config.get("model_type") == "upernet":
        config = config.get("backbone_config") or {}
    stated = (config.get("depths"), config.get("hidden_sizes"))
    if config.get("model_type") == "convnextv2" and all(stated) and stated != (list(depths), list(dims)):
        raise UserError(
            f"'{folder / 'config.json'}' describes a model with depths {stated[0]} and dims {stated[1]}, the "
            f"weights beside it have {list(depths)} and {list(dims)}; move it away"
        )
    named = str(config.get("architecture")).removeprefix("convnextv2_")
    arguments = config.get("model_args") or {}
    if named in VARIANTS and not {"depths", "dims"} & arguments.keys():
        variant = VARIANTS[named]
        if (variant.depths, variant.dims) != (tuple(depths), tuple(dims)):
            raise UserError(
                f"'{folder / 'config.json'}' describes '{named}', the weights beside it have other sizes; "
                "move it away"
            )


def _from_timm(config: dict[str, Any]) -> dict[str, Any]:
    prepared = config.get("pretrained_cfg", config)
    names = config.get("label_names") or prepared.get("label_names") or ()
    return {
        "class_names": tuple(map(str, names)) if isinstance(names, list | tuple) else _in_order(names),
        "image_size": tuple(map(int, prepared.get("input_size", ())))[1:],
        "eval_crop": float(prepared.get("crop_pct", 0)),
        "mean": tuple(map(float, prepared.get("mean", ()))),
        "std": tuple(map(float, prepared.get("std", ()))),
    }


def _from_huggingface(config: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
    names = _in_order(config.get("id2label") or {})
    numbered = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    size: Any = processor.get("size") or config.get("image_size") or ()
    sides: tuple[int, ...] = ()
    if config.get("model_type") == DETECTOR:
        sides, size = (size["longest_edge"], size["shortest_edge"]), config["image_size"]
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    return {
        "class_names": () if numbered else names,
        "image_size": (size, size) if isinstance(size, int) else tuple(map(int, size)),
        "eval_crop": float(processor.get("crop_pct") or 0),
        "mean": tuple(map(float, processor.get("image_mean") or ())),
        "std": tuple(map(float, processor.get("image_std") or ())),
        "pool_scales": tuple(map(int, config.get("pool_scales") or ())),
        "eval_sides": tuple(map(int, sides)),
    }


def _in_order(names: dict[str, str]) -> tuple[str, ...]:
    return tuple(str(names[str(index)]) for index in range(len(names)))


def _one_number(size: tuple[int, int]) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        return values
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' cannot be read: {error}; move it away") from None
