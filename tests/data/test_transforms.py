"""Transforms against Pillow on a real photograph, and their distributions over many draws."""

import io
import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from sklearn.datasets import load_sample_image

from cnx2_jax.data import transforms


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def close(image, expected) -> bool:
    """Within one grey level on 99.9% of the values."""
    difference = np.abs(np.asarray(image, int) - np.asarray(expected, int))
    return np.asarray(image).shape == np.asarray(expected).shape and (difference <= 1).mean() > 0.999


def in_tf_data(function, *arguments):
    """Runs in graph mode, as the pipeline does."""
    dataset = tf.data.Dataset.from_tensors(arguments).map(function)
    return next(dataset.as_numpy_iterator())


ENCODINGS = {
    "jpeg": lambda image: encode(image, "JPEG"),
    "jpeg progressive": lambda image: encode(image, "JPEG", progressive=True, quality=95),
    "jpeg grey": lambda image: encode(image.convert("L"), "JPEG"),
    "png": lambda image: encode(image, "PNG"),
    "png grey": lambda image: encode(image.convert("L"), "PNG"),
    "png palette": lambda image: encode(image.convert("P"), "PNG"),
    "png alpha": lambda image: encode(with_alpha(image), "PNG"),
    "png grey alpha": lambda image: encode(with_alpha(image).convert("LA"), "PNG"),
    "webp": lambda image: encode(image, "WEBP"),
    "webp lossless": lambda image: encode(image, "WEBP", lossless=True),
    "webp alpha": lambda image: encode(with_alpha(image), "WEBP"),
    "webp lossless alpha": lambda image: encode(with_alpha(image), "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_decode_equals_pillow(photo, encoding):
    encoded = ENCODINGS[encoding](photo)
    image = Image.open(io.BytesIO(encoded))
    colour = in_tf_data(lambda value: transforms.decode(value, 3), encoded)
    assert colour.dtype == np.uint8
    np.testing.assert_array_equal(colour, np.asarray(image.convert("RGB")))
    grey = in_tf_data(lambda value: transforms.decode(value, 1), encoded)
    np.testing.assert_array_equal(grey[..., 0], np.asarray(image.convert("RGB").convert("L")))


def test_grey_files_keep_every_level():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    grey = transforms.decode(encode(Image.fromarray(levels), "PNG"), 1)
    np.testing.assert_array_equal(grey[..., 0], levels)


def animation(photo) -> bytes:
    frame = photo.resize((32, 32))
    return encode(frame, "WEBP", save_all=True, append_images=[frame.rotate(90)])


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda photo: b"", id="empty"),
        pytest.param(lambda photo: b"RIFF", id="cut header"),
        pytest.param(lambda photo: b"no image at all, but some text", id="text"),
        pytest.param(lambda photo: encode(photo, "JPEG")[:9000], id="cut jpeg"),
        pytest.param(lambda photo: encode(photo, "PNG")[:9000], id="cut png"),
        pytest.param(lambda photo: encode(photo, "WEBP")[:9000], id="cut webp"),
        pytest.param(animation, id="animated webp"),  # without care, TensorFlow corrupts its heap
    ],
)
def test_broken_images_raise(photo, broken):
    with pytest.raises(tf.errors.OpError):
        in_tf_data(lambda value: transforms.decode(value, 3), broken(photo))


@pytest.mark.parametrize("size", [(112, 160), (64, 64), (300, 90), (853, 1000), (200, 900)])
def test_resize_is_pillows_bicubic(photo, size):
    resized = transforms.resize(np.asarray(photo), size)
    expected = photo.resize(size[::-1], Image.Resampling.BICUBIC)
    assert resized.dtype == tf.uint8
    assert close(resized, expected)
    # Rounded, not cut off: the differences there are cancel out.
    assert abs(np.mean(np.asarray(resized, int) - np.asarray(expected, int))) < 0.05


def boxes(height, width, scale, ratio, count=4000) -> np.ndarray:
    def box(index):
        seed = tf.stack([tf.constant(5, tf.int64), index])
        return transforms.random_crop_box(tf.constant(height), tf.constant(width), scale, ratio, seed)

    dataset = tf.data.Dataset.range(count).map(box).batch(count)
    return next(dataset.as_numpy_iterator()).astype(float)


def reference_boxes(height, width, scale, ratio, count=4000) -> np.ndarray:
    """torchvision's RandomResizedCrop.get_params, literally."""
    rng = np.random.default_rng(0)

    def box():
        for _ in range(10):
            area = height * width * rng.uniform(*scale)
            aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
        if width / height < ratio[0]:
            w, h = width, round(width / ratio[0])
        elif width / height > ratio[1]:
            w, h = round(height * ratio[1]), height
        else:
            w, h = width, height
        return (height - h) // 2, (width - w) // 2, h, w

    return np.array([box() for _ in range(count)], float)


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (427, 640, (0.08, 1.0), (3 / 4, 4 / 3)),
        (500, 375, (0.2, 1.0), (3 / 4, 4 / 3)),
        (100, 400, (0.5, 1.0), (3 / 4, 4 / 3)),  # falls back now and then
        (8, 8, (0.5, 1.0), (0.9, 1.1)),
        (300, 300, (0.08, 0.1), (1.0, 1.0)),
    ],
)
def test_crop_boxes_are_distributed_as_torchvisions(height, width, scale, ratio):
    drawn, expected = (
        boxes(height, width, scale, ratio),
        reference_boxes(height, width, scale, ratio),
    )
    for sample in (drawn, expected):
        top, left, h, w = sample.T
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()

    def features(sample):
        top, left, h, w = sample.T
        middle = [(top + h / 2) / height, (left + w / 2) / width]
        return [h * w / (height * width), np.log(w / h), *middle, top == 0, left == 0]

    # Kolmogorov-Smirnov: two samples of 4000 from one distribution differ by 0.05 once in 10^4.
    for ours, theirs in zip(features(drawn), features(expected), strict=True):
        grid = np.union1d(ours, theirs)
        cumulative = [np.searchsorted(np.sort(x), grid, "right") / len(x) for x in (ours, theirs)]
        assert np.abs(cumulative[0] - cumulative[1]).max() < 0.05


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (50, 400, (0, 166, 50, 67)),  # too wide: full height, width 50 * 4/3
        (400, 51, (166, 0, 68, 51)),  # too high: full width, height 51 / (3/4)
        (1, 90, (0, 44, 1, 1)),
    ],
)
def test_crop_falls_back_to_the_centre(height, width, expected):
    # 90% and more of the area never has such a ratio.
    drawn = boxes(height, width, (0.9, 1.0), (3 / 4, 4 / 3), count=20)
    np.testing.assert_array_equal(drawn, [expected] * 20)


def test_whole_image_when_its_ratio_fits_but_no_try_does():
    # Area 100% with any other ratio than the image's sticks out.
    drawn = boxes(96, 100, (1.0, 1.0), (1.1, 1.2), count=20)
    np.testing.assert_array_equal(drawn, reference_boxes(96, 100, (1.0, 1.0), (1.1, 1.2), count=20))


def test_random_resized_crop_is_crop_then_resize(photo):
    image, seed = np.asarray(photo), tf.constant([3, 4], tf.int64)
    options = {"scale": (0.2, 0.6), "ratio": (0.75, 4 / 3)}
    height, width = (tf.constant(side) for side in image.shape[:2])
    top, left, h, w = transforms.random_crop_box(height, width, *options.values(), seed).numpy()
    cropped = transforms.random_resized_crop(image, size=(96, 128), seed=seed, **options)
    expected = photo.crop((left, top, left + w, top + h)).resize((128, 96), Image.Resampling.BICUBIC)
    assert close(cropped, expected)


def test_flip_mirrors_half_of_the_images():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    dataset = tf.data.Dataset.range(2000).map(
        lambda i: transforms.random_flip(image, tf.stack([tf.constant(0, tf.int64), i]))
    )
    flipped = np.stack(list(dataset.as_numpy_iterator()))
    is_same = (flipped == image).all(axis=(1, 2, 3))
    is_mirrored = (flipped == image[:, ::-1]).all(axis=(1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    assert abs(is_mirrored.mean() - 0.5) < 0.05  # more than 4 standard deviations


def train_image(encoded, seed, **changes):
    options = {"size": (24, 32), "channels": 3, "crop_scale": (0.3, 1.0), "crop_ratio": (0.7, 1.4)}
    return transforms.train_image(
        encoded, tf.constant(seed, tf.int64), **{**options, "flip": True, **changes}
    ).numpy()


def test_train_image_is_a_function_of_its_seed(photo):
    encoded = encode(photo, "JPEG")
    image = train_image(encoded, [1, 2])
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, train_image(encoded, [1, 2]))
    for other in ([1, 3], [2, 2], [1, 2 + 2**40]):
        assert (image != train_image(encoded, other)).any()


def test_train_image_flips_only_when_asked(photo):
    encoded = encode(photo.resize((96, 64)), "PNG")
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    plain = train_image(encoded, [0, 0], flip=False, **whole)
    seen = {train_image(encoded, [0, i], **whole).tobytes() for i in range(12)}
    assert seen == {plain.tobytes(), plain[:, ::-1].tobytes()}
    assert {train_image(encoded, [0, i], flip=False, **whole).tobytes() for i in range(12)} == {
        plain.tobytes()
    }


def test_flip_is_independent_of_the_crop():
    # Red grows to the right and green downwards: red tells the flip and green the crop's height.
    ramp = np.arange(0, 256, 2, dtype=np.uint8)
    image = np.stack([*np.meshgrid(ramp, ramp), np.zeros((128, 128), np.uint8)], axis=-1)
    encoded = encode(Image.fromarray(image), "PNG")
    options = {"size": (8, 8), "crop_scale": (0.2, 1.0), "crop_ratio": (1.0, 1.0)}
    images = np.stack([train_image(encoded, [0, i], **options) for i in range(400)]).astype(int)
    flipped = images[:, 0, 0, 0] > images[:, 0, -1, 0]
    height = images[:, -1, 0, 1] - images[:, 0, 0, 1]
    assert abs(np.corrcoef(flipped, height)[0, 1]) < 0.2  # four standard deviations


def reference_eval(image: Image.Image, size, crop_fraction) -> Image.Image:
    """torchvision's Resize of the short side and CenterCrop, for a square size."""
    short = math.floor(size / crop_fraction)
    width, height = image.size
    if width <= height:
        resized = (short, int(short * height / width))
    else:
        resized = (int(short * width / height), short)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    return image.crop((left, top, left + size, top + size))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("size", "crop_fraction"), [(224, 0.875), (65, 0.9), (96, 1.0), (383, 0.95)])
def test_eval_image_equals_torchvisions(photo, turned, size, crop_fraction):
    image = photo.transpose(Image.Transpose.ROTATE_90) if turned else photo
    ours = transforms.eval_image(
        encode(image, "PNG"), size=(size, size), channels=3, crop_fraction=crop_fraction
    )
    assert close(ours, reference_eval(image, size, crop_fraction))


def test_eval_image_of_a_rectangle_covers_it_and_keeps_the_shape(photo):
    # 427 x 640 covers 100 x 50 at 100 x 149; the centre 50 columns are cut out.
    ours = transforms.eval_image(encode(photo, "PNG"), size=(100, 50), channels=3, crop_fraction=1.0)
    resized = photo.resize((149, 100), Image.Resampling.BICUBIC)
    assert close(ours, resized.crop((50, 0, 100, 100)))


@pytest.mark.parametrize("size", [(384, 384), (224, 384)])
def test_eval_image_warps_from_384_up(photo, size):
    ours = transforms.eval_image(encode(photo, "PNG"), size=size, channels=3, crop_fraction=0.875)
    assert close(ours, photo.resize(size[::-1], Image.Resampling.BICUBIC))


def test_eval_image_of_one_channel(photo):
    grey = photo.convert("L")
    ours = transforms.eval_image(encode(grey, "PNG"), size=(64, 64), channels=1, crop_fraction=0.875)
    assert close(ours[..., 0], reference_eval(grey, 64, 0.875))
