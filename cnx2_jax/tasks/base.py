"""What the tasks share: models from configs and cards, normalisation, starting weights."""

from ml_collections import ConfigDict

from cnx2_jax.configuration import image_hw
from cnx2_jax.data.images import ImageData
from cnx2_jax.errors import UserError
from cnx2_jax.models.convnextv2 import check_size


def check(config: ConfigDict) -> None:
    """Checks what a model can only refuse late: size, channels and normalisation against each other.

    Raises:
      UserError: the image size is no multiple of the stride, or a tuple has not one value per channel.
    """
    model, data = config.model, config.data
    check_size(*image_hw(config), 8 * model.patch_size)
    for name in ("mean", "std"):
        if len(data[name]) != model.in_chans:
            raise UserError(
                f"data.{name} has {len(data[name])} value(s) for model.in_chans {model.in_chans}; give one "
                "per channel"
            )
    if not 0 <= min(data.mean) <= max(data.mean) <= 1:
        raise UserError(f"data.mean {tuple(data.mean)} must be shares of the full range, from 0 to 1")
    if min(data.std) <= 0:
        raise UserError(f"data.std {tuple(data.std)} must be above 0")
    for name in ("crop_scale", "crop_ratio"):
        if len(data[name]) != 2 or not 0 < data[name][0] <= data[name][1]:
            raise UserError(f"data.{name} {tuple(data[name])} must be two numbers above 0, the smaller first")


def open_images(config: ConfigDict) -> ImageData:
    """Opens the images of a config.

    Raises:
      UserError: they cannot be opened (see ImageData), or there are none to evaluate on.
    """
    images = ImageData(config)
    if not images.num_val:
        raise UserError(
            f"no validation images with data.val_fraction {config.data.val_fraction}; raise it, or put some "
            "into a folder val/ beside train/"
        )
    return images
