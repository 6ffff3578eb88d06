"""Folders of images and of masks with the same names: semantic segmentation, ADE20K included."""

import os
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from cnx2_jax.data.class_names import read_class_names
from cnx2_jax.data.fields import Image, SegmentationMap
from cnx2_jax.data.sources.base import Source, held_out
from cnx2_jax.data.sources.folder import existing_folder, image_kinds, image_names
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

# Names of the splits' folders in data sets of different origin.
_FOLDERS = {"train": ("train", "training"), "val": ("val", "validation")}
_CLASSES_OF_ADE20K = resources.files("cnx2_jax.data").joinpath("ade20k.txt")


def open_masks(data: Any, split: str) -> Source:
    """Opens the images in `root/images` and, below `root/masks`, the PNGs of their classes.

    The mask of `images/a/b.jpg` is `masks/a/b.png`. Sub-folders of images called `train` or `training` and
    `val` or `validation` are the splits; without them, a share of the images is held out by their names.

    Args:
      data: `config.data`. Read here: `root`, `images`, `masks` (paths in `root`), `classes` (a text file, one
        name per line, in the order of the values in the masks), `ignore` and `val_fraction`.
      split: "train" or "val".

    Raises:
      UserError: a folder or the file of classes is missing or not as described, an image has no mask, or two
        images share one.
    """
    _check_keys(data)
    names = read_class_names(data.classes)
    return _open(data, split, data.images, data.masks, SegmentationMap(names, data.ignore))


def open_ade20k(data: Any, split: str) -> Source:
    """Opens `ADEChallengeData2016` as it is published, in `root`: 150 classes, and 0 for no class.

    Args:
      data: as for `open_masks`, without `images` and `masks`; `classes` may be empty.
      split: "train" or "val".

    Raises:
      UserError: as `open_masks`.
    """
    _check_keys(data)
    if data.classes:
        names = read_class_names(data.classes)
    else:
        names = tuple(_CLASSES_OF_ADE20K.read_text().splitlines())
    field = SegmentationMap(names, data.ignore, unlabelled_first=True)
    return _open(data, split, "images", "annotations", field)


def _check_keys(data: Any) -> None:
    if "classes" not in data:
        raise UserError(f"data.source '{data.source}' has maps of classes, which this task does not train on")


def _open(data: Any, split: str, images: str, masks: str, field: SegmentationMap) -> Source:
    root = existing_folder(data.root, "data.root")
    folders = [os.path.join(root, name) for name in (images, masks)]
    for key, folder in zip(("images", "masks"), folders, strict=True):
        if not os.path.isdir(folder):
            raise UserError(f"'{folder}', the folder of {key}, is missing; check data.root and data.{key}")
    prefix, has_val = _split_folder(folders[0], split)
    image_files, mask_files = _paired(folders[0], folders[1], prefix)
    source = _source(folders, image_files, mask_files, field)
    if has_val:
        return source
    if not 0 <= data.val_fraction < 1:
        raise UserError(f"data.val_fraction {data.val_fraction} is not in [0, 1)")
    # Relative names, so that a data set that moves to another disk keeps its split.
    chosen = held_out(map(os.fsencode, image_files), None, data.val_fraction)
    return source.only(chosen if split == "val" else ~chosen)


def _split_folder(images: str, split: str) -> tuple[str, bool]:
    """Returns the sub-folder of `images` to read, "" for all of it, and whether val has a folder."""
    found = {
        name: next((each for each in names if os.path.isdir(os.path.join(images, each))), "")
        for name, names in _FOLDERS.items()
    }
    if found["val"] and not found["train"]:
        raise UserError(f"'{images}' has a folder '{found['val']}' but no 'train'; add it or rename it")
    return found[split] or found["train"], bool(found["val"])


def _paired(images: str, masks: str, prefix: str) -> tuple[list[str], list[str]]:
    """Returns images and their masks, as paths relative to both folders, sorted."""
    start = f"{prefix}/" if prefix else ""
    mask_of = _masks_by_stem(os.path.join(masks, prefix), start)
    image_of: dict[str, str] = {}
    for name in sorted(image_names(os.path.join(images, prefix), start)):
        stem = os.path.splitext(name)[0]
        path = os.path.join(images, name)
        if stem in image_of:
            raise UserError(
                f"images '{os.path.join(images, image_of[stem])}' and '{path}' share the mask '{stem}.png'; "
                "rename or remove one"
            )
        if stem not in mask_of:
            raise UserError(
                f"image '{path}' has no mask '{os.path.join(masks, stem)}.png'; add it or remove the image"
            )
        image_of[stem] = name
    if not image_of:
        raise UserError(f"no {image_kinds()} in '{os.path.join(images, prefix)}'; check the path")
    return list(image_of.values()), [mask_of[stem] for stem in image_of]


def _masks_by_stem(folder: str, start: str) -> Mapping[str, str]:
    if not os.path.isdir(folder):
        raise UserError(f"'{folder}' does not exist; masks need the same sub-folders as images")
    names = (os.path.splitext(name) for name in image_names(folder, start))
    return {stem: stem + ending for stem, ending in names if ending.lower() == ".png"}


def _source(
    folders: Sequence[str], images: Sequence[str], masks: Sequence[str], field: SegmentationMap
) -> Source:
    tops = [os.path.join(folder, "") for folder in folders]
    # Arrays of fixed width, which take less memory than Python strings.
    paths = [np.array([os.fsencode(name) for name in names], np.bytes_) for names in (images, masks)]
    encoded = [tf.constant(names, tf.string) for names in paths]
    places = {"image": 0, "map": 1}

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        return {
            name: tf.io.read_file(tf.strings.join([os.fsencode(tops[place]), encoded[place][index]]))
            for name, place in places.items()
        }

    def describe_entry(index: int, name: str) -> str:
        place = places[name]
        return tops[place] + os.fsdecode(paths[place][index])

    return Source(
        num_records=len(images),
        fields={"image": Image(), "map": field},
        labels=None,
        read=read,
        describe=lambda index: describe_entry(index, "image"),
        describe_entry=describe_entry,
    )
