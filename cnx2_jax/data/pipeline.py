"""From records to batches: order -> read -> decode -> augment -> batch, resumable at any step.

The training stream is endless and each of its images has a number, its position: image i of global
batch s is at position s * batch_size + i. Which record stands there and how it is augmented is a
function of (seed, position) alone, so the stream can be entered at any step, on any number of hosts.
"""

import copy
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from cnx2_jax.configuration import image_hw
from cnx2_jax.data import faults, transforms
from cnx2_jax.data.augment import make_augmentation
from cnx2_jax.data.sources import Source, open_set, open_source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.data.transforms import TrainTransform
from cnx2_jax.errors import UserError

Batch = dict[str, np.ndarray]

PREFETCHED_BATCHES = 2
# TensorFlow quotes names and contents in its messages; where they are no text, its own error is lost.
_FAILURES = (tf.errors.OpError, UnicodeDecodeError)
_END_OF_STREAM = 2**62


class ImageData:
    """The train and val images of one run, as batches of NumPy arrays.

    Attributes:
      train, val: the records of both splits.
    """

    def __init__(self, config: Any):
        """Opens both splits of `config.data`; see `open_source` for its keys and errors.

        Args:
          config: the run's config. Read here: `seed`, `batch_size` (global), `image_size`, `model.in_chans`
            (1 or 3), and all of `data`.

        Raises:
          UserError: as `open_source`, `open_set` and `make_augmentation`, or if images cannot have
            `model.in_chans` channels.
        """
        self._config = config
        data = config.data
        transform = TrainTransform(
            size=image_hw(config),
            channels=_checked_channels(config.model.in_chans),
            crop_scale=tuple(data.crop_scale),
            crop_ratio=tuple(data.crop_ratio),
            flip=data.flip,
            # As timm fills: with the mean colour.
            augment=make_augmentation(data.augment, [round(255 * mean) for mean in data.mean]),
            erasing=data.random_erasing,
            mean=tuple(map(float, data.mean)),
            std=tuple(map(float, data.std)),
        )
        # Traced once, for however many streams are opened.
        self._crop = tf.function(transform.crop, autograph=False)
        self._change = tf.function(transform.change, autograph=False)
        faults.check(data.unreadable)
        self.train = open_source(data, "train", config.seed)
        if data.val_root and not data.val_source:
            raise UserError(
                f"data.val_root '{data.val_root}' without data.val_source; set it to folder or tfds:..."
            )
        if data.val_source:
            self.val = open_set(data.val_source, data.val_root, self.train.class_names)
        else:
            self.val = open_source(data, "val", config.seed)

    @property
    def num_train(self) -> int:
        return self.train.num_records

    @property
    def num_val(self) -> int:
        return self.val.num_records

    @property
    def class_names(self) -> tuple[str, ...]:
        """Empty when the images carry no labels."""
        return self.train.class_names

    def of_batch(self, batch_size: int) -> "ImageData":
        """The same images in batches of another size."""
        other = copy.copy(self)
        other._config = self._config.copy_and_resolve_references()
        other._config.unlock()
        other._config.batch_size = batch_size
        return other

    def train_batches(
        self, start_step: int, *, process_index: int = 0, process_count: int = 1
    ) -> Iterator[Batch]:
        """Yields the global batches from `start_step` on, without end: this host's slice of each.

        Every epoch visits each record once; a batch may span two epochs.

        Returns:
          An iterator over {"image": uint8 [b, h, w, C], "label": int32 [b]}, where b is
          `batch_size / process_count` and host 0 has the first b images of the global batch. With
          `data.unreadable` "skip" also "unreadable": bool [b], true where another image, which
          depends on the position alone, stands in for one that cannot be read.

        Raises:
          UserError: at once if the batch does not divide over the hosts; from the iterator at the
            batch that holds an unreadable image, or with "skip" once more than `data.max_unreadable`
            of all records were, as far as the hosts have seen them. Of a JPEG only the
            part that is needed is read: damage below it does not matter.
        """
        config = self._config

        def seed(position: tf.Tensor) -> tf.Tensor:
            return tf.stack([tf.constant(config.seed, tf.int64), position])

        return _stream(
            self.train,
            config.data,
            lambda position: shuffled_record(position, self.num_train, config.seed),
            lambda encoded, position: self._crop(encoded, seed(position)),
            lambda image, position: self._change(image, seed(position)),
            steps=(start_step, _END_OF_STREAM // config.batch_size),
            positions=_Positions(config.batch_size, process_index, process_count),
            # In a later epoch another record stands at the same place.
            stand_in=lambda position, attempt: position + attempt * self.num_train,
        )

    def eval_batches(self, *, process_index: int = 0, process_count: int = 1) -> Iterator[Batch]:
        """Yields the val images once over: see `eval_batches`."""
        return eval_batches(self.val, self._config, process_index=process_index, process_count=process_count)


def eval_batches(
    source: Source, config: Any, *, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields a source's images once over, in their order: this host's slice of each global batch.

    Every host gets the same number of batches. Where the last ones run past the end they repeat
    the last image with "mask" false; over all hosts each image is there once with mask true.

    Returns:
      An iterator over batches as in `ImageData.train_batches`, with "mask": bool [b] added, which is
      false on unreadable images too.

    Raises:
      UserError: as `ImageData.train_batches`.
    """
    positions = _Positions(config.batch_size, process_index, process_count)
    last = source.num_records - 1
    batches = _stream(
        source,
        config.data,
        lambda position: tf.minimum(position, last),
        lambda encoded, _: transforms.eval_image(
            encoded,
            size=image_hw(config),
            channels=_checked_channels(config.model.in_chans),
            crop_fraction=config.data.eval_crop,
        ),
        lambda image, _: image,
        steps=(0, -(-source.num_records // positions.batch_size)),
        positions=positions,
        stand_in=None,
    )
    for step, batch in enumerate(batches):
        real = positions.at_step(step) <= last
        if "unreadable" not in batch:
            yield {**batch, "mask": real}
        else:
            bad = batch["unreadable"] & real  # padding that repeats an unreadable image is not another
            yield {**batch, "unreadable": bad, "mask": real & ~bad}


def preprocess_files(
    paths: Sequence[str | os.PathLike[str]],
    *,
    size: tuple[int, int],
    channels: int,
    eval_crop: float,
) -> UInt8[np.ndarray, "files height width channels"]:
    """Reads image files the way evaluation does, in the order given.

    Raises:
      UserError: a file is missing or no readable image.
    """
    _checked_channels(channels)
    images = np.empty((len(paths), *size, channels), np.uint8)
    for index, path in enumerate(paths):
        try:
            encoded = tf.io.read_file(os.fsencode(path))
            images[index] = transforms.eval_image(
                encoded, size=size, channels=channels, crop_fraction=eval_crop
            )
        except _FAILURES as error:
            raise _unreadable(os.fspath(path), error) from error
    return images


def shuffled_record(position: tf.Tensor, num_records: int, seed: int) -> tf.Tensor:
    """Returns the record at a position (both scalar int64): a new permutation every epoch."""
    epoch, place = position // num_records, position % num_records
    return _shuffled(place, epoch, num_records, seed)


def epoch_order(epoch: int, num_records: int, seed: int) -> np.ndarray:
    """Returns the records of one epoch in their order, int64 [num_records]."""
    places, epoch = tf.range(num_records, dtype=tf.int64), tf.constant(epoch, tf.int64)
    return _shuffled(places, epoch, num_records, seed).numpy()


def _shuffled(places: tf.Tensor, epoch: tf.Tensor, num_records: int, seed: int) -> tf.Tensor:
    # Given (seed, epoch) directly, as tf.random.experimental.index_shuffle passes it on, small sets
    # have only 256 different orders: the cipher uses the key's low bits. Hence hashed keys, and more
    # than the default 4 rounds, after which neighbours still come out correlated. Positions seed the
    # augmentation and are never negative, which leaves the negative numbers to the epochs.
    keys = tf.random.stateless_uniform(
        [3], tf.stack([tf.constant(seed, tf.int64), -1 - epoch]), None, None, tf.uint32
    )
    return tf.raw_ops.RandomIndexShuffle(
        index=places, seed=keys, max_index=tf.constant(num_records - 1, tf.int64), rounds=16
    )


def usable_cores() -> int:
    """Returns how many cores this process may use, which in a container can be few of the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Positions:
    """Which positions of the global stream belong to one host: a contiguous slice of each batch."""

    def __init__(self, batch_size: int, process_index: int, process_count: int):
        if batch_size % process_count:
            raise UserError(
                f"batch_size {batch_size} does not divide over {process_count} hosts; "
                f"use a multiple of {process_count}"
            )
        self.batch_size = batch_size
        self.per_host = batch_size // process_count
        self._offset = process_index * self.per_host

    @tf.autograph.experimental.do_not_convert
    def at(self, index: tf.Tensor) -> tf.Tensor:
        """The position of this host's image number `index`, counted from step 0."""
        step, place = index // self.per_host, index % self.per_host
        return step * self.batch_size + self._offset + place

    def at_step(self, step: int) -> np.ndarray:
        """The positions of this host's images at one step, int64 [per_host]."""
        return step * self.batch_size + self._offset + np.arange(self.per_host)


def _stream(
    source: Source,
    data: Any,
    record_at: Callable[[tf.Tensor], tf.Tensor],
    image_of: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    change: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    *,
    steps: tuple[int, int],
    positions: _Positions,
    stand_in: faults.StandIn | None,
) -> Iterator[Batch]:
    """Yields the batches of `range(*steps)`, the host's share of each.

    `record_at` maps a position to a record's index; `image_of` an encoded image and its position to
    uint8 [h, w, C], which may fail; `change` that and the position to the final image, which may not.
    """

    # No Python control flow here depends on a tensor; converting it anyway takes seconds of every start.
    @tf.autograph.experimental.do_not_convert
    def example(position: tf.Tensor, read_from: tf.Tensor) -> dict[str, tf.Tensor]:
        record = source.read(record_at(read_from))
        return {"image": image_of(record["bytes"], position), "label": record["label"]}

    @tf.autograph.experimental.do_not_convert
    def changed(position: tf.Tensor) -> dict[str, tf.Tensor]:
        if data.unreadable == "error":
            made = example(position, position)
        else:
            made = faults.tolerate(example, position, stand_in)
        return {**made, "image": change(made["image"], position)}

    threads = usable_cores()
    first, last = steps
    dataset = tf.data.Dataset.range(first * positions.per_host, last * positions.per_host)
    dataset = dataset.map(positions.at).map(changed, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.batch(positions.per_host, drop_remainder=True).prefetch(PREFETCHED_BATCHES)
    options = tf.data.Options()
    # Fixed widths instead of autotuning, whose buffers grow until the host's memory is full.
    options.autotune.enabled = False
    options.threading.private_threadpool_size = threads
    options.threading.max_intra_op_parallelism = 1
    batches = _guarded(dataset.with_options(options), source, record_at, example, first, positions)
    if data.unreadable == "error":
        return batches
    return _counted(batches, source, data.max_unreadable, record_at, first, positions)


def _guarded(
    dataset: tf.data.Dataset,
    source: Source,
    record_at: Callable[[tf.Tensor], tf.Tensor],
    example: faults.Example,
    first_step: int,
    positions: _Positions,
) -> Iterator[Batch]:
    """Iterates; when a batch fails, makes it again image by image to name the one at fault."""
    step = first_step
    iterator = dataset.as_numpy_iterator()
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except _FAILURES:
            for position in tf.constant(positions.at_step(step), tf.int64):
                try:
                    example(position, position)
                except _FAILURES as error:
                    name = source.describe(int(record_at(position)))
                    raise _unreadable(name, error) from error
            raise  # It is readable now: not the image's fault, so say what TensorFlow said.
        yield batch
        step += 1


def _counted(
    batches: Iterator[Batch],
    source: Source,
    share: float,
    record_at: Callable[[tf.Tensor], tf.Tensor],
    first_step: int,
    positions: _Positions,
) -> Iterator[Batch]:
    """Names each record that was skipped, once, and stops when they are more than `share` of all."""
    skipped = faults.Skipped(f"{source.describe(0)} of {source.num_records}")
    for step, batch in enumerate(batches, first_step):
        for position in positions.at_step(step)[batch["unreadable"]]:
            record = int(record_at(tf.constant(position, tf.int64)))
            if not skipped.add(record):
                continue
            tqdm.write(f"skipped: image '{source.describe(record)}' cannot be read", file=sys.stderr)
            if len(skipped) > share * source.num_records:
                raise UserError(
                    f"{len(skipped)} of {source.num_records} images cannot be read, the last "
                    f"'{source.describe(record)}': more than data.max_unreadable {share}; repair or remove "
                    "them, or raise it"
                )
        yield batch


def _unreadable(name: str, error: Exception) -> UserError:
    if isinstance(error, tf.errors.NotFoundError):
        return UserError(f"image '{name}' does not exist; check the path or restore it")
    if isinstance(error, tf.errors.PermissionDeniedError):
        return UserError(f"image '{name}' may not be read; change its permissions")
    return UserError(
        f"image '{name}' is not a readable JPEG, PNG or WebP image; it may be cut off or animated: "
        "repair or remove it"
    )


def _checked_channels(channels: int) -> int:
    if channels not in (1, 3):
        raise UserError(f"model.in_chans {channels}: image files are read with 1 or 3 channels")
    return channels
