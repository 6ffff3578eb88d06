"""What config files are written with: arguments after the colon, and values that several recipes share."""

from collections.abc import Iterable

from ml_collections import ConfigDict

from cnx2_jax.errors import UserError, nearest


def use_digits(config: ConfigDict) -> None:
    """Sets scikit-learn's embedded digits and a network small enough for a CPU, in place."""
    config.image_size = (24, 24)
    config.log_steps = 20
    config.model.variant = "custom"
    config.model.depths = (1, 1, 2, 1)
    config.model.dims = (16, 32, 64, 128)
    config.model.in_chans = 1
    config.model.patch_size = 1
    config.data.source = "digits"
    config.data.crop_ratio = (0.9, 1.1)
    config.data.flip = False  # a mirrored 2 is no 2
    config.data.eval_crop = 1.0
    config.data.mean = (0.3,)
    config.data.std = (0.35,)


def use_smoke(config: ConfigDict) -> None:
    """Shrinks a recipe to less than a minute on a CPU, in place: made-up images, a few steps of atto.

    All else stays as it is, so every part of the recipe runs.
    """
    config.image_size = (64, 64)
    config.batch_size = 16
    config.total_steps = 6
    config.log_steps = 1
    config.model.variant = "atto"
    config.data.source = "synthetic:400:8"  # and 16 to evaluate on


def use_imagenet_recipe(config: ConfigDict) -> None:
    """Sets what all the authors' classification recipes have in common, in place (tables 9 to 13)."""
    config.label_smoothing = 0.1
    config.data.augment = "rand-m9-mstd0.5-inc1"
    config.data.random_erasing = 0.25
    config.optimizer.min_learning_rate = 1e-6


def parse_argument(argument: str, names: Iterable[str], **options: float) -> tuple[str, dict]:
    """Reads what follows the colon of `--config FILE:NAME,KEY=VALUE,...`.

    Args:
      argument: `NAME` or `NAME,KEY=VALUE,...`.
      names: the recipes that the file knows.
      **options: the keys it knows, with their defaults; values are read as the default's type.

    Raises:
      UserError: an unknown name or key, or a value of another type.
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
    return name, values
