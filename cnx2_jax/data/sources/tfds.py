"""Data sets that TensorFlow Datasets prepared: their records by index, read from the files."""

import bisect
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import re
import struct
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cnx2_jax.data.array_files import DTYPES, Form
from cnx2_jax.data.bands import Bands
from cnx2_jax.data.fields import Field, Image, Label
from cnx2_jax.data.sources.base import Source
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError, nearest
from cnx2_jax.files import replacing

# tensorflow_datasets and array_record are imported where they are used, because that takes half a second.

_SPEC = re.compile(r"((?P<name>[A-Za-z]\w*)(/[\w+.-]+)?(:[\d*]+(\.[\d*]+){2})?):(?P<split>[A-Za-z].*)")
# A TFRecord: the length as 8 bytes, their CRC in 4, the data, and its CRC in 4.
_LENGTH, _HEADER, _FOOTER = struct.Struct("<Q"), 12, 4


def open_tfds(spec: str, data_dir: str) -> Source:
    """Opens one split of a prepared data set, in the order of its files.

    Downloads nothing and does not need the code that made the data set. Keeps an index of TFRecord files in
    `$XDG_CACHE_HOME/cnx2_jax`, or below `~/.cache`.

    Args:
      spec: `NAME[/CONFIG][:VERSION]:SPLIT`; the split may be a slice or a sum, as in
        https://www.tensorflow.org/datasets/splits. Without a version, the newest prepared one.
      data_dir: the directory of TFDS's data sets; empty for TFDS's default.

    Returns:
      A source without `labels`. `read` returns images as stored, JPEG or PNG, and arrays in their record; it
        raises tf.errors.OpError when it runs if a record is damaged.

    Raises:
      UserError: a malformed spec, an unknown or unprepared data set, an unknown split, one without
        records, images (or arrays of a dtype in `DTYPES`) or class labels, or files that are missing, damaged
        or not readable by index.
    """
    builder, split, named = _load(spec, data_dir)
    class_names = _class_names(builder)
    field, image_of = _image(builder)
    instructions = _instructions(builder, split, named)
    read_record = _open_files(builder, {one.filename: one.examples_in_shard for one in instructions})
    ends = list(itertools.accumulate(one.take for one in instructions))

    def locate(index: int) -> tuple[str, int]:
        number = bisect.bisect_right(ends, index)
        one = instructions[number]
        return one.filename, one.skip + index - (ends[number] - one.take)

    def record_at(index: np.int64) -> bytes:
        try:
            return read_record(*locate(int(index)))
        except Exception as error:  # TensorFlow turns it into an OpError in graphs, but not eagerly.
            raise tf.errors.DataLossError(None, None, str(error)) from error

    def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
        record = tf.ensure_shape(tf.numpy_function(record_at, [index], tf.string), [])
        label = tf.io.parse_single_example(record, {"label": tf.io.FixedLenFeature([], tf.int64)})["label"]
        return {"image": image_of(record), "label": tf.cast(label, tf.int32)}

    def describe(index: int) -> str:
        return f"{builder.info.full_name}/{split} record {index} ({os.path.basename(locate(index)[0])})"

    fields = {"image": field, "label": Label(class_names)}
    return Source(ends[-1], fields, labels=None, read=read, describe=describe)


def val_spec(spec: str, data_dir: str) -> str | None:
    """Returns the spec of the same data set's `validation` split, or else of its `test` split.

    Returns None if the data set has neither, or if `spec` itself takes records from them.

    Raises:
      UserError: as `open_tfds`, for the data set; the splits in `spec` are not checked.
    """
    builder, split, named = _load(spec, data_dir)
    for name in ("validation", "test"):
        if name in builder.info.splits and not {name, "all"} & named:
            return spec.removesuffix(split) + name
    return None


def _load(spec: str, data_dir: str) -> tuple[Any, str, set[str]]:
    """Returns the builder of the data set, made from its files alone, the split, and its split names."""
    from tensorflow_datasets.core import constants, read_only_builder, registered

    matched = _SPEC.fullmatch(spec)
    if matched is None:
        raise UserError(f"'tfds:{spec}' is not tfds:NAME[/CONFIG][:VERSION]:SPLIT, as tfds:mnist:train[:90%]")
    wanted, directory = matched[1], os.path.expanduser(data_dir or os.fspath(constants.DATA_DIR))
    named = {part.partition("[")[0].strip() for part in matched["split"].split("+")}
    try:
        return read_only_builder.builder_from_files(wanted, data_dir=directory), matched["split"], named
    except registered.DatasetNotFoundError as error:
        raise _not_found(wanted, matched["name"], directory) from error
    except Exception as error:  # TFDS raises all kinds of exceptions for wrong metadata.
        raise UserError(f"cannot load '{wanted}' from '{directory}': {error!r}; prepare it again") from error


def _not_found(wanted: str, name: str, directory: str) -> UserError:
    from tensorflow_datasets.core import registered

    if os.path.isdir(folder := os.path.join(directory, name)):
        prepared = ", ".join(sorted(os.listdir(folder))) or "nothing"
        return UserError(
            f"data set '{wanted}' is not prepared in '{directory}'; of {name} there is: {prepared}"
        )
    try:
        maker = registered.imported_builder_cls(name)
    except registered.DatasetNotFoundError:
        hint = nearest(name, registered.list_imported_builders())
        return UserError(f"unknown data set '{name}', which is not in '{directory}' either{hint}")
    manual = getattr(maker, "MANUAL_DOWNLOAD_INSTRUCTIONS", None)
    before = " once its archives (ImageNet's: image-net.org) are in downloads/manual there" if manual else ""
    return UserError(
        f"data set '{wanted}' is not prepared in '{directory}'; set data.root to where it is, or run "
        f"`tfds build {wanted} --data_dir={directory}`{before}"
    )


def _class_names(builder: Any) -> tuple[str, ...]:
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    known = dict(features) if isinstance(features, kinds.FeaturesDict) else {}
    image, label = known.get("image"), known.get("label")
    names = label.names if isinstance(label, kinds.ClassLabel) and label.num_classes else ()
    # An array needs a known number of bands.
    if names and isinstance(image, kinds.Tensor | kinds.Image):
        bands = {2: 1, 3: image.shape[-1]}.get(len(image.shape))
        if bands and np.dtype(image.np_dtype).name in DTYPES:
            return tuple(names)
    raise UserError(
        f"data set '{builder.info.full_name}' needs the features 'image', of {', '.join(DTYPES)}, and "
        f"'label', of known classes, but has: {', '.join(known)}; choose one for image classification"
    )


def _image(builder: Any) -> tuple[Field, Callable[[tf.Tensor], tf.Tensor]]:
    """Returns the field of the images, and the function that takes their entry out of a record."""
    from tensorflow_datasets import features as kinds
    from tensorflow_datasets.core import example_parser

    image = builder.info.features["image"]
    if isinstance(image, kinds.Image) and image.np_dtype == np.uint8:
        key = {"image": tf.io.FixedLenFeature([], tf.string)}
        return Image(), lambda record: tf.io.parse_single_example(record, key)["image"]
    parser = example_parser.ExampleParser({"image": image.get_serialized_info()})

    def read(record: tf.Tensor) -> tf.Tensor:
        array = image.decode_example(parser.parse_example(record)["image"])
        return array if len(image.shape) == 3 else array[..., None]

    form = Form(np.dtype(image.np_dtype), image.shape[-1] if len(image.shape) == 3 else 1)
    return Bands(form, read, builder.info.full_name), tf.identity


def _instructions(builder: Any, split: str, named: set[str]) -> list[Any]:
    """Returns what to read from which file: TFDS's FileInstructions, none of them empty."""
    name, splits = builder.info.full_name, builder.info.splits
    if unknown := named - {*splits, "all"}:
        hint = nearest(min(unknown), splits)
        raise UserError(f"'{name}' has no split '{min(unknown)}'{hint}; it has: {', '.join(splits)}")
    try:
        instructions = splits[split].file_instructions
    except Exception as error:  # TFDS raises all kinds of exceptions for a malformed slice.
        raise UserError(f"no split '{split}' of '{name}': {error!r}; write as train[:90%]") from error
    if not instructions:
        raise UserError(f"split '{split}' of '{name}' has no records; take another split or slice")
    return instructions


def _open_files(builder: Any, counts: Mapping[str, int]) -> Callable[[str, int], bytes]:
    """Returns a thread-safe function (path, position in the file) -> record; `counts` are by path."""
    import resource  # Missing on Windows, where the other sources work.

    # All files stay open, and ImageNet's 1024 exceed the usual limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + len(counts)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard) if hard >= 0 else wanted, hard))
    if (kind := builder.info.file_format.value) not in ("tfrecord", "array_record"):
        raise UserError(f"TFDS files of the format {kind} are not supported; use array_record or tfrecord")
    return _TFRecords(counts) if kind == "tfrecord" else _array_records(counts)


def _array_records(counts: Mapping[str, int]) -> Callable[[str, int], bytes]:
    from array_record.python import array_record_module

    def opened(path: str) -> Any:
        # No reading ahead, which random access would not use, and small buffers, because files are many.
        options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
        reader = array_record_module.ArrayRecordReader(path, **options)
        if reader.num_records() != counts[path]:  # It treats a missing or damaged file as empty.
            raise _damaged(path, reader.num_records(), counts[path])
        return reader

    readers = dict(zip(counts, _in_threads(opened, counts), strict=True))
    return lambda path, position: readers[path].read([position])[0]


class _TFRecords:
    """Random access to TFRecord files, a format for reading from start to end."""

    def __init__(self, counts: Mapping[str, int]):
        self._files: dict[str, int] = {}
        weakref.finalize(self, lambda files: list(map(os.close, files.values())), self._files)
        try:
            for path in counts:
                self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"cannot open '{path}': {error.strerror}; put it on a local disk") from error
        self._bounds = _record_bounds(self._files, counts)

    def __call__(self, path: str, position: int) -> bytes:
        start, end = self._bounds[path][position : position + 2].tolist()
        # Unlike seek and read, pread leaves no state for threads to share.
        record = os.pread(self._files[path], end - start, start)
        if len(record) != end - start or _LENGTH.unpack_from(record)[0] != len(record) - _HEADER - _FOOTER:
            raise ValueError(f"'{path}' has changed: no record of {end - start} bytes at {start}")
        # Checked here, because TensorFlow's parser quotes damage in a message that Python cannot decode.
        tf.train.Example.FromString(record := record[_HEADER:-_FOOTER])
        return record


def _record_bounds(files: Mapping[str, int], counts: Mapping[str, int]) -> dict[str, np.ndarray]:
    """Returns where the records of each file start and the last one ends: int64 [count + 1]."""
    key = repr([(p, counts[p], (of := os.fstat(f)).st_size, of.st_mtime_ns) for p, f in files.items()])
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cnx2_jax")
    name = f"tfrecord-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.npz"
    lasts = np.cumsum([counts[path] + 1 for path in files])
    try:
        with np.load(os.path.join(folder, name)) as arrays:
            bounds = arrays["bounds"]
    except Exception:  # A missing or damaged index is made again.
        bounds = np.concatenate(_in_threads(lambda path: _walk(path, files[path], counts[path]), files))
        with contextlib.suppress(OSError):  # If the index cannot be kept, the next run makes it again.
            os.makedirs(folder, exist_ok=True)
            with replacing(Path(folder, name)) as partial, partial.open("wb") as file:
                np.savez(file, bounds=bounds)
    return dict(zip(files, np.split(bounds, lasts[:-1]), strict=True))


def _walk(path: str, file: int, count: int) -> np.ndarray:
    bounds, size = [0], os.fstat(file).st_size
    if hasattr(os, "posix_fadvise"):  # Otherwise the system reads ahead, the images with the headers.
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
    while (start := bounds[-1]) < size:
        header = os.pread(file, _HEADER, start)
        length = _LENGTH.unpack_from(header)[0] if len(header) == _HEADER else size
        bounds.append(start + _HEADER + length + _FOOTER)
    if bounds[-1] != size or len(bounds) != count + 1:
        raise _damaged(path, len(bounds) - 1 - (bounds[-1] > size), count)
    return np.array(bounds, np.int64)


def _damaged(path: str, found: int, count: int) -> UserError:
    return UserError(f"'{path}' has {found} whole records, not {count}: missing or damaged; restore the file")


def _in_threads(function: Callable[[str], Any], paths: Mapping[str, int]) -> list[Any]:
    with concurrent.futures.ThreadPoolExecutor(32) as executor:
        return list(executor.map(function, paths))
