"""Where images come from: records by index, split into train and val."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_digits

from cnx2_jax.errors import UserError, nearest

_ENDINGS = (".jpeg", ".jpg", ".png", ".webp")
_DIGITS_VAL_FRACTION = 0.2


@dataclasses.dataclass(frozen=True)
class Source:
    """The records of one split, in a fixed order that is the same on every host.

    Attributes:
      num_records: how many there are; a val split may have none.
      class_names: the name of each label; empty when the images carry no labels (all are then 0).
      read: scalar int64 index -> {"bytes": encoded image, scalar string; "label": scalar int32}.
        Runs eagerly and inside tf.data.
      describe: index -> the file's path or the record's name, for error messages.
    """

    num_records: int
    class_names: tuple[str, ...]
    read: Callable[[tf.Tensor], dict[str, tf.Tensor]]
    describe: Callable[[int], str]


@dataclasses.dataclass(frozen=True)
class _Records:
    """`names` are paths where `contents`, the encoded images themselves, are None."""

    class_names: tuple[str, ...]
    labels: np.ndarray  # int32 [n]
    names: np.ndarray  # bytes [n]
    contents: np.ndarray | None  # bytes [n]

    def only(self, chosen: np.ndarray) -> "_Records":
        contents = None if self.contents is None else self.contents[chosen]
        return _Records(self.class_names, self.labels[chosen], self.names[chosen], contents)


def open_source(data: Any, split: str, seed: int) -> Source:
    """Opens one split of the source that a config names.

    Which records are in val never depends on `seed`, so runs with different seeds, pretraining and
    fine-tuning for instance, keep the same images out of training.

    Args:
      data: `config.data`. `source` is "digits" or "folder". For a folder, `root` is its path and
        `val_fraction` the share of each class held out when there is no `val` sub-folder.
        `train_per_class` keeps that many training records per class, chosen by `seed`; 0 keeps all.
      split: "train" or "val".
      seed: the run's seed.

    Raises:
      UserError: unknown source, a number out of range, or a folder that is missing, empty or laid
        out inconsistently.
    """
    if data.source not in _OPENERS:
        raise UserError(
            f"unknown data.source '{data.source}'{nearest(data.source, _OPENERS)}; "
            f"known: {', '.join(_OPENERS)}"
        )
    if data.train_per_class < 0:
        raise UserError(f"data.train_per_class {data.train_per_class} is negative; 0 keeps all")
    records = _OPENERS[data.source](data, split)
    if split == "train" and data.train_per_class:
        ranks = np.random.default_rng(seed % 2**64).random(len(records.labels))
        share = np.full(max(1, len(records.class_names)), data.train_per_class)
        records = records.only(_first_of_each_class(records.labels, ranks, share))

    labels = tf.constant(records.labels, tf.int32)
    paths_or_contents = tf.constant(
        records.names if records.contents is None else records.contents, tf.string
    )

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        value = paths_or_contents[index]
        encoded = tf.io.read_file(value) if records.contents is None else value
        return {"bytes": encoded, "label": labels[index]}

    return Source(
        num_records=len(records.labels),
        class_names=records.class_names,
        read=read,
        describe=lambda index: os.fsdecode(records.names[index]),
    )


def _open_digits(data: Any, split: str) -> _Records:
    """The 1,797 8x8 digits of scikit-learn as PNGs, so that there is one path from bytes on."""
    del data  # The split is part of what "digits" means: results compare between configs.
    digits = load_digits()
    labels = digits.target.astype(np.int32)
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    names = np.array([f"digits/{index}" for index in range(len(labels))], np.bytes_)
    records = _Records(
        class_names=tuple(str(name) for name in digits.target_names),
        labels=labels,
        names=names,
        contents=np.array([_png(image) for image in pixels], object),
    )
    held_out = _held_out(names, labels, _DIGITS_VAL_FRACTION)
    return records.only(held_out if split == "val" else ~held_out)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _open_folder(data: Any, split: str) -> _Records:
    """`root/train` and `root/val`; without `val`, a share of `root/train`, or else of `root`.

    Each sub-folder is a class, whatever lies below it. Images without any sub-folder are unlabelled.
    """
    root = os.path.expanduser(data.root)
    if not root:
        raise UserError("data.root is not set; pass --config.data.root=FOLDER with your images")
    if not os.path.isdir(root):
        raise UserError(f"data.root '{root}' is not a folder; check the path")
    train, val = os.path.join(root, "train"), os.path.join(root, "val")
    has_train, has_val = os.path.isdir(train), os.path.isdir(val)
    if has_val and not has_train:
        raise UserError(f"'{root}' has a folder 'val' but no 'train'; add it or rename 'val'")
    try:
        base = train if has_train else root
        class_names = _sub_folders(base)
        if has_val and split == "val":
            return _list_records(val, class_names)
        records = _list_records(base, class_names)
    except OSError as error:
        raise UserError(f"cannot list '{error.filename}': {error.strerror}") from error

    present = np.bincount(records.labels, minlength=len(class_names)) > 0
    if not present.all():
        empty = os.path.join(base, class_names[int(np.argmin(present))])
        raise UserError(f"class folder '{empty}' has no {_kinds()}; add some or remove it")
    if has_val:
        return records
    if not 0 <= data.val_fraction < 1:
        raise UserError(f"data.val_fraction {data.val_fraction} is not in [0, 1)")
    # Relative names, so that a data set that moves to another disk keeps its split.
    start = len(os.fsencode(os.path.join(base, "")))
    names = (path[start:] for path in records.names)
    held_out = _held_out(names, records.labels, data.val_fraction)
    return records.only(held_out if split == "val" else ~held_out)


def _list_records(folder: str, class_names: tuple[str, ...]) -> _Records:
    """All images below `folder`, sorted by path, labelled by the sub-folder they lie in."""
    unknown = sorted(set(_sub_folders(folder)) - set(class_names))
    if unknown:
        raise UserError(f"class '{unknown[0]}' is only in '{folder}'; add it to train or remove it")
    # Sorted: the order in which a file system lists differs between machines.
    names = sorted(_image_names(folder))
    if not names:
        raise UserError(f"no {_kinds()} in '{folder}'; check the path")
    if class_names:
        loose = next((name for name in names if "/" not in name), None)
        if loose is not None:
            raise UserError(
                f"image '{os.path.join(folder, loose)}' lies beside or instead of class folders; "
                "move it into one"
            )
        label_of = {name: label for label, name in enumerate(class_names)}
        labels = np.fromiter((label_of[name.split("/", 1)[0]] for name in names), np.int32)
    else:
        labels = np.zeros(len(names), np.int32)
    top = os.path.join(folder, "")
    paths = np.array([os.fsencode(top + name) for name in names], np.bytes_)
    return _Records(class_names, labels, paths, contents=None)


def _sub_folders(folder: str) -> tuple[str, ...]:
    with os.scandir(folder) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and not e.name.startswith(".")))


def _image_names(folder: str, prefix: str = "") -> Iterator[str]:
    """Paths relative to the top folder, in no particular order."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _image_names(entry.path, f"{prefix}{entry.name}/")
            elif entry.name.lower().endswith(_ENDINGS):
                yield prefix + entry.name


def _kinds() -> str:
    return f"images ({', '.join(_ENDINGS)})"


def _held_out(names: Iterable[bytes], labels: np.ndarray, fraction: float) -> np.ndarray:
    """Which records are val, boolean [n]: about `fraction` of each class, by a hash of the name.

    A class of two or more gets at least one val record and keeps at least one for training. With a
    hash, adding files to a folder hardly moves the others between train and val.
    """
    if not fraction:
        return np.zeros(len(labels), bool)
    digests = [hashlib.blake2b(name, digest_size=8, key=b"cnx2 val").digest() for name in names]
    ranks = np.frombuffer(b"".join(digests), ">u8")
    counts = np.bincount(labels)
    share = np.where(counts < 2, 0, np.clip(np.round(fraction * counts), 1, counts - 1))
    return _first_of_each_class(labels, ranks, share)


def _first_of_each_class(labels: np.ndarray, ranks: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The `share[c]` records of lowest rank in each class c, as a boolean array [n]."""
    order = np.lexsort((ranks, labels))
    counts = np.bincount(labels, minlength=len(share))
    starts = np.cumsum(counts) - counts
    sorted_labels = labels[order]
    place_in_class = np.arange(len(labels)) - starts[sorted_labels]
    chosen = np.zeros(len(labels), bool)
    chosen[order] = place_in_class < share[sorted_labels]
    return chosen


_OPENERS: dict[str, Callable[[Any, str], _Records]] = {
    "digits": _open_digits,
    "folder": _open_folder,
}
