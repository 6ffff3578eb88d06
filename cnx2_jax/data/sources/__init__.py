"""Where records come from: the kinds of source, by the names that configs give them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cnx2_jax.data.sources.arrays import open_array_files, open_arrays, open_whole_arrays
from cnx2_jax.data.sources.base import Source, first_of_each_class, held_out
from cnx2_jax.data.sources.coco import open_coco
from cnx2_jax.data.sources.digits import open_digit_rows, open_digits
from cnx2_jax.data.sources.folder import open_files, open_folder, open_whole_folder
from cnx2_jax.data.sources.labelled import open_labelled
from cnx2_jax.data.sources.masks import open_ade20k, open_masks
from cnx2_jax.data.sources.scenes import open_scenes
from cnx2_jax.data.sources.synthetic import open_synthetic
from cnx2_jax.data.sources.tfds import open_tfds, val_spec
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.files import local_path


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of source.

    Attributes:
      open: maps `config.data`, what follows the colon in its name, and "train" or "val" to one split.
      detailed: whether something may follow a colon.
      open_set: maps `config.data`, what follows the colon, and `data.val_root` to an evaluation set of
        labelled images; None if the kind has no such sets.
      open_paths: maps `config.data` and paths to the files that predictions are made of.
    """

    open: Callable[[Any, str, str], Source]
    detailed: bool = False
    open_set: Callable[[Any, str, str], Source] | None = None
    open_paths: Callable[[Any, Sequence[str]], Source] = lambda _, paths: open_files(paths)


KINDS: dict[str, Kind] = {
    "folder": Kind(
        lambda data, _, split: open_folder(data.root, split, data.val_fraction),
        open_set=lambda *given: open_whole_folder(given[-1]),
    ),
    "arrays": Kind(
        lambda data, _, split: open_arrays(data, split),
        open_set=lambda data, _, root: open_whole_arrays(data, root),
        open_paths=open_array_files,
    ),
    "digits": Kind(lambda data, _, split: open_digits(split), open_set=lambda *_: open_digits("val")),
    "digit_rows": Kind(lambda data, _, split: open_digit_rows(split)),
    "tfds": Kind(
        lambda data, spec, split: _open_tfds_split(spec, data, split),
        detailed=True,
        open_set=lambda _, spec, root: open_tfds(spec, root),
    ),
    "synthetic": Kind(
        lambda data, size, split: open_synthetic(size, split),
        detailed=True,
        open_set=lambda _, size, root: open_synthetic(size, "val"),
    ),
    "masks": Kind(lambda data, _, split: open_masks(data, split)),
    "ade20k": Kind(lambda data, _, split: open_ade20k(data, split)),
    "coco": Kind(lambda data, _, split: open_coco(data, split)),
    "scenes": Kind(lambda data, records, split: open_scenes(records, split), detailed=True),
}


def open_source(data: Any, split: str, seed: int, wanted: str = "label") -> Source:
    """Opens one split of the source that a config names.

    The val split never depends on `seed`, so runs with different seeds, such as pretraining and fine-tuning,
    keep the same images out of training.

    Args:
      data: `config.data`. `source` is "digits" or "digit_rows"; "folder" or "arrays", with its path in
        `root`; "tfds:NAME[/CONFIG]:SPLIT", with TFDS's data directory in `root` or its default one;
        "synthetic[:RECORDS[:CLASSES]]"; with maps of classes, "masks" and "ade20k", in `root`; with objects,
        "coco", in `root`; or, with both, "scenes[:RECORDS]". Its val split is a folder's `val`, COCO's
        val2017, a TFDS data set's `validation` or `test`, or else `val_fraction` of each class, held out of
        training.
        `train_per_class` keeps that many training records per class, chosen by `seed`; 0 keeps all.
        With `labels`, a CSV file, see `open_labelled`.
      split: "train" or "val".
      seed: the run's seed.
      wanted: the field that training learns from, which decides what is read from `labels`.

    Raises:
      UserError: an unknown source, a number out of range, or images that are missing or laid out
        inconsistently.
    """
    if data.train_per_class < 0:
        raise UserError(f"data.train_per_class {data.train_per_class} is negative; 0 keeps all")
    for key in ("root", "labels"):
        local_path(data.get(key, ""))
    kind, detail = _kind(data.source, "data.source", KINDS)
    if data.get("labels", ""):
        source = open_labelled(data, split, wanted)
    else:
        source = KINDS[kind].open(data, detail, split)
    if split == "train" and data.train_per_class:
        if source.targets:
            raise UserError(
                f"data.train_per_class {data.train_per_class}: these images have not one class "
                "each; set it to 0"
            )
        if source.labels is None:
            raise UserError(
                f"data.train_per_class {data.train_per_class}: the labels of '{data.source}' are only "
                "known by reading it; set it to 0, or take a slice such as train[:10%]"
            )
        ranks = np.random.default_rng(seed % 2**64).random(source.num_records)
        share = np.full(max(1, len(source.class_names)), data.train_per_class)
        source = source.only(first_of_each_class(source.labels, ranks, share))
    return source


def open_paths(paths: Sequence[str], data: Any) -> Source:
    """Opens files, and all below folders, of the kind that `config.data` names: arrays, or else images.

    Raises:
      UserError: a path does not exist, or a folder has none; an array cannot be read.
    """
    kind, _ = _kind(data.source, "data.source", KINDS)
    return KINDS[kind].open_paths(data, paths)


def open_set(name: str, root: str, class_names: Sequence[str], data: Any) -> Source:
    """Opens all records of an evaluation set, with labels that index `class_names`.

    Its classes are matched by name, and may be fewer. If they are numbers and `class_names` has none, as for
    the folders of ImageNet-V2, they are indices into `class_names`.

    Args:
      name: as `data.source`; "digits" and "synthetic" give their val split.
      root: of a folder or of TFDS.
      class_names: those of the model.
      data: `config.data`, for the form of arrays.

    Raises:
      UserError: as `open_source`; or the set has no classes, or one that the model was not trained on.
    """
    openers = {kind: each.open_set for kind, each in KINDS.items() if each.open_set}
    kind, detail = _kind(name, "data.val_source", openers)
    source = openers[kind](data, detail, root)
    return _matched(source, class_names, name if kind == "tfds" else root or name)


def _kind(name: str, key: str, known: Mapping[str, Any]) -> tuple[str, str]:
    kind, _, detail = name.partition(":")
    if kind not in known or (detail and not KINDS[kind].detailed):
        raise UserError(f"unknown {key} '{name}'{nearest(kind, known)}; known: {', '.join(known)}")
    return kind, detail


def _open_tfds_split(spec: str, data: Any, split: str) -> Source:
    val = val_spec(spec, data.root)
    if val is not None:
        return open_tfds(val if split == "val" else spec, data.root)
    source = open_tfds(spec, data.root)
    names = (str(index).encode() for index in range(source.num_records))
    chosen = held_out(names, source.labels, data.val_fraction)
    return source.only(chosen if split == "val" else ~chosen)


def _matched(source: Source, class_names: Sequence[str], name: str) -> Source:
    if class_names and not source.class_names:
        raise UserError(
            f"'{name}' has no class folders; put each class's images into one named as in training"
        )
    label_of = {name: label for label, name in enumerate(class_names)}
    numbered = not any(name.isdecimal() for name in class_names)
    if numbered and all(name.isdecimal() for name in source.class_names):
        label_of = {name: int(name) for name in source.class_names if int(name) < len(class_names)}
    unknown = next((name for name in source.class_names if name not in label_of), None)
    if unknown is not None:
        raise UserError(f"'{name}' has a class '{unknown}' that the model was not trained on")
    table = np.array([label_of[name] for name in source.class_names] or [0], np.int32)
    return source.relabelled(table, tuple(class_names))
