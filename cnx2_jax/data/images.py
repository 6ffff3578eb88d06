"""Images of one static size for pretraining and classification: the examples that a config asks for."""

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from cnx2_jax.configuration import image_hw
from cnx2_jax.data import faults, pipeline
from cnx2_jax.data.augment import make_augmentation
from cnx2_jax.data.fields import Field, Label
from cnx2_jax.data.pipeline import Batch, Examples
from cnx2_jax.data.sources import Source, open_paths, open_set, open_source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.data.transforms import EvalTransform, TrainTransform
from cnx2_jax.errors import UserError


class ImageData(Examples):
    """The images of one run: batches of {"image": [b, h, w, C], "label": int32 [b]}.

    Images are uint8, arrays of bands in `data.dtype`.
    """

    def __init__(self, config: Any):
        """Opens both splits of `config.data`; see `open_source` for its keys and errors.

        Args:
          config: the config of the run. Read here: `seed`, `batch_size` (global), `image_size`,
            `model.in_chans` (of images 1 or 3), and all of `data`.

        Raises:
          UserError: as `open_source`, `open_set`, `make_augmentation` and `faults.Tolerance`, or if images
            cannot have `model.in_chans` channels.
        """
        data, seed = config.data, config.seed
        tolerance = _tolerance(config)
        train = _labelled(open_source(data, "train", seed))
        if data.val_root and not data.val_source:
            raise UserError(
                f"data.val_root '{data.val_root}' without data.val_source; set it to folder or tfds:..."
            )
        if data.val_source:
            val = open_set(data.val_source, data.val_root, train.class_names, data)
        else:
            val = _labelled(open_source(data, "val", seed))
        fields = _fields(train, config)
        train_transform = TrainTransform(
            fields,
            size=image_hw(config),
            crop_scale=tuple(data.crop_scale),
            crop_ratio=tuple(data.crop_ratio),
            flip=data.flip,
            # timm fills with the mean colour.
            augment=make_augmentation(data.augment, [round(255 * mean) for mean in data.mean], fields),
            erasing=data.random_erasing,
            mean=tuple(map(float, data.mean)),
            std=tuple(map(float, data.std)),
        )
        eval_transform = _eval_transform(val, config)
        super().__init__(train, val, train_transform, eval_transform, seed, config.batch_size, tolerance)


def _labelled(source: Source) -> Source:
    """Returns the images of a source and their labels, all 0 where it has none, such as one of maps."""
    if "label" in source.fields:
        return source
    return dataclasses.replace(
        source,
        fields={"image": source.fields["image"], "label": Label(())},
        read=lambda index: {"image": source.read(index)["image"], "label": tf.constant(0)},
    )


def eval_batches(
    source: Source, config: Any, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields the images of any source once, prepared as the config's validation images are.

    Args:
      source: has a field "image".
      config: as for `ImageData`; `data.source` and its companions are not read.
      process_index, process_count: of this host; see `pipeline.one_pass`, also for batches and errors.
    """
    return pipeline.one_pass(
        source,
        _eval_transform(source, config),
        batch_size=config.batch_size,
        tolerance=_tolerance(config),
        process_index=process_index,
        process_count=process_count,
    )


def preprocess_files(
    paths: Sequence[str | os.PathLike[str]], config: Any
) -> Shaped[np.ndarray, "files height width channels"]:
    """Reads image or array files the way evaluation does, in the order given.

    Args:
      paths: of the files.
      config: as for `ImageData`; of `data.source` only the kind is read.

    Returns:
      uint8, or `config.data.dtype` for arrays.

    Raises:
      UserError: a file is missing or not readable.
    """
    source = open_paths([os.fspath(path) for path in paths], config.data)
    transform = _eval_transform(source, config)
    images = []
    seed = tf.zeros([2], tf.int64)  # evaluation draws nothing
    for index in range(source.num_records):
        try:
            record = source.read(tf.constant(index, tf.int64))
            images.append(transform.finish(transform.decode(record, seed), seed)["image"])
        except pipeline.FAILURES as error:
            raise pipeline.unreadable(source.describe(index), error, transform.fields["image"]) from error
    return np.stack(images)


def _eval_transform(source: Source, config: Any) -> EvalTransform:
    return EvalTransform(_fields(source, config), image_hw(config), config.data.eval_crop)


def _fields(source: Source, config: Any) -> Mapping[str, Field]:
    """Returns the fields of a source as the run reads them."""
    return {name: field.configured(config) for name, field in source.fields.items()}


def _tolerance(config: Any) -> faults.Tolerance:
    return faults.Tolerance(config.data.unreadable, config.data.max_unreadable)
