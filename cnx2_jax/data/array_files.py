"""Arrays in files: .npy, .npz, TIFF and PNG of 8 or 16 bits, read bit for bit as [height, width, bands].

Files that one program wrote of arrays of one shape differ in their values alone. So the first file of a
source gives a template: the bytes that all such files share, and where the values are. TensorFlow compares
and reads those without Python's lock. NumPy or tifffile reads any other file (compressed, tiled, of another
shape).
"""

import dataclasses
import io
import itertools
import os
import types
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from cnx2_jax.data.refusals import refusal, refuse_unless, refused
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64")
LAYOUTS = ("channels_last", "channels_first")
ENDINGS = (".npy", ".npz", ".tif", ".tiff", ".png")

# Maps the scalar string of a record to its array, [height, width, bands], in its own dtype.
Read: TypeAlias = Callable[[tf.Tensor], tf.Tensor]

_HEADER = 4096  # more than the header of any .npy file of a plain array
_PNG_DEPTH = 24  # the place of the depth in a PNG; the colour type follows
_PNG_BANDS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type


@dataclasses.dataclass(frozen=True)
class Form:
    """The dtype (native) and the number of bands that all arrays of a source have."""

    dtype: np.dtype
    bands: int

    def __str__(self) -> str:
        return f"{self.bands} band{'s' * (self.bands != 1)} of {self.dtype}"


def open_form(path: str, layout: str, array: str = "") -> tuple[Form, Read]:
    """Returns the form of the array in a file, and the function that reads files like it.

    Args:
      path: ends in one of ENDINGS.
      layout: of .npy and .npz files, one of LAYOUTS. A TIFF states its own; several pages are the bands with
        "channels_first", and refused otherwise.
      array: the name of the array in .npz files; empty for the only one.

    Returns:
      The form, and the function, which refuses files of another one (tf.errors.OpError when it runs).

    Raises:
      UserError: the file cannot be read, or its array is not of one of DTYPES; an unknown layout; tifffile is
        missing.
    """
    check_layout(layout)
    ending = os.path.splitext(path)[1].lower()
    try:
        content = _content(path)
        if ending == ".png":
            return _png_form(path, content)
        decode = _decoder(ending, layout, array)
        first = decode(content)
    except tf.errors.InvalidArgumentError as error:
        raise UserError(f"array '{path}' {refusal(error)}") from None
    except UserError:
        raise
    except Exception as error:  # NumPy and tifffile raise all kinds for damaged files.
        raise UserError(f"array '{path}' cannot be read: {error}; repair or remove it") from None
    form = checked_form(path, first)
    template = _TEMPLATES[ending](content, layout) if ending in _TEMPLATES else None
    return form, _reader(form, decode, template)


def checked_form(name: str, array: Any) -> Form:
    """Returns the form of an array [..., bands], named in messages.

    Raises:
      UserError: its dtype is not one of DTYPES.
    """
    if array.dtype.name not in DTYPES:
        raise UserError(f"array '{name}' is of {array.dtype}; convert it to one of {', '.join(DTYPES)}")
    return Form(np.dtype(array.dtype.name), array.shape[-1])


def check_layout(layout: str) -> None:
    """Raises UserError unless the layout is one of LAYOUTS."""
    if layout not in LAYOUTS:
        raise UserError(f"data.layout '{layout}' must be one of {', '.join(LAYOUTS)}")


def bands_last(array: np.ndarray, layout: str) -> np.ndarray:
    """Returns [height, width, bands] of an array of 2 axes, or of 3 in this layout.

    Raises:
      tf.errors.InvalidArgumentError: it has another number of axes.
    """
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        raise refused(f"has the shape {array.shape}; an image has 2 axes, or 3 with its bands")
    return np.moveaxis(array, 0, -1) if layout == "channels_first" else array


def decode_values(raw: tf.Tensor, shape: Sequence[int], dtype: np.dtype) -> tf.Tensor:
    """Returns the array of this shape whose bytes are `raw`, scalar string; `dtype` gives their order."""
    # decode_raw has all dtypes of DTYPES but uint32.
    kind = tf.int32 if dtype.name == "uint32" else tf.as_dtype(dtype.name)
    values = tf.io.decode_raw(raw, kind, little_endian=dtype.newbyteorder("=") == dtype)
    return tf.reshape(tf.bitcast(values, tf.as_dtype(dtype.name)), shape)


def import_extra(name: str) -> types.ModuleType:
    """Imports a library of the extra `arrays`.

    Raises:
      UserError: it is not installed.
    """
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"'{name}' cannot be imported; pip install 'cnx2_jax[arrays]'") from None


@dataclasses.dataclass(frozen=True)
class _Template:
    """The bytes and places that files of one program and shape share.

    Attributes:
      length: of the file in bytes.
      same: offsets, and the bytes that every such file has there.
      offset: of the values.
      shape: of the values as stored.
      dtype: with the byte order of the file.
      bands_first: whether the bands are the first of three axes.
    """

    length: int
    same: tuple[tuple[int, bytes], ...]
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    bands_first: bool

    def fits(self, content: tf.Tensor) -> tf.Tensor:
        fits = tf.strings.length(content) == self.length
        # Bounded by the length, because TensorFlow refuses to start beyond the end of a string.
        for offset, expected in self.same:
            start = tf.minimum(offset, tf.strings.length(content))
            fits &= tf.strings.substr(content, start, len(expected)) == expected
        return fits

    def values(self, content: tf.Tensor) -> tf.Tensor:
        item, count = self.dtype.itemsize, int(np.prod(self.shape))
        if self.offset % item == 0 and self.length % item == 0:
            # Spares the copy of a substring.
            first = self.offset // item
            flat = decode_values(content, [self.length // item], self.dtype)
            values = tf.reshape(flat[first : first + count], self.shape)
        else:
            values = tf.strings.substr(content, self.offset, count * item)
            values = decode_values(values, self.shape, self.dtype)
        if len(self.shape) == 2:
            return values[..., None]
        return tf.transpose(values, [1, 2, 0]) if self.bands_first else values


def _reader(form: Form, decode: Callable[[bytes], np.ndarray], template: _Template | None) -> Read:
    def decoded(content: bytes) -> np.ndarray:
        try:
            array = decode(content)
        except tf.errors.OpError:
            raise
        except Exception as error:  # as above; TensorFlow has no name for most kinds
            raise tf.errors.DataLossError(None, None, str(error)) from error
        found = Form(np.dtype(array.dtype.name), array.shape[-1])
        if found != form:
            raise refused(f"has {found}, but the first array has {form}; keep arrays of one form together")
        return np.ascontiguousarray(array, form.dtype)

    def by_python(content: tf.Tensor) -> tf.Tensor:
        kind = tf.as_dtype(form.dtype)
        return tf.ensure_shape(
            tf.numpy_function(decoded, [content], kind, stateful=False), [None, None, form.bands]
        )

    def read(content: tf.Tensor) -> tf.Tensor:
        if template is None:
            return by_python(content)
        image = tf.cond(template.fits(content), lambda: template.values(content), lambda: by_python(content))
        return tf.ensure_shape(image, [None, None, form.bands])

    return read


def _decoder(ending: str, layout: str, array: str) -> Callable[[bytes], np.ndarray]:
    """Returns the function that maps the bytes of such a file to [height, width, bands]."""
    if ending == ".npy":
        return lambda content: bands_last(np.load(io.BytesIO(content), allow_pickle=False), layout)
    if ending == ".npz":
        return lambda content: bands_last(_of_npz(content, array), layout)
    if ending not in (".tif", ".tiff"):
        raise refused(f"does not end in one of {', '.join(ENDINGS)}; convert or rename it")
    tifffile = import_extra("tifffile")

    def of_tiff(content: bytes) -> np.ndarray:
        with tifffile.TiffFile(io.BytesIO(content)) as file:
            pages = _pages(file, layout)
            arrays = [page.asarray() for page in pages]
            first = pages[0].axes == "SYX"
        if len(arrays) > 1:
            return np.stack(arrays, axis=-1)
        return bands_last(arrays[0], "channels_first" if first else "channels_last")

    return of_tiff


def _of_npz(content: bytes, name: str) -> np.ndarray:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        names = ", ".join(arrays.files)
        if name and name not in arrays.files:
            raise refused(f"has no array {name}, which data.array names; it has: {names}")
        if not name and len(arrays.files) != 1:
            raise refused(f"has the arrays {names}; choose one with data.array")
        return arrays[name or arrays.files[0]]


def _pages(file: Any, layout: str) -> list:
    """Returns the pages of a TIFF that hold its bands; overviews are left out."""
    pages = [page for page in file.pages if not page.is_reduced]
    if len(pages) == 1:
        if pages[0].axes not in ("YX", "YXS", "SYX"):
            raise refused(f"has the axes {pages[0].axes}; an image has rows, columns and bands")
        return pages
    if layout != "channels_first":
        raise refused(
            f"has {len(pages)} pages; if these are the bands, set data.layout=channels_first, else split it"
        )
    if any((p.axes, p.shape, p.dtype) != ("YX", pages[0].shape, pages[0].dtype) for p in pages):
        raise refused("has pages of different shapes or of several bands; make each page one band")
    return pages


def _npy_template(content: bytes, layout: str) -> _Template | None:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran or file.tell() > _HEADER:
        return None
    same = ((0, content[: file.tell()]),)
    return _Template(len(content), same, file.tell(), shape, dtype, layout == "channels_first")


# Tags of TIFF 6.0 whose values may lie outside of the directory, and without which values cannot be placed.
_PLACED_BY = (258, 273, 279, 339)  # BitsPerSample, StripOffsets, StripByteCounts, SampleFormat


def _tiff_template(content: bytes, layout: str) -> _Template | None:
    tifffile = import_extra("tifffile")
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        pages, form = _pages(file, layout), file.tiff
        same = [(0, content[: 16 if form.is_bigtiff else 8])]
        ends: list[tuple[int, int]] = []
        for page in pages:
            if page.compression != 1 or page.is_tiled or page.predictor != 1 or page.fillorder != 1:
                return None
            if page.bitspersample != 8 * page.dtype.itemsize:
                return None
            count = int.from_bytes(
                content[page.offset : page.offset + form.tagnosize],
                "little" if form.byteorder == "<" else "big",
            )
            size = form.tagnosize + count * form.tagsize + form.offsetsize
            same.append((page.offset, content[page.offset : page.offset + size]))
            for tag in filter(None, map(page.tags.get, _PLACED_BY)):
                same.append((tag.valueoffset, content[tag.valueoffset :][: tag.valuebytecount]))
            ends += zip(page.dataoffsets, page.databytecounts, strict=True)
        first = pages[0]
        dtype = first.dtype.newbyteorder(form.byteorder)
        shape = first.shape if len(pages) == 1 else (len(pages), *first.shape)
        bands_first = len(pages) > 1 or first.axes == "SYX"
    joined = all(a + size == b for (a, size), (b, _) in itertools.pairwise(ends))
    whole = sum(size for _, size in ends) == int(np.prod(shape)) * dtype.itemsize
    if not joined or not whole:
        return None
    return _Template(len(content), tuple(same), ends[0][0], shape, dtype, bands_first)


_TEMPLATES: dict[str, Callable[[bytes, str], _Template | None]] = {
    ".npy": _npy_template,
    ".tif": _tiff_template,
    ".tiff": _tiff_template,
}


def _png_form(path: str, content: bytes) -> tuple[Form, Read]:
    depth, colour = (*content[_PNG_DEPTH : _PNG_DEPTH + 2], 0, 0)[:2]
    if not content.startswith(b"\x89PNG") or depth not in (8, 16) or colour not in _PNG_BANDS:
        raise UserError(f"array '{path}' is not a PNG of 8 or 16 bits without a palette; convert it")
    form = Form(np.dtype(f"uint{depth}"), _PNG_BANDS[colour])

    def read(encoded: tf.Tensor) -> tf.Tensor:
        start = tf.strings.substr(encoded + bytes(_PNG_DEPTH + 2), _PNG_DEPTH, 2)
        reason = f"has another depth or colour type than the first array, which has {form}; convert it"
        encoded = refuse_unless(start == bytes([depth, colour]), reason, encoded)
        return tf.io.decode_png(encoded, channels=form.bands, dtype=tf.as_dtype(form.dtype))

    return form, read


def _content(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"array '{path}' cannot be read: {error.strerror}; check the path") from None
