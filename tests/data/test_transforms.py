"""Transforms against torchvision's and timm's definitions: distributions over many draws."""

import collections
import math

import numpy as np
import pytest
from PIL import Image

from cnx2_jax.data.augment import make_augmentation
from cnx2_jax.data.crops import TRIES, random_crop_box
from cnx2_jax.data.decoding import decode
from cnx2_jax.data.erasing import erase, random_erasing_box
from cnx2_jax.data.fields import Image as ImageField
from cnx2_jax.data.symmetries import Symmetries
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.data.transforms import EvalTransform, TrainTransform
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def kolmogorov_smirnov(ours, theirs) -> float:
    """How far two samples' distributions differ; of 4000 from one, by 0.05 once in 10^4."""
    grid = np.union1d(ours, theirs)
    cumulative = [np.searchsorted(np.sort(x), grid, "right") / len(x) for x in (ours, theirs)]
    return np.abs(cumulative[0] - cumulative[1]).max()


def boxes(height, width, scale, ratio, count=4000) -> np.ndarray:
    def box(index):
        draws = tf.random.stateless_uniform([4, TRIES], tf.stack([tf.constant(5, tf.int64), index]))
        return random_crop_box(tf.constant(height), tf.constant(width), scale, ratio, draws)

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

    for ours, theirs in zip(features(drawn), features(expected), strict=True):
        assert kolmogorov_smirnov(ours, theirs) < 0.05


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


def erasing_boxes(height, width, count=4000) -> np.ndarray:
    def box(index):
        draws = tf.random.stateless_uniform([4, TRIES], tf.stack([tf.constant(6, tf.int64), index]))
        return random_erasing_box(height, width, draws)

    return next(tf.data.Dataset.range(count).map(box).batch(count).as_numpy_iterator()).astype(float)


def reference_erasing_boxes(height, width, count=4000) -> np.ndarray:
    """timm's RandomErasing._erase, literally."""
    rng = np.random.default_rng(1)

    def box():
        for _ in range(10):
            area = rng.uniform(0.02, 1 / 3) * height * width
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                return rng.integers(0, height - h + 1), rng.integers(0, width - w + 1), h, w
        return 0, 0, 0, 0

    return np.array([box() for _ in range(count)], float)


@pytest.mark.parametrize(("height", "width"), [(224, 224), (96, 160), (24, 24)])
def test_erasing_boxes_are_distributed_as_timms(height, width):
    drawn, expected = erasing_boxes(height, width), reference_erasing_boxes(height, width)
    top, left, h, w = drawn.T
    assert ((h < height) & (w < width) & (top + h <= height) & (left + w <= width)).all()

    def features(sample):
        top, left, h, w = sample.T
        return [h * w, np.log(w / h), top + h / 2, left + w / 2]

    for ours, theirs in zip(features(drawn), features(expected), strict=True):
        assert kolmogorov_smirnov(ours, theirs) < 0.05


def test_no_erasing_box_where_none_fits():
    assert not np.prod(erasing_boxes(2, 1, count=20)[:, 2:], axis=1).any()


def transform(channels=3, **changes):
    """Returns a function (encoded image, seed) -> image."""
    options = {
        "fields": {"image": ImageField(channels)},
        "size": (24, 32),
        "crop_scale": (0.3, 1.0),
        "crop_ratio": (0.7, 1.4),
        "symmetries": Symmetries(flip=True),
        "augment": None,
        "erasing": 0.0,
        "mean": MEAN,
        "std": STD,
    }
    train = TrainTransform(**{**options, **changes})

    def make(encoded, seed):
        return train.finish(train.decode({"image": encoded}, seed), seed)["image"]

    return make


def eval_image(encoded, *, size, channels, crop_fraction):
    made = EvalTransform({"image": ImageField(channels)}, size, crop_fraction)
    seed = tf.zeros([2], tf.int64)
    return made.finish(made.decode({"image": encoded}, seed), seed)["image"]


def train_image(encoded, seed, **changes):
    return transform(**changes)(encoded, tf.constant(seed, tf.int64)).numpy()


def train_images(encoded, count, **changes) -> np.ndarray:
    """Images of seeds (0, 0) to (0, count - 1), in graph mode."""
    zero, make = tf.constant(0, tf.int64), transform(**changes)
    images = tf.data.Dataset.range(count).map(
        tf.autograph.experimental.do_not_convert(lambda i: make(encoded, tf.stack([zero, i])))
    )
    return np.stack(list(images.as_numpy_iterator()))


def test_it_is_crop_then_resize_then_mirror(photo, encode, close):
    encoded = encode(photo, "PNG")
    draws = tf.random.stateless_uniform([82], tf.constant([3, 4], tf.int64))
    crop_draws = tf.reshape(draws[:40], [4, TRIES])
    height, width = (tf.constant(side) for side in (photo.height, photo.width))
    top, left, h, w = random_crop_box(height, width, (0.3, 1.0), (0.7, 1.4), crop_draws).numpy()
    expected = photo.crop((left, top, left + w, top + h)).resize((32, 24), Image.Resampling.BICUBIC)
    if draws[40] < 0.5:
        expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert close(train_image(encoded, [3, 4]), expected)


def test_half_of_the_images_are_mirrored(photo, encode):
    encoded = encode(photo.resize((32, 24)), "PNG")
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (4 / 3, 4 / 3)}
    images, plain = train_images(encoded, 2000, **whole), decode(encoded, 3).numpy()
    is_same = (images == plain).all(axis=(1, 2, 3))
    is_mirrored = (images == plain[:, ::-1]).all(axis=(1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    assert abs(is_mirrored.mean() - 0.5) < 0.05  # more than 4 standard deviations


def test_a_quarter_is_erased_with_noise_of_the_normalisation(encode):
    grey = Image.new("RGB", (32, 32), (7, 7, 7))
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "size": (32, 32)}
    images = train_images(encode(grey, "PNG"), 1000, erasing=0.25, **whole)
    changed = (images != 7).any(axis=-1)
    assert abs(changed.any(axis=(1, 2)).mean() - 0.25) < 0.06  # four standard deviations
    erased = images[changed] / 255
    # Of N(mean, std) cut off at 0 and 1, which moves both a little inwards.
    assert np.abs(erased.mean(axis=0) - MEAN).max() < 0.01
    assert np.abs(erased.std(axis=0) / STD - 1).max() < 0.06
    # Every pixel and channel has a draw of its own.
    assert np.abs(np.corrcoef(erased.T) - np.eye(3)).max() < 0.03
    for mask in changed[changed.any(axis=(1, 2))]:
        rows, columns = mask.any(axis=1), mask.any(axis=0)
        box = np.outer(rows, columns)
        assert mask.sum() > 0.9 * box.sum()  # a box, but for noise that happens to be 7 thrice


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_arrays_are_erased_with_noise_of_their_own_unit(dtype):
    mean, std = (1000.0, -20.0 if dtype != "uint16" else 3000.0), (50.0, 4.0)
    image = tf.zeros([40, 50, 2], dtype)
    erased = erase(image, tf.constant([4, 5, 30, 40]), tf.constant([1, 2], tf.int64), mean, std).numpy()
    assert erased.dtype == dtype
    noise = erased[4:34, 5:45].reshape(-1, 2)
    assert np.count_nonzero(erased) == np.count_nonzero(noise)
    normal = (noise - np.array(mean)) / std
    # 1,200 draws: four standard deviations are 0.12 and 0.08.
    assert np.abs(normal.mean(axis=0)).max() < 0.12 and np.abs(normal.std(axis=0) - 1).max() < 0.09


def test_everything_together_is_a_function_of_the_seed(photo, encode):
    everything = {"augment": make_augmentation("rand-m9-mstd0.5-inc1", (124, 116, 104), {}), "erasing": 0.5}
    images = train_images(encode(photo, "JPEG"), 24, **everything)
    assert images.shape == (24, 24, 32, 3) and images.dtype == np.uint8
    np.testing.assert_array_equal(images, train_images(encode(photo, "JPEG"), 24, **everything))
    assert len({image.tobytes() for image in images}) == 24


def test_one_channel(photo, encode):
    augment = make_augmentation("rand-m9-mstd0.5-inc1", (76,), {})
    options = {"channels": 1, "augment": augment, "erasing": 0.5, "mean": (0.3,), "std": (0.35,)}
    images = train_images(encode(photo.convert("L"), "PNG"), 60, **options)
    assert images.shape == (60, 24, 32, 1)


def test_train_image_is_a_function_of_its_seed(photo, encode):
    encoded = encode(photo, "JPEG")
    image = train_image(encoded, [1, 2])
    assert image.shape == (24, 32, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, train_image(encoded, [1, 2]))
    for other in ([1, 3], [2, 2], [1, 2 + 2**40]):
        assert (image != train_image(encoded, other)).any()


def test_train_image_flips_only_when_asked(photo, encode):
    encoded = encode(photo.resize((96, 64)), "PNG")
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.5, 1.5)}
    plain = train_image(encoded, [0, 0], symmetries=Symmetries(), **whole)
    seen = {train_image(encoded, [0, i], **whole).tobytes() for i in range(12)}
    assert seen == {plain.tobytes(), plain[:, ::-1].tobytes()}
    assert {train_image(encoded, [0, i], symmetries=Symmetries(), **whole).tobytes() for i in range(12)} == {
        plain.tobytes()
    }


@pytest.mark.parametrize(
    ("symmetries", "count"),
    [(Symmetries(vflip=True), 2), (Symmetries(quarter_turns=True), 4), (Symmetries(True, True, True), 8)],
)
def test_symmetries_are_drawn_with_equal_chance(photo, encode, symmetries, count):
    encoded, size = encode(photo.resize((6, 6)), "PNG"), (6, 6)
    whole = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "size": size}
    plain = train_image(encoded, [0, 0], symmetries=Symmetries(), **whole)
    turned = [np.rot90(plain, turns) for turns in (range(4) if symmetries.quarter_turns else range(1))]
    both = [view[::-1] for view in turned] if symmetries.vflip else []
    expected = {np.ascontiguousarray(view).tobytes() for view in turned + both}
    assert len(expected) == count
    make = transform(symmetries=symmetries, **whole)
    seeds = tf.data.Dataset.range(80 * count).map(
        lambda index: make(encoded, tf.stack([tf.constant(9, tf.int64), index]))
    )
    counts = collections.Counter(image.tobytes() for image in seeds.as_numpy_iterator())
    assert counts.keys() == expected
    # Six deviations of a binomial count around its mean of 80.
    assert all(26 < each < 134 for each in counts.values())


def test_quarter_turns_of_oblong_images_are_refused():
    config = defaults("classify")
    config.data.quarter_turns = True
    config.image_size = (64,)
    assert Symmetries.of(config).quarter_turns
    config.image_size = (64, 96)
    with pytest.raises(UserError, match=r"image_size \(64, 96\) is not a square"):
        Symmetries.of(config)


def test_flip_is_independent_of_the_crop(encode):
    # Red grows to the right and green downwards: red tells the flip and green the crop's height.
    ramp = np.arange(0, 256, 2, dtype=np.uint8)
    image = np.stack([*np.meshgrid(ramp, ramp), np.zeros((128, 128), np.uint8)], axis=-1)
    encoded = encode(Image.fromarray(image), "PNG")
    options = {"size": (8, 8), "crop_scale": (0.2, 1.0), "crop_ratio": (1.0, 1.0)}
    images = train_images(encoded, 400, **options).astype(int)
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
def test_eval_image_equals_torchvisions(photo, turned, size, crop_fraction, encode, close):
    image = photo.transpose(Image.Transpose.ROTATE_90) if turned else photo
    ours = eval_image(encode(image, "PNG"), size=(size, size), channels=3, crop_fraction=crop_fraction)
    assert close(ours, reference_eval(image, size, crop_fraction))


def test_eval_image_of_a_rectangle_covers_it_and_keeps_the_shape(photo, encode, close):
    # 427 x 640 covers 100 x 50 at 100 x 149; the centre 50 columns are cut out.
    ours = eval_image(encode(photo, "PNG"), size=(100, 50), channels=3, crop_fraction=1.0)
    resized = photo.resize((149, 100), Image.Resampling.BICUBIC)
    assert close(ours, resized.crop((50, 0, 100, 100)))


@pytest.mark.parametrize("size", [(384, 384), (224, 384)])
def test_eval_image_warps_from_384_up(photo, size, encode, close):
    ours = eval_image(encode(photo, "PNG"), size=size, channels=3, crop_fraction=0.875)
    assert close(ours, photo.resize(size[::-1], Image.Resampling.BICUBIC))


def test_eval_image_of_one_channel(photo, encode, close):
    grey = photo.convert("L")
    ours = eval_image(encode(grey, "PNG"), size=(64, 64), channels=1, crop_fraction=0.875)
    assert close(ours[..., 0], reference_eval(grey, 64, 0.875))
