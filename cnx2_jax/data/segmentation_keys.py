"""The config keys of segmentation's data; apart from the code that reads them, which loads TensorFlow."""

from ml_collections import ConfigDict

RANGES: dict[str, tuple[float, float]] = {
    "data.ignore": (0, 255),
    "data.resize_long": (1, 1e5),
    "data.resize_short": (1, 1e5),
    "data.class_share": (0, 1),
    "data.eval_long": (1, 1e5),
    "data.eval_short": (1, 1e5),
}


def add_segmentation_keys(data: ConfigDict) -> None:
    """Adds the keys of segmentation to `config.data`, with the values of the recipes for ADE20K.

    `crop_scale`, `crop_ratio`, `eval_crop` and `random_erasing` are not read;
    `time_masks` and `frequency_masks` are refused.
    """
    data.classes = ""  # a text file with one class name per line; empty: those that ade20k and scenes have
    data.ignore = 255  # the value in masks of pixels that have no class
    data.images = "images"  # folder in data.root
    data.masks = "masks"  # folder in data.root, of PNGs with the names of the images
    data.resize_long = 2048  # the longer side that training images are resized to fit
    data.resize_short = 512  # the shorter one; an image fits both, and keeps its shape
    data.ratio_range = (0.5, 2.0)  # a random ratio that scales both, before image_size is cropped
    data.class_share = 0.75  # a crop is redrawn, up to 10 times, if one class has more of it; 1: never
    data.eval_long = 2048  # the longer side that evaluation images are resized to fit
    data.eval_short = 512  # the shorter one
    data.eval_scales = (1.0,)  # evaluation sizes, times the two sides; predictions are averaged over them
