"""Arrays of any bands and depth: folders of files, or one file that holds many images."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cnx2_jax.data import array_files
from cnx2_jax.data.array_files import ENDINGS, Form
from cnx2_jax.data.bands import Bands
from cnx2_jax.data.fields import Label
from cnx2_jax.data.sources import folder
from cnx2_jax.data.sources.base import Source, held_out
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

LABELS = "labels.npy"


def open_arrays(data: Any, split: str) -> Source:
    """Opens the arrays in `data.root`.

    Args:
      data: `config.data`. `root` is a folder that is laid out as for images (see `open_folder`), with files
        of one of the endings in ENDINGS; or one .npy file, or the folder of one zarr array, of many images:
        [n, h, w, bands] or, by `layout`, [n, bands, h, w], or [n, h, w]. Beside it may lie labels.npy,
        integers [n] from 0 on; `val_fraction` of its images are held out.
      split: "train" or "val".

    Raises:
      UserError: as `open_folder` and `open_form`; files of different endings; labels that do not fit.
    """
    if not _is_stack(data.root):
        train, asked = (
            folder.open_folder(data.root, each, data.val_fraction, ENDINGS) for each in ("train", split)
        )
        return _of_files(asked, data, train.describe(0))  # a val split may be empty
    source = _open_stack(data.root, data.layout)
    if not 0 <= data.val_fraction < 1:
        raise UserError(f"data.val_fraction {data.val_fraction} is not in [0, 1)")
    names = (str(index).encode() for index in range(source.num_records))
    chosen = held_out(names, source.labels, data.val_fraction)
    return source.only(chosen if split == "val" else ~chosen)


def open_whole_arrays(data: Any, root: str) -> Source:
    """Opens all arrays of `root`, which is as `open_arrays` describes `data.root`.

    Raises:
      UserError: as `open_arrays`.
    """
    if _is_stack(root):
        return _open_stack(root, data.layout)
    source = folder.open_whole_folder(root, ENDINGS)
    return _of_files(source, data, source.describe(0))


def open_array_files(data: Any, paths: Sequence[str]) -> Source:
    """Opens array files, and all below folders, as `open_files` does images.

    Raises:
      UserError: as `open_files` and `open_form`.
    """
    source = folder.open_files(paths, ENDINGS)
    return _of_files(source, data, source.describe(0))


def _of_files(source: Source, data: Any, first: str) -> Source:
    """Returns the source with its images read as arrays of the form of the file `first`."""
    ending = _ending(first)
    for index in range(source.num_records):
        if _ending(name := source.describe(index)) != ending:
            raise UserError(
                f"array '{name}' does not end in {ending}, as '{first}' does; keep one kind of file"
            )
    form, read = array_files.open_form(first, data.layout, data.array)
    return _with_bands(source, Bands(form, read, data.root or first))


def _with_bands(source: Source, bands: Bands) -> Source:
    fields = {**source.fields, "image": bands}
    return Source(source.num_records, fields, source.labels, source.read, source.describe)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower().replace(".tiff", ".tif")


def _is_stack(root: str) -> bool:
    root = os.path.expanduser(root)
    marks = (os.path.join(root, name) for name in (".zarray", ".zgroup", "zarr.json"))
    return os.path.isfile(root) or (bool(root) and any(map(os.path.exists, marks)))


def _open_stack(root: str, layout: str) -> Source:
    root = os.path.expanduser(root)
    array_files.check_layout(layout)
    images, entry = _open_npy(root) if os.path.isfile(root) else _open_zarr(root)
    if images.ndim not in (3, 4) or not images.shape[0]:
        raise UserError(f"array '{root}' has the shape {images.shape}; give [n, h, w] or [n, h, w, bands]")
    shape = images.shape[1:]
    bands = 1 if len(shape) == 2 else shape[0 if layout == "channels_first" else -1]
    dtype = images.dtype
    form = Form(array_files.checked_form(root, np.empty([0, bands], dtype)).dtype, bands)

    def entry_at(index: np.int64) -> bytes:
        try:
            return entry(int(index))
        except Exception as error:  # zarr raises all kinds for damaged chunks.
            raise tf.errors.DataLossError(None, None, str(error)) from error

    labels, names = _labels(os.path.join(os.path.dirname(os.path.abspath(root)), LABELS), images.shape[0])
    numbers = tf.constant(labels)

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        content = tf.ensure_shape(tf.numpy_function(entry_at, [index], tf.string), [])
        return {"image": content, "label": numbers[index]}

    fields = {
        "image": Bands(form, functools.partial(_decode, shape=shape, dtype=dtype, layout=layout), root),
        "label": Label(names),
    }
    return Source(len(labels), fields, labels, read, lambda index: f"{root}[{index}]")


def _decode(raw: tf.Tensor, *, shape: tuple[int, ...], dtype: np.dtype, layout: str) -> tf.Tensor:
    image = array_files.decode_values(raw, shape, dtype)
    if len(shape) == 2:
        return image[..., None]
    return tf.transpose(image, [1, 2, 0]) if layout == "channels_first" else image


def _open_npy(path: str) -> tuple[Any, Callable[[int], bytes]]:
    """Returns the array, which stays on the disk, and a function that reads the bytes of one image."""
    try:
        images = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"array '{path}' cannot be read: {error}; repair or remove it") from None
    if not images.flags.c_contiguous:
        raise UserError(f"array '{path}' is in Fortran's order; write numpy.ascontiguousarray of it")
    size = images.nbytes // max(1, len(images))
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def entry(index: int) -> bytes:
        # Unlike the map, pread lets other threads run, and counts no pages as this process's memory.
        content = os.pread(file, size, images.offset + index * size)
        if len(content) != size:
            raise ValueError(f"'{path}' has become shorter")
        return content

    return images, entry


def _open_zarr(path: str) -> tuple[Any, Callable[[int], bytes]]:
    zarr = array_files.import_extra("zarr")
    if _has_pickles(path):
        raise UserError(
            f"'{path}' holds pickles, which could run any code when they are read; write the array anew "
            "without the codec 'pickle'"
        )
    try:
        images = zarr.open_array(path, mode="r")
    except Exception as error:  # zarr raises all kinds for wrong metadata.
        raise UserError(f"'{path}' is not the folder of one zarr array: {error}") from None
    return images, lambda index: np.ascontiguousarray(images[index]).tobytes()


def _has_pickles(path: str) -> bool:
    """Whether an array in zarr's format 2 states the codec that unpickles; format 3 has none.

    False of wrong metadata, which zarr refuses.
    """
    try:
        with open(os.path.join(path, ".zarray"), "rb") as file:
            stated = json.load(file)
        # Written again, because a string may be escaped in the file.
        return "pickle" in json.dumps([stated.get("filters"), stated.get("compressor")])
    except (OSError, ValueError, AttributeError):
        return False


def _labels(path: str, count: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Returns the labels in the file, int32 [count], and class names; zeros and no names without it."""
    if not os.path.exists(path):
        return np.zeros(count, np.int32), ()
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"labels '{path}' cannot be read: {error}; repair or remove them") from None
    if (
        labels.shape != (count,)
        or labels.dtype.kind not in "iu"
        or not 0 <= labels.min() <= labels.max() < 2**24
    ):
        raise UserError(f"labels '{path}' must be {count:,} whole numbers from 0 on, one per image")
    digits = len(str(labels.max()))
    return labels.astype(np.int32), tuple(f"{label:0{digits}}" for label in range(labels.max() + 1))
