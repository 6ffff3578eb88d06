"""Augmentations: sets of photometric and geometric operations, by the names that configs give them."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

from cnx2_jax.data import distortion
from cnx2_jax.data import operations as ops
from cnx2_jax.data.fields import Field
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError, nearest

Fill = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """A random change of an image.

    Attributes:
      draws: how many random numbers it takes.
      apply: maps uint8 [h, w, C] and float32 [draws], uniform in [0, 1), to uint8 [h, w, C].
      geometric: whether some of its operations move pixels.
    """

    draws: int
    apply: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]
    geometric: bool


def make_augmentation(name: str, fill: Fill, fields: Mapping[str, Field]) -> Augmentation | None:
    """Returns the augmentation that `data.augment` names; None for the empty name.

    Args:
      name: "rand-mM[-mstdS][-nN][-pP]-inc1": timm's RandAugment with its increasing set: N operations
        (2), each with probability P (0.5), of magnitude M + S x normal noise within [0, 10]. Or
        "jitter-V": torchvision's ColorJitter(V, V, V), which timm applies in place of RandAugment. Or
        "distort": mmsegmentation's PhotoMetricDistortion.
      fill: the colour, one value per channel, of the pixels that geometric operations uncover.
      fields: of the examples whose images are augmented.

    Raises:
      UserError: the name has another form or numbers out of range, or its operations move pixels of images
        that have a segmentation map, boxes or masks beside them.
    """
    if not name:
        return None
    kind, *settings = name.split("-")
    if kind not in _KINDS:
        raise UserError(
            f"unknown data.augment '{name}'{nearest(kind, _KINDS)}; known: rand-m9-mstd0.5-inc1, jitter-0.4, "
            "distort"
        )
    augmentation = _KINDS[kind](name, settings, fill)
    colourless = next((field for field in fields.values() if not field.eight_bit_colours), None)
    if colourless is not None:
        raise UserError(
            f"data.augment '{name}' changes the colours of RGB or grey images of 8 bits, not {colourless}; "
            "set data.augment=''"
        )
    aligned = next((name for name, field in fields.items() if field.aligned), None)
    if augmentation.geometric and aligned is not None:
        raise UserError(
            f"data.augment '{name}' rotates, shears and shifts images, but not their '{aligned}'; "
            "set data.augment to distort, jitter-0.4 or ''"
        )
    return augmentation


# timm.data.auto_augment: level_to_arg and the set _RAND_INCREASING_TRANSFORMS, in its order, on which the
# meaning of a draw depends. Magnitude m is a tenth of the level, sign is -1 or 1.
Operation = Callable[[tf.Tensor, tf.Tensor, tf.Tensor, Fill], tf.Tensor]


def _enhanced(operation) -> Operation:
    return lambda image, m, sign, _: operation(image, tf.maximum(0.1, 1.0 + sign * m * 0.9))


PHOTOMETRIC: dict[str, Operation] = {
    "autocontrast": lambda image, *_: ops.autocontrast(image),
    "equalize": lambda image, *_: ops.equalize(image),
    "invert": lambda image, *_: ops.invert(image),
    "posterize": lambda image, m, *_: ops.posterize(image, 4 - tf.cast(m * 4, tf.int32)),
    "solarize": lambda image, m, *_: ops.solarize(image, 256 - tf.cast(m * 256, tf.int32)),
    "solarize_add": lambda image, m, *_: ops.solarize_add(image, tf.cast(m * 110, tf.int32)),
    "color": _enhanced(ops.color),
    "contrast": _enhanced(ops.contrast),
    "brightness": _enhanced(ops.brightness),
    "sharpness": _enhanced(ops.sharpness),
}
GEOMETRIC: dict[str, Operation] = {
    "rotate": lambda image, m, sign, fill: ops.rotate(image, sign * m * 30, fill),
    "shear_x": lambda image, m, sign, fill: ops.shear_x(image, sign * m * 0.3, fill),
    "shear_y": lambda image, m, sign, fill: ops.shear_y(image, sign * m * 0.3, fill),
    "translate_x": lambda image, m, sign, fill: ops.translate_x(image, sign * m * 0.45, fill),
    "translate_y": lambda image, m, sign, fill: ops.translate_y(image, sign * m * 0.45, fill),
}
INCREASING: dict[str, Operation] = {
    name: (PHOTOMETRIC | GEOMETRIC)[name]
    for name in (
        "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
        "color", "contrast", "brightness", "sharpness",
        "shear_x", "shear_y", "translate_x", "translate_y",
    )
}  # fmt: skip


def rand_augment(
    operations: Sequence[Operation],
    fill: Fill,
    *,
    layers: int,
    probability: float,
    magnitude: float,
    deviation: float,
) -> Augmentation:
    """Applies `layers` operations in turn, each drawn from all with a probability (timm's RandAugment).

    Magnitudes are normal around `magnitude`, clipped to [0, 10].
    """
    per_layer = 4

    def apply(image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        for layer in range(layers):
            choice, chance, noise, side = tf.unstack(draws[layer * per_layer : (layer + 1) * per_layer])
            level = sampled_magnitude(noise, magnitude, deviation) / 10
            sign = tf.where(side > 0.5, -1.0, 1.0)
            branches = [
                lambda operation=operation, image=image: operation(image, level, sign, fill)  # noqa: B023
                for operation in operations
            ]
            chosen = tf.cast(choice * len(branches), tf.int32)
            skipped = tf.where(chance > probability, len(branches), chosen)
            image = tf.switch_case(skipped, [*branches, lambda image=image: image])
        return image

    moving = set(GEOMETRIC.values())
    return Augmentation(layers * per_layer, apply, geometric=any(each in moving for each in operations))


def sampled_magnitude(draw: tf.Tensor, magnitude: float, deviation: float) -> tf.Tensor:
    """Turns a uniform draw into a normal one around `magnitude`, clipped to [0, 10]."""
    # ndtri(0) is infinite.
    normal = tf.math.ndtri(tf.maximum(draw, 1e-7))
    return tf.clip_by_value(magnitude + deviation * normal, 0.0, 10.0)


def colour_jitter(strength: float) -> Augmentation:
    """Changes brightness, contrast and saturation in random order, by factors uniform in 1 +- `strength`."""
    kinds = (ops.brightness, ops.contrast, ops.color)
    low, high = max(0.0, 1 - strength), 1 + strength

    def apply(image: tf.Tensor, draws: tf.Tensor) -> tf.Tensor:
        order = tf.argsort(draws[: len(kinds)])
        factors = low + (high - low) * draws[len(kinds) :]
        for place in range(len(kinds)):
            branches = [
                lambda kind=kind, factor=factor, image=image: kind(image, factor)
                for kind, factor in zip(kinds, tf.unstack(factors), strict=True)
            ]
            image = tf.switch_case(order[place], branches)
        return image

    return Augmentation(2 * len(kinds), apply, geometric=False)


def _parse_rand(name: str, settings: Sequence[str], fill: Fill) -> Augmentation:
    values, given = {"m": 10.0, "mstd": 0.0, "n": 2.0, "p": 0.5, "inc": 0.0}, set[str]()
    for setting in settings:
        match = re.fullmatch(r"([a-z]+)([0-9]+(?:\.[0-9]+)?)", setting)
        if match is None or match[1] not in values or match[1] in given:
            known = ", ".join(f"{key}NUMBER" for key in values)
            raise UserError(f"data.augment '{name}': '{setting}' must be one of {known}, each at most once")
        given.add(match[1])
        values[match[1]] = float(match[2])
    if values["inc"] != 1:
        raise UserError(f"data.augment '{name}': only timm's increasing operations are supported; add -inc1")
    if not (values["m"] <= 10 and values["p"] <= 1 and 1 <= values["n"] <= 16 and values["n"] % 1 == 0):
        raise UserError(f"data.augment '{name}': m must be at most 10, p at most 1, n from 1 to 16")
    return rand_augment(
        list(INCREASING.values()),
        fill,
        layers=int(values["n"]),
        probability=values["p"],
        magnitude=values["m"],
        deviation=values["mstd"],
    )


def _parse_jitter(name: str, settings: Sequence[str], fill: Fill) -> Augmentation:
    del fill  # no pixels are uncovered
    try:
        (strength,) = map(float, settings)
        if not 0 < strength <= 1:
            raise ValueError
    except ValueError:
        raise UserError(f"data.augment '{name}' must be jitter-V, V above 0 and at most 1") from None
    return colour_jitter(strength)


def _parse_distort(name: str, settings: Sequence[str], fill: Fill) -> Augmentation:
    if settings:
        raise UserError(f"data.augment '{name}': distort has no settings; set it to distort")
    if len(fill) != 3:  # one value per channel
        raise UserError(
            f"data.augment '{name}' changes hues, but images have {len(fill)} channel; set it to jitter-0.4"
        )
    return Augmentation(distortion.DRAWS, distortion.distort, geometric=False)


_KINDS: dict[str, Callable[[str, Sequence[str], Fill], Augmentation]] = {
    "rand": _parse_rand,
    "jitter": _parse_jitter,
    "distort": _parse_distort,
}
