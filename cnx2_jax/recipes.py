"""Helpers for config files: the arguments after the colon, and values that several recipes share."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from ml_collections import ConfigDict

from cnx2_jax.errors import UserError, nearest


class Finetuning(NamedTuple):
    """The published values of fine-tuning a variant on ImageNet-1K (paper, tables 9 to 11)."""

    base_learning_rate: float
    weight_decay: float
    layer_decay: float
    layer_decay_type: str
    warmup_epochs: int
    epochs: int
    label_smoothing: float
    mixup: float
    cutmix: float
    drop_path: float


FINETUNING = {
    "atto": Finetuning(2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.0, 0.0, 0.1),
    "femto": Finetuning(2e-4, 0.05, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0.0),
    "pico": Finetuning(2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.3, 0.3, 0.0),
    "nano": Finetuning(2e-4, 0.3, 0.9, "single", 0, 600, 0.2, 0.5, 0.5, 0.1),
    "tiny": Finetuning(8e-4, 0.05, 0.9, "single", 40, 300, 0.1, 0.8, 1.0, 0.2),
    "small": Finetuning(8e-4, 0.05, 0.9, "single", 40, 300, 0.1, 0.8, 1.0, 0.2),
    "base": Finetuning(6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1.0, 0.1),
    "large": Finetuning(6.25e-4, 0.05, 0.6, "group", 20, 100, 0.1, 0.8, 1.0, 0.2),
    "huge": Finetuning(1.25e-3, 0.05, 0.75, "group", 10, 50, 0.1, 0.8, 1.0, 0.3),
}

IMAGENET_IMAGES = 1_281_167  # training images of ImageNet-1K, for which the paper's values are meant
FEW_IMAGES = 1000  # fewer than that change no value of `between` any more


def use_digits(config: ConfigDict) -> None:
    """Sets scikit-learn's digits and a network small enough for a CPU, in place."""
    _use_small_network(config)
    config.image_size = (24, 24)
    config.model.in_chans = 1
    config.model.patch_size = 1
    config.data.source = "digits"
    config.data.crop_ratio = (0.9, 1.1)
    config.data.flip = False  # a mirrored 2 is not a 2
    config.data.eval_crop = 1.0
    config.data.mean = (0.3,)
    config.data.std = (0.35,)


def use_scenes(config: ConfigDict) -> None:
    """Sets made-up scenes of digits and a network small enough for a CPU, in place."""
    _use_small_network(config)
    config.image_size = (64, 64)
    config.model.patch_size = 2
    config.data.source = "scenes"


def _use_small_network(config: ConfigDict) -> None:
    config.log_steps = 20
    config.model.variant = "custom"
    config.model.depths = (1, 1, 2, 1)
    config.model.dims = (16, 32, 64, 128)


def use_smoke(config: ConfigDict) -> None:
    """Shrinks a recipe to less than a minute on a CPU, in place: synthetic images, a few steps of atto.

    Everything else stays, so every part of the recipe runs.
    """
    config.image_size = (64, 64)
    config.batch_size = 16
    config.total_steps = 6
    config.log_steps = 1
    config.model.variant = "atto"
    config.data.source = "synthetic:400:8"  # 400 training images, and 16 for validation


def use_imagenet_recipe(config: ConfigDict) -> None:
    """Sets the values that all of the authors' classification recipes share, in place (tables 9 to 13)."""
    config.label_smoothing = 0.1
    config.data.augment = "rand-m9-mstd0.5-inc1"
    config.data.random_erasing = 0.25
    config.optimizer.min_learning_rate = 1e-6


def use_finetuning(config: ConfigDict, variant: str) -> Finetuning:
    """Sets a variant, and the values of its fine-tuning that no data set changes, in place; returns all."""
    recipe = FINETUNING[variant]
    config.model.variant = variant
    config.model.drop_path = recipe.drop_path
    config.model.head_init_scale = 0.001
    config.optimizer.base_learning_rate = recipe.base_learning_rate
    config.optimizer.weight_decay = recipe.weight_decay
    config.optimizer.layer_decay = recipe.layer_decay
    config.optimizer.layer_decay_type = recipe.layer_decay_type
    return recipe


def use_digit_rows(config: ConfigDict) -> None:
    """Sets rows of one to three of scikit-learn's digits and a network small enough for a CPU, in place."""
    use_digits(config)
    config.image_size = (16, 48)
    config.data.source = "digit_rows"
    config.data.crop_ratio = (3.0, 3.0)
    config.data.crop_scale = (1.0, 1.0)  # what a crop leaves out would still be in the labels


def between(images: int, few: float, many: float) -> float:
    """Returns a value for a number of training images, linear in its logarithm, with three digits.

    Args:
      images: how many images there are.
      few: the value for FEW_IMAGES or fewer.
      many: the value for IMAGENET_IMAGES or more.
    """
    share = math.log(max(images, 1) / FEW_IMAGES) / math.log(IMAGENET_IMAGES / FEW_IMAGES)
    return float(f"{few + (many - few) * min(max(share, 0.0), 1.0):.3g}")


def use_batch_for(images: int, config: ConfigDict, smallest: int, largest: int) -> None:
    """Sets the batch for a number of training images and the learning rate for that batch, in place.

    The batch is a power of two, and grows like the square root of the number of images up to `largest` for
    those of ImageNet-1K: both the updates of an epoch and the images of an update grow. The peak learning
    rate goes by the square root of the batch, which is the rule for Adam (Malladi et al. 2022, "On the SDEs
    and scaling rules for adaptive gradient algorithms"); a linear one would leave small batches without
    progress.

    Args:
      images: how many images there are.
      config: its `optimizer.base_learning_rate` is the one for a batch of `largest`.
      smallest, largest: limits of the batch.
    """
    exact = largest * math.sqrt(max(images, 1) / IMAGENET_IMAGES)
    config.batch_size = min(max(2 ** round(math.log2(exact)), smallest), largest)
    # `base_learning_rate` itself is multiplied by batch_size / 256.
    config.optimizer.base_learning_rate *= math.sqrt(largest / config.batch_size)


def parse_argument(argument: str, names: Iterable[str], **options: float | str) -> tuple[str, dict]:
    """Parses the part of `--config FILE:NAME,KEY=VALUE,...` after the colon.

    Args:
      argument: `NAME` or `NAME,KEY=VALUE,...`.
      names: the file's recipes.
      **options: the file's keys with their defaults; a value is read as the type of the default.

    Returns:
      The name, and all options with their values.

    Raises:
      UserError: a name or key is unknown, a value has the wrong type, or a number is not above 0.
    """
    name, *pairs = argument.split(",")
    names = list(names)
    if name not in names:
        raise UserError(f"unknown recipe '{name}'{nearest(name, names)} (known: {', '.join(names)})")
    values = dict(options)
    for pair in pairs:
        key, _, value = pair.partition("=")
        if key not in options:
            known = ", ".join(options) or "none"
            raise UserError(f"unknown config argument '{pair}'{nearest(key, options)} (known: {known})")
        try:
            values[key] = type(options[key])(value)
        except ValueError:
            kind = type(options[key]).__name__
            raise UserError(f"config argument '{pair}': '{value}' is not of type {kind}") from None
        number = values[key]
        if not isinstance(number, str) and not 0 < number < math.inf:
            raise UserError(f"config argument '{pair}': {value} must be above 0")
    return name, values
