"""The config keys of detection's data; apart from the code that reads them, which loads TensorFlow."""

from ml_collections import ConfigDict

RANGES: dict[str, tuple[float, float]] = {
    "data.max_instances": (1, 10_000),
    "data.mask_side": (1, 1024),
    "data.eval_long": (1, 1e5),
    "data.eval_short": (1, 1e5),
}


def add_detection_keys(data: ConfigDict) -> None:
    """Adds the keys of detection to `config.data`, with the values of the recipes for COCO.

    `crop_scale`, `crop_ratio`, `eval_crop`, `random_erasing` and `val_fraction` are not read;
    `time_masks` and `frequency_masks` are refused.
    """
    data.train_annotations = "annotations/instances_train2017.json"  # a file in data.root, in COCO's format
    data.train_images = "train2017"  # a folder in data.root
    data.val_annotations = "annotations/instances_val2017.json"  # as train_annotations, for validation
    data.val_images = "val2017"  # as train_images, for validation
    data.max_instances = 100  # objects per training example; of more, the largest are kept
    data.mask_side = 112  # the mask of an object is cropped to its box and resampled to this side
    data.ratio_range = (0.1, 2.0)  # training images are resized to image_size times a random ratio
    data.eval_long = 1333  # the longer side that evaluation images are resized to fit
    data.eval_short = 800  # the shorter one
