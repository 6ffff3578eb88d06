"""Folders of images with annotations in COCO's format: object detection and instance segmentation."""

import os
from typing import Any

import numpy as np

from cnx2_jax.data.fields import Image
from cnx2_jax.data.sources.base import Source
from cnx2_jax.data.sources.coco_file import CocoFile, read_coco_file
from cnx2_jax.data.sources.folder import existing_folder, image_names
from cnx2_jax.data.sources.objects import object_fields, object_reader
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError


def open_coco(data: Any, split: str) -> Source:
    """Opens the images of one split and their objects.

    Reads the whole file of annotations, and keeps it as arrays: for the 118,000 images of COCO's train2017 a
    few hundred megabytes. Images are read and masks rasterised one by one, when their records are asked for.

    Args:
      data: `config.data`. Read here: `root`, and the paths in it `train_annotations`, `train_images`,
        `val_annotations` and `val_images`.
      split: "train" or "val".

    Returns:
      A source with the fields image, instances and id, the number of the image in the file. Instances leaves
      out crowds and objects below a pixel; `Source.annotations` has all.

    Raises:
      UserError: as `read_coco_file`; the folder of images or an image is missing; or the task reads no
        objects.
    """
    if "train_annotations" not in data:
        raise UserError(f"data.source '{data.source}' has objects, which this task does not train on")
    root = existing_folder(data.root, "data.root")
    folder = os.path.join(root, data[f"{split}_images"])
    if not os.path.isdir(folder):
        raise UserError(f"'{folder}', the folder of images, is missing; check data.{split}_images")
    file = read_coco_file(os.path.join(root, data[f"{split}_annotations"]), f"data.{split}_annotations")
    _check_images(folder, file)
    top = os.path.join(folder, "")
    # An array of fixed width, which takes less memory than Python strings.
    paths = np.array([os.fsencode(name) for name in file.names], np.bytes_)
    encoded = tf.constant(paths, tf.string)
    objects = object_reader(file.annotations)
    return Source(
        num_records=len(paths),
        fields={"image": Image(), **object_fields(file.annotations)},
        labels=None,
        read=lambda index: {
            "image": tf.io.read_file(tf.strings.join([os.fsencode(top), encoded[index]])),
            **objects(index),
        },
        describe=lambda index: top + os.fsdecode(paths[index]),
        annotations=file.annotations,
    )


def _check_images(folder: str, file: CocoFile) -> None:
    # Listing a folder once is much faster than asking for 118,000 files one by one.
    listed = set(image_names(folder))
    for name, number in zip(file.names, file.annotations.image_ids, strict=True):
        path = os.path.join(folder, name)
        if name not in listed and not os.path.isfile(path):
            raise UserError(
                f"image '{path}' of id {number} in '{file.path}' is missing; restore it or remove its entry"
            )
