"""Decoding against Pillow: every kind of file that a folder of images may hold."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from cnx2_jax.data.decoding import decode, decode_crop, decode_map, decoded_size
from cnx2_jax.data.tensorflow import tf


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


ENCODINGS = {
    "jpeg": lambda image: encoded(image, "JPEG"),
    "jpeg progressive": lambda image: encoded(image, "JPEG", progressive=True, quality=95),
    "jpeg grey": lambda image: encoded(image.convert("L"), "JPEG"),
    "jpeg 4:4:4": lambda image: encoded(image, "JPEG", subsampling=0),
    "gif": lambda image: encoded(image, "GIF"),
    "gif animated": lambda image: encoded(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
    "png animated": lambda image: encoded(image, "PNG", save_all=True, append_images=[image.rotate(90)]),
    "png bilevel": lambda image: encoded(image.convert("1"), "PNG"),
    "png palette alpha": lambda image: encoded(image.convert("P"), "PNG", transparency=3),
    "png": lambda image: encoded(image, "PNG"),
    "png grey": lambda image: encoded(image.convert("L"), "PNG"),
    "png palette": lambda image: encoded(image.convert("P"), "PNG"),
    "png alpha": lambda image: encoded(with_alpha(image), "PNG"),
    "png grey alpha": lambda image: encoded(with_alpha(image).convert("LA"), "PNG"),
    "webp": lambda image: encoded(image, "WEBP"),
    "webp lossless": lambda image: encoded(image, "WEBP", lossless=True),
    "webp alpha": lambda image: encoded(with_alpha(image), "WEBP"),
    "webp lossless alpha": lambda image: encoded(with_alpha(image), "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decode_equals_pillow(photo, encoding, in_tf_data):
    content = ENCODINGS[encoding](photo)
    image = Image.open(io.BytesIO(content))
    colour = in_tf_data(lambda value: decode(value, 3), content)
    assert colour.dtype == np.uint8
    np.testing.assert_array_equal(colour, np.asarray(image.convert("RGB")))
    grey = in_tf_data(lambda value: decode(value, 1), content)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(image.convert("RGB").convert("L")))


def test_grey_files_keep_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = decode(encoded(Image.fromarray(levels), "PNG"), 1)
    np.testing.assert_array_equal(grey[..., 0], levels)


def animation(photo) -> bytes:
    frame = photo.resize((32, 32))
    return encoded(frame, "WEBP", save_all=True, append_images=[frame.rotate(90)])


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda photo: b"", id="empty"),
        pytest.param(lambda photo: b"RIFF", id="cut header"),
        pytest.param(lambda photo: b"RIFF\xff\xfe", id="header that is no text"),
        pytest.param(lambda photo: b"no image at all, but some text", id="text"),
        pytest.param(lambda photo: encoded(photo, "JPEG")[:9000], id="cut jpeg"),
        pytest.param(lambda photo: encoded(photo, "PNG")[:9000], id="cut png"),
        pytest.param(lambda photo: encoded(photo, "WEBP")[:9000], id="cut webp"),
        pytest.param(animation, id="animated webp"),  # without care, TensorFlow corrupts its heap
    ],
)
def test_broken_images_raise(photo, broken, in_tf_data):
    with pytest.raises(tf.errors.OpError):
        in_tf_data(lambda value: decode(value, 3), broken(photo))


def test_cmyk(photo, in_tf_data):
    content = encoded(photo.convert("CMYK"), "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), int)
    image = in_tf_data(lambda value: decode(value, 3), content).astype(int)
    # Rounded another way: by a level, nowhere more.
    assert np.abs(image - expected).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_of_16_bits_the_upper_8_are_kept(mode, in_tf_data):
    levels = np.arange(0, 2**16, 257 * 4 + 3, dtype=np.uint16).reshape(8, 8)
    shape = (8, 8, 3) if mode == "RGB" else (8, 8)
    values = np.stack([levels, levels[::-1], levels.T], axis=-1) if mode == "RGB" else levels
    content = tf.io.encode_png(values.reshape(*shape[:2], -1)).numpy()
    image = in_tf_data(lambda value: decode(value, 3), content)
    expected = (values >> 8).astype(np.uint8).reshape(*shape[:2], -1)
    np.testing.assert_array_equal(image, np.broadcast_to(expected, (8, 8, 3)))


ORDERS = {"big endian": b"MM\x00*", "little endian": b"II*\x00"}


def rotated(photo, orientation, order=None, jfif=True) -> bytes:
    exif = Image.Exif()
    exif[0x010F] = "A camera"
    exif[0x0112] = orientation
    exif[0x0131] = "Software"
    content = encoded(photo, "JPEG", exif=exif)
    if order == "big endian":
        # Pillow writes little endian only: the same directory by hand, of one entry.
        entry = b"\x01\x12\x00\x03\x00\x00\x00\x01" + bytes([0, orientation]) + b"\x00\x00"
        body = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01" + entry + b"\x00\x00\x00\x00"
        plain = encoded(photo, "JPEG")
        segment = b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body
        content = plain[:20] + segment + plain[20:]
        if not jfif:
            content = plain[:2] + segment + plain[20:]
    return content


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(photo, orientation, order, in_tf_data):
    content = rotated(photo.resize((48, 32)), orientation, order)
    image = Image.open(io.BytesIO(content))
    assert image.getexif()[0x0112] == orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(in_tf_data(lambda value: decode(value, 3), content), upright)
    height, width, _ = upright.shape
    corner = in_tf_data(lambda v: decode_crop(v, 3, lambda h, w: tf.stack([1, 2, h - 5, w - 3]))[0], content)
    np.testing.assert_array_equal(corner, upright[1 : height - 4, 2 : width - 1])


def test_exif_without_jfif_and_with_nonsense(photo, in_tf_data):
    content = rotated(photo.resize((48, 32)), 6, "big endian", jfif=False)
    assert in_tf_data(lambda value: decode(value, 3), content).shape == (48, 32, 3)
    plain = in_tf_data(lambda value: decode(value, 3), encoded(photo.resize((48, 32)), "JPEG"))
    assert plain.shape == (32, 48, 3)
    for nonsense in (
        rotated(photo.resize((48, 32)), 77),
        content.replace(b"MM\x00*\x00\x00\x00\x08", b"MM\x00*\xff\xff\xff\xff"),
        content.replace(b"\x00\x00\x00\x08\x00\x01\x01\x12", b"\x00\x00\x00\x08\xff\xff\x99\x99"),
    ):
        assert in_tf_data(lambda value: decode(value, 3), nonsense).shape == (32, 48, 3)


@pytest.mark.parametrize("order", ["big", "little"])
def test_the_orientation_may_be_anywhere_in_the_directory(photo, order):
    def entry(tag, value):
        return b"".join(n.to_bytes(size, order) for n, size in ((tag, 2), (3, 2), (1, 4), (value, 2), (0, 2)))

    def with_directory(start, entries, count=None):
        directory = (len(entries) if count is None else count).to_bytes(2, order) + b"".join(entries)
        tiff = {"big": b"MM\x00*", "little": b"II*\x00"}[order] + start.to_bytes(4, order)
        body = b"Exif\x00\x00" + tiff + bytes(start - 8) + directory + bytes(4)
        plain = encoded(photo.resize((48, 32)), "JPEG")
        return plain[:20] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + plain[20:]

    other, found = entry(0x010F, 8), entry(0x0112, 6)
    for content, height in (
        (with_directory(8, [found]), 48),
        (with_directory(9, [other] * 40 + [found, entry(0x0112, 1)]), 48),  # the first counts
        (with_directory(8, [entry(0x0112, 0), found]), 32),
        (with_directory(1000, [other, found], count=2), 48),
        (with_directory(1000, [other, found], count=1), 32),  # after the end of the directory
        (with_directory(8, [other, found], count=65535), 48),
        (with_directory(4054, [found]), 48),  # the last that fits into what is read
        (with_directory(4056, [found]), 32),
        (with_directory(30000, [found]), 32),
    ):
        assert decode(content, 3).shape == (height, 80 - height, 3)


@pytest.mark.parametrize("encoding", ["jpeg", "jpeg progressive", "jpeg grey", "jpeg 4:4:4", "png", "webp"])
def test_part_equals_the_part_of_the_whole(photo, encoding, in_tf_data):
    content = ENCODINGS[encoding](photo)
    whole = decode(content, 3).numpy()
    height, width, _ = whole.shape
    rng = np.random.default_rng(0)
    boxes = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1), (16, 16, 32, 32)]
    for _ in range(40):
        top, left = int(rng.integers(0, height)), int(rng.integers(0, width))
        boxes.append(
            (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
        )
    boxes = np.array(boxes, np.int32)
    parts = tf.data.Dataset.from_tensor_slices(boxes).map(
        lambda box: decode_crop(content, 3, lambda h, w: box)[0]
    )
    for (top, left, h, w), part in zip(boxes, parts.as_numpy_iterator(), strict=True):
        np.testing.assert_array_equal(
            part, whole[top : top + h, left : left + w], err_msg=str((top, left, h, w))
        )


def test_part_in_one_channel(photo, in_tf_data):
    content = encoded(photo, "JPEG")
    part = in_tf_data(lambda v: decode_crop(v, 1, lambda h, w: tf.stack([10, 20, 30, 40]))[0], content)
    expected = Image.open(io.BytesIO(content)).convert("RGB").convert("L").crop((20, 10, 60, 40))
    np.testing.assert_array_equal(part[..., 0], expected)


def test_part_of_a_broken_image_raises(photo, in_tf_data):
    for broken in (b"", encoded(photo, "JPEG")[:300], encoded(photo, "PNG")[:9000]):
        with pytest.raises(tf.errors.OpError):
            in_tf_data(lambda v: decode_crop(v, 3, lambda h, w: tf.stack([0, 0, h, w]))[0], broken)


def index_png(values, bits, palette, transparency=None) -> bytes:
    """A PNG of the indices themselves, whatever their colours, written by Pillow."""
    image = Image.fromarray(values, "P")
    image.putpalette(palette)
    kinds = {} if transparency is None else {"transparency": transparency}
    return encoded(image, "PNG", bits=bits, **kinds)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_maps_are_the_indices_of_palettes(bits, in_tf_data, capfd):
    count = 2**bits
    rng = np.random.default_rng(bits)
    values = rng.integers(0, count, (9, 13), np.uint8)
    palette = rng.integers(0, 256, 3 * count, np.uint8).tobytes()
    for transparency in (None, 1, bytes([0, 255]), bytes(range(count))):
        content = index_png(values, bits, palette, transparency)
        assert content[24:26] == bytes([bits, 3])
        np.testing.assert_array_equal(in_tf_data(decode_map, content), values)
    assert "PNG warning" not in capfd.readouterr().err  # which would come once per image


def as_grey(content: bytes) -> bytes:
    """The PNG with a palette, without it: by the definition of the format, with Python's CRC."""
    chunks, start = [], 8
    while start < len(content):
        size = int.from_bytes(content[start : start + 4], "big")
        chunks.append((content[start + 4 : start + 8], content[start + 8 : start + 8 + size]))
        start += size + 12
    result = content[:8]
    for kind, body in chunks:
        if kind != b"PLTE":
            body = body[:9] + b"\0" + body[10:] if kind == b"IHDR" else body
            result += len(body).to_bytes(4, "big") + kind + body
            result += zlib.crc32(kind + body).to_bytes(4, "big")
    return result


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_maps_are_the_levels_of_grey(bits, in_tf_data):
    values = np.random.default_rng(0).integers(0, 2**bits, (9, 13), np.uint8)
    content = as_grey(index_png(values, bits, bytes(3 * 2**bits)))
    assert Image.open(io.BytesIO(content)).mode in ("1", "L")
    np.testing.assert_array_equal(in_tf_data(decode_map, content), values)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_size_is_that_of_the_decoded_image(photo, kind):
    np.testing.assert_array_equal(decoded_size(encoded(photo, kind)), [427, 640])


def test_size_is_that_of_the_upright_image(photo):
    for orientation in (1, 3, 5, 6, 8):
        content = rotated(photo.resize((48, 32)), orientation)
        np.testing.assert_array_equal(decoded_size(content), decode(content, 3).shape[:2])
