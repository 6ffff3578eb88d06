"""Bytes to pixels: which files are readable images, and which way up they are."""

import zlib
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from cnx2_jax.data.operations import to_gray
from cnx2_jax.data.refusals import refuse_unless
from cnx2_jax.data.tensorflow import tf

BoxOf: TypeAlias = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]

# EXIF data is at the start of a file, after a few bytes of JFIF; its first directory has the orientation.
_EXIF_STARTS_WITHIN = 64
_EXIF_WITHIN = 4096
_EXIF_ROWS = 1 + _EXIF_WITHIN // 12
_ORIENTATION = 0x0112


def _traced_once(function: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[tf.Tensor], tf.Tensor]:
    """Traces a function of a scalar string once per process, not once for every pipeline that calls it."""
    return tf.function(function, input_signature=[tf.TensorSpec([], tf.string)], autograph=False)


def decode(encoded: tf.Tensor, channels: int) -> tf.Tensor:
    """Decodes a JPEG, PNG, WebP or GIF image, recognised by its content, not by its name.

    Drops alpha and takes the first frame, as Pillow's `convert("RGB")` does; refuses an animated WebP.
    Keeps the upper 8 of 16 bits. Turns a JPEG upright that its EXIF data calls rotated. Computes one
    channel as Pillow's `convert("L")` does.

    Args:
      encoded: scalar string.
      channels: 1 or 3.

    Returns:
      uint8 [height, width, channels].

    Raises:
      tf.errors.OpError: when it runs, if the bytes are not an image.
    """
    return _with_channels(_decode_colour(encoded), channels)


@_traced_once
def _decode_colour(encoded: tf.Tensor) -> tf.Tensor:
    return tf.case(
        [
            (tf.io.is_jpeg(encoded), lambda: _upright(_decode_jpeg(encoded), _orientation(encoded))),
            (tf.strings.substr(encoded, 0, 4) == b"RIFF", lambda: _decode_webp(encoded)),
        ],
        default=lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
    )


def decode_crop(encoded: tf.Tensor, channels: int, box_of: BoxOf) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes the part of an image that `box_of` chooses; of a JPEG, only that part.

    Damage in a JPEG below that part goes unnoticed.

    Args:
      encoded, channels: see `decode`.
      box_of: maps height and width (scalar int32) to a box, int32 [4]: top, left, height, width.

    Returns:
      uint8 [height, width, channels] of the box, the same pixels as those of `decode`; and the height and
      width of the whole image, int32 [2].

    Raises:
      tf.errors.OpError: see `decode`.
    """

    def from_jpeg() -> tuple[tf.Tensor, tf.Tensor]:
        shape = tf.io.extract_jpeg_shape(encoded)
        box = box_of(shape[0], shape[1])
        # JPEG stores colour at half the resolution, and the decoder interpolates it without using pixels
        # beyond the blocks it decodes: one more column on each side keeps those of the box exact.
        left = tf.maximum(box[1] - _MARGIN, 0)
        right = tf.minimum(box[1] + box[3] + _MARGIN, shape[1])
        wider = tf.stack([box[0], left, box[2], right - left])
        image = tf.image.decode_and_crop_jpeg(encoded, wider, channels=3, dct_method=_EXACT)
        # Sliced as rows of width x 3, which copies row by row instead of pixel by pixel.
        rows = tf.reshape(image, [box[2], (right - left) * 3])
        rows = rows[:, (box[1] - left) * 3 : (box[1] - left + box[3]) * 3]
        return tf.reshape(rows, [box[2], box[3], 3]), shape[:2]

    def from_any() -> tuple[tf.Tensor, tf.Tensor]:
        image = decode(encoded, 3)
        shape = tf.shape(image)
        top, left, height, width = tf.unstack(box_of(shape[0], shape[1]))
        return image[top : top + height, left : left + width], shape[:2]

    upright_jpeg = tf.logical_and(tf.io.is_jpeg(encoded), _orientation(encoded) == 1)
    image, size = tf.cond(upright_jpeg, from_jpeg, from_any)
    return _with_channels(image, channels), size


def decode_map(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes a map of class indices, a greyscale or palette PNG of 1, 2, 4 or 8 bits.

    The indices of a palette are the classes, not its colours; so are the grey levels of low depths, unscaled.

    Args:
      encoded: scalar string.

    Returns:
      uint8 [height, width].

    Raises:
      tf.errors.OpError: when it runs, if the bytes are not such a PNG.
    """
    start = tf.io.decode_raw(tf.strings.substr(encoded + bytes(_PNG_START), 0, _PNG_START), tf.uint8)
    depth, colour = tf.cast(start[_DEPTH], tf.int32), tf.cast(start[_COLOUR], tf.int32)
    is_png = tf.reduce_all(start[: len(_PNG)] == np.frombuffer(_PNG, np.uint8))
    encoded = refuse_unless(is_png, "is not a PNG; maps are PNGs of class indices", encoded)
    reason = tf.strings.join(
        [
            "is in ",
            tf.gather(_COLOURS, tf.clip_by_value(colour, 0, len(_COLOURS) - 1)),
            tf.strings.format(" of {} bits", depth),
            " instead of index form; save the class of each pixel as a greyscale or palette PNG of 8 bits",
        ]
    )
    indexed = ((colour == _GREY) | (colour == _PALETTE)) & (depth <= 8)
    levels = tf.io.decode_png(_as_grey(refuse_unless(indexed, reason, encoded), colour), channels=1)[..., 0]
    # The decoder scales levels of fewer bits to the range of 8.
    highest = tf.bitwise.left_shift(1, tf.clip_by_value(depth, 1, 8)) - 1
    return levels // tf.cast(255 // highest, tf.uint8)


def decoded_size(encoded: tf.Tensor) -> tf.Tensor:
    """Returns height and width, int32 [2], of what `decode` returns; of a JPEG or PNG, from its header alone.

    Raises:
      tf.errors.OpError: see `decode`.
    """

    def from_jpeg() -> tf.Tensor:
        size = tf.io.extract_jpeg_shape(encoded)[:2]
        return tf.cond(_orientation(encoded) >= 5, lambda: size[::-1], lambda: size)

    def from_png() -> tf.Tensor:
        width_height = tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)
        return tf.ensure_shape(width_height, [2])[::-1]

    return tf.case(
        [
            (tf.io.is_jpeg(encoded), from_jpeg),
            (tf.strings.substr(encoded, 0, len(_PNG)) == _PNG, from_png),
        ],
        default=lambda: tf.shape(decode(encoded, 3))[:2],
    )


# A PNG starts with a signature and the chunk IHDR: length, type, height, width, depth, colour type, three
# more bytes, CRC.
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_START, _DEPTH, _COLOUR, _CRC = 33, 24, 25, 29
_GREY, _PALETTE = 0, 3
_COLOURS = ("greyscale", "colour", "RGB", "a palette", "greyscale with alpha", "colour", "RGBA")
_BEFORE_DATA = 4096


def _palette_to_grey() -> np.ndarray:
    """Returns the change that makes a palette PNG grey, as XOR: uint8 [8], from the colour type to the CRC.

    A change of the same bits at the same place changes a CRC by the same bits, whatever the other bytes are.
    """
    change = np.zeros(_PNG_START, np.uint8)
    change[_COLOUR] = _PALETTE ^ _GREY
    covered = change[12:_CRC].tobytes()
    crc = zlib.crc32(covered) ^ zlib.crc32(bytes(len(covered)))
    change[_CRC:] = np.frombuffer(crc.to_bytes(4, "big"), np.uint8)
    return change[_COLOUR:]


_TO_GREY = _palette_to_grey()
_BYTES = [bytes([value]) for value in range(256)]


def _as_grey(encoded: tf.Tensor, colour: tf.Tensor) -> tf.Tensor:
    """Returns a PNG in which the indices of a palette are grey levels, because the decoder applies palettes.

    Drops the chunks before the data, PLTE and tRNS among them, about which the decoder would warn.
    """
    change = tf.cast(colour == _PALETTE, tf.uint8) * _TO_GREY
    values = tf.io.decode_raw(tf.strings.substr(encoded, _COLOUR, _PNG_START - _COLOUR), tf.uint8)
    changed = tf.gather(_BYTES, tf.cast(tf.bitwise.bitwise_xor(values, change), tf.int32))
    # Only the chunks at the start, because a regular expression is slow over megabytes.
    end = tf.minimum(_PNG_START + _BEFORE_DATA, tf.strings.length(encoded))
    chunks = tf.strings.substr(encoded, _PNG_START, end - _PNG_START)
    chunks = tf.strings.regex_replace(chunks, rb"\A\C*?(\C{4}IDAT)", rb"\1", replace_global=False)
    start, rest = tf.strings.substr(encoded, 0, _COLOUR), tf.strings.substr(encoded, end, -1)
    return tf.strings.join([start, tf.strings.reduce_join(changed), chunks, rest])


# TensorFlow's default is a fast, inexact inverse transform, off by up to 4 levels.
_EXACT = "INTEGER_ACCURATE"
_MARGIN = 2


def _with_channels(image: tf.Tensor, channels: int) -> tf.Tensor:
    image.set_shape([None, None, 3])
    return image if channels == 3 else to_gray(image)


def _decode_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    return tf.io.decode_jpeg(encoded, channels=3, dct_method=_EXACT)


def _decode_webp(encoded: tf.Tensor) -> tf.Tensor:
    # TensorFlow 2.21 reads WebP both with and without alpha only with channels=0, which overruns its
    # buffer on an animation. With channels=3 an animation is a clean error. The flag for animations is
    # bit 1 of the byte after the VP8X chunk's header.
    # Padded, because an error about a short file would quote its bytes, which Python cannot decode.
    header = tf.strings.substr(encoded + bytes(21), 0, 21)
    flags = tf.io.decode_raw(header, tf.uint8)[20]
    extended = tf.strings.substr(header, 12, 4) == b"VP8X"
    return tf.cond(
        tf.logical_and(extended, tf.bitwise.bitwise_and(flags, tf.constant(2, tf.uint8)) > 0),
        lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False),
        lambda: tf.io.decode_image(encoded, channels=0, expand_animations=False)[..., :3],
    )


@_traced_once
def _orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Returns the EXIF orientation of a JPEG, int32: 1 (upright) to 8; 1 if the file has none."""
    start = tf.strings.substr(encoded, 0, _EXIF_STARTS_WITHIN)
    has_exif = tf.strings.regex_full_match(start, rb"\C{4,}Exif\x00\x00\C{8,}")
    return tf.cond(
        has_exif,
        lambda: _read_orientation(tf.strings.substr(encoded, 0, _EXIF_WITHIN)),
        lambda: tf.constant(1),
    )


def _read_orientation(start: tf.Tensor) -> tf.Tensor:
    """Looks up the tag in EXIF's first directory (TIFF 6.0: header, count, entries of 12 bytes).

    Reads the directory as a table with six 16-bit numbers per row: tag, type, two of a count, two of a value.
    Its first row ends with the number of entries. What lies beyond `start` reads as 0xffff.
    """
    tiff = tf.strings.regex_replace(start, rb"\A\C{4,50}?Exif\x00\x00", b"", replace_global=False)
    big_endian = tf.strings.substr(tiff, 0, 1) == b"M"

    def numbers(content: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        big, little = (tf.io.decode_raw(content, dtype, little_endian=little) for little in (False, True))
        return tf.where(big_endian, big, little)

    offset = tf.reshape(numbers(tf.strings.substr(tiff, 4, 4), tf.int32), [])
    offset = tf.clip_by_value(offset, 0, _EXIF_WITHIN)
    # The ten bytes before the number of entries fill the first row.
    padded = tf.strings.join([b"\xff" * 10, tiff, b"\xff" * (_EXIF_WITHIN + 12 * _EXIF_ROWS)])
    table = numbers(tf.strings.substr(padded, offset, 12 * _EXIF_ROWS), tf.uint16)
    tags, _, _, _, values, counts = tf.unstack(tf.reshape(tf.cast(table, tf.int32), [_EXIF_ROWS, 6]), axis=1)
    places = np.arange(_EXIF_ROWS, dtype=np.int32)
    places[0] = 2**16  # the first row is not an entry: more than any number of them
    found = (tags == _ORIENTATION) & (places <= counts[0])
    first = tf.argmax(found)
    value = tf.gather(values, first)
    return tf.where(tf.gather(found, first) & (value >= 1) & (value <= 8), value, 1)


def _upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns an image as Pillow's `ImageOps.exif_transpose` does."""

    def turned() -> tf.Tensor:
        lying = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
        mirrored = tf.reduce_any(orientation == [2, 3, 6, 7])
        flipped = tf.reduce_any(orientation == [3, 4, 7, 8])
        return tf.reverse(lying, tf.where([flipped, mirrored])[:, 0])

    return tf.cond(orientation == 1, lambda: image, turned)
