"""Images of one static size for pretraining and classification: the examples that a config asks for."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Shaped

from cnx2_jax.configuration import image_hw
from cnx2_jax.data import faults, order, pipeline
from cnx2_jax.data.augment import make_augmentation
from cnx2_jax.data.fields import Field, Label
from cnx2_jax.data.pipeline import Batch, Examples
from cnx2_jax.data.sources import Source, open_paths, open_set, open_source
from cnx2_jax.data.spectrograms import make_spec_augment
from cnx2_jax.data.symmetries import Symmetries
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.data.transforms import EvalTransform, TrainTransform
from cnx2_jax.errors import UserError, nearest

SAMPLING = ("all", "balanced")


class ImageData(Examples):
    """The images of one run: batches of {"image": [b, h, w, C], "label": int32 [b]}.

    Images are uint8, arrays of bands in `data.dtype`.

    Instead of "label" they may hold another field that training learns from; see `fields`.
    """

    def __init__(self, config: Any, wanted: str = "label"):
        """Opens both splits of `config.data`; see `open_source` for its keys and errors.

        Args:
          config: the config of the run. Read here: `seed`, `batch_size` (global), `image_size`,
            `model.in_chans` (of images 1 or 3), and all of `data`.
          wanted: the name of the field that training learns from.

        Raises:
          UserError: as `open_source`, `open_set`, `make_augmentation`, `make_spec_augment`, `Symmetries.of`
            and `faults.Tolerance`; if images cannot have `model.in_chans` channels; or if the source lacks
            the field `wanted`, unless that is "label".
        """
        data, seed = config.data, config.seed
        tolerance = _tolerance(config)
        train = _taking(wanted, open_source(data, "train", seed, wanted), data)
        if data.val_root and not data.val_source:
            raise UserError(
                f"data.val_root '{data.val_root}' without data.val_source; set it to folder or tfds:..."
            )
        if data.val_source and wanted != "label":
            raise UserError(
                f"data.val_source '{data.val_source}': validation images with '{wanted}' come from "
                "data.source; set it to '', and give data.labels a column 'split'"
            )
        if data.val_source:
            val = open_set(data.val_source, data.val_root, train.class_names, data)
        else:
            val = _taking(wanted, open_source(data, "val", seed, wanted), data)
        fields = _fields(train, config)
        train_transform = TrainTransform(
            fields,
            size=image_hw(config),
            crop_scale=tuple(data.crop_scale),
            crop_ratio=tuple(data.crop_ratio),
            symmetries=Symmetries.of(config),
            # timm fills with the mean colour.
            augment=make_augmentation(data.augment, [round(255 * mean) for mean in data.mean], fields),
            erasing=data.random_erasing,
            mean=tuple(map(float, data.mean)),
            std=tuple(map(float, data.std)),
            spec_augment=make_spec_augment(config),
        )
        eval_transform = _eval_transform(val, config)
        super().__init__(train, val, train_transform, eval_transform, seed, config.batch_size, tolerance)
        self.record_at = _sampling(data, train, seed)

    def val_images(self, places: np.ndarray) -> Shaped[np.ndarray, "n height width c"]:
        """Returns validation images as the model sees them, in the order of `places` in a pass.

        Args:
          places: int [n], without repetitions.
        """
        chosen = np.zeros(self.num_val, bool)
        chosen[places] = True
        batches = pipeline.one_pass(
            self.val.only(chosen),
            self.eval_transform,
            batch_size=len(places),
            tolerance=self.tolerance,
        )
        images = next(iter(batches))["image"]
        return images[np.argsort(np.argsort(places))]


def _taking(wanted: str, source: Source, data: Any) -> Source:
    """Returns the images of a source and the field `wanted`; labels are 0 where there are none."""
    if wanted in source.fields:
        fields = {name: source.fields[name] for name in ("image", wanted)}
        return dataclasses.replace(source, fields=fields)
    if wanted != "label":
        raise UserError(
            f"data.source '{data.source}' has nothing to learn for this task; set data.labels to a CSV file "
            "that names the images of data.root and what each shows"
        )
    return dataclasses.replace(
        source,
        fields={"image": source.fields["image"], "label": Label(())},
        read=lambda index: {"image": source.read(index)["image"], "label": tf.constant(0)},
    )


def _sampling(data: Any, train: Source, seed: int) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns the function from positions of the training stream to records that `data.sampling` names."""
    chosen = data.get("sampling", "all")
    if chosen not in SAMPLING:
        raise UserError(
            f"unknown data.sampling '{chosen}'{nearest(chosen, SAMPLING)} (known: {', '.join(SAMPLING)})"
        )
    if chosen == "balanced":
        return order.Balanced(train.all_labels(), seed).record_at
    return lambda position: order.shuffled_record(position, train.num_records, seed)


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
