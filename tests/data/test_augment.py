"""RandAugment and colour jitter: which operations, how often and how strong, by timm's definitions."""

import collections
import math

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from cnx2_jax.data import augment
from cnx2_jax.data.augment import INCREASING, Augmentation, make_augmentation, rand_augment, sampled_magnitude
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

FILL = (124, 116, 104)


def draws(count, size, seed=0):
    return tf.random.stateless_uniform([count, size], [seed, 5])


def test_magnitudes_are_normal_and_cut():
    uniform = draws(20000, 1)[:, 0]
    levels = sampled_magnitude(uniform, 9.0, 0.5).numpy()
    assert abs(levels.mean() - 9) < 0.02 and levels.max() <= 10
    # 9 + 0.5 x normal: a standard deviation on either side holds 68.3%; beyond 2 of them it is cut.
    assert abs((np.abs(levels - 9) < 0.5).mean() - 0.6827) < 0.015
    assert abs((levels == 10).mean() - 0.0228) < 0.005
    wide = sampled_magnitude(uniform, 5.0, 100.0).numpy()
    assert wide.min() == 0 and wide.max() == 10
    assert np.isfinite(sampled_magnitude(tf.constant([0.0, 0.99999994]), 9.0, 0.5)).all()
    np.testing.assert_array_equal(sampled_magnitude(uniform, 7.0, 0.0), np.full(20000, 7.0, np.float32))


def recording(number):
    """An operation that notes its number, level and sign in the image instead of changing it."""

    def operation(image, level, sign, fill):
        note = tf.stack([tf.constant(number, tf.float32), 100 * level, 1 + sign])
        return tf.concat([image, tf.cast(note, tf.uint8)[None, None]], axis=0)

    return operation


def test_operations_are_chosen_evenly_with_replacement_and_done_half_of_the_time(monkeypatch):
    # Tensors of different lengths cannot leave branches, so one layer at a time.
    one = rand_augment(
        [recording(i) for i in range(15)], FILL, layers=1, probability=0.5, magnitude=9, deviation=0.5
    )
    image = tf.zeros([1, 1, 3], tf.uint8)
    noted = [one.apply(image, row).numpy() for row in draws(1200, one.draws)]
    done = [note[1, 0] for note in noted if len(note) == 2]
    assert abs(len(done) / len(noted) - 0.5) < 0.06
    chosen = collections.Counter(int(note[0]) for note in done)
    expected = len(done) / 15
    chi_square = sum((chosen[i] - expected) ** 2 / expected for i in range(15))
    assert chi_square < 42  # of 14 degrees of freedom, exceeded once in 10^4
    assert abs(np.mean([note[2] == 2 for note in done]) - 0.5) < 0.09
    levels = np.array([note[1] for note in done])
    assert levels.min() >= 65 and levels.max() <= 100 and abs(levels.mean() - 89.5) < 1.5


def test_layers_take_draws_of_their_own(photo):
    image = tf.constant(np.asarray(photo.resize((32, 32))))
    operations = [lambda image, *_: 255 - image, lambda image, *_: image // 2]
    two = rand_augment(operations, FILL, layers=2, probability=1.0, magnitude=9, deviation=0.0)
    seen = collections.Counter(two.apply(image, row).numpy().tobytes() for row in draws(400, two.draws))
    invert, halve = operations
    expected = {f(g(image)).numpy().tobytes() for f in (invert, halve) for g in (invert, halve)}
    assert seen.keys() == expected
    assert min(seen.values()) > 60  # a quarter each


def timms_arguments(level):
    """timm's LEVEL_TO_ARG of the increasing set, literally, for level in 0..10 and a positive sign."""
    enhanced = max(0.1, 1.0 + (level / 10) * 0.9)
    return {
        "rotate": (level / 10) * 30.0,
        "posterize": 4 - int((level / 10) * 4),
        "solarize": 256 - min(256, int((level / 10) * 256)),
        "solarize_add": min(128, int((level / 10) * 110)),
        "shear_x": (level / 10) * 0.3,
        "shear_y": (level / 10) * 0.3,
        "translate_x": (level / 10) * 0.45,
        "translate_y": (level / 10) * 0.45,
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), enhanced),
    }


def in_pillow(name, image, value):
    def affine(*matrix):
        return image.transform(
            image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
        )

    width, height = image.size
    match name:
        case "autocontrast" | "equalize" | "invert":
            return getattr(ImageOps, name)(image)
        case "rotate":
            return image.rotate(value, Image.Resampling.BICUBIC, fillcolor=FILL)
        case "posterize" if value == 0:  # which Pillow refuses since version 13: black before
            return Image.new("RGB", image.size)
        case "posterize" | "solarize":
            return getattr(ImageOps, name)(image, value)
        case "solarize_add":
            return image.point([min(255, i + value) if i < 128 else i for i in range(256)] * 3)
        case "shear_x":
            return affine(1, value, 0, 0, 1, 0)
        case "shear_y":
            return affine(1, 0, 0, value, 1, 0)
        case "translate_x":
            return affine(1, 0, value * width, 0, 1, 0)
        case "translate_y":
            return affine(1, 0, 0, 0, 1, value * height)
    return getattr(ImageEnhance, name.capitalize())(image).enhance(value)


def test_it_is_timms_set_in_its_order():
    assert list(INCREASING) == [
        "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add",
        "color", "contrast", "brightness", "sharpness",
        "shear_x", "shear_y", "translate_x", "translate_y",
    ]  # fmt: skip


@pytest.mark.parametrize("level", [0.0, 3.3, 9.0, 10.0])
@pytest.mark.parametrize("name", INCREASING)
def test_levels_mean_what_they_mean_in_timm(photo, name, level, close):
    image = photo.resize((96, 64))
    expected = np.asarray(in_pillow(name, image, timms_arguments(level).get(name)))
    ours = INCREASING[name](tf.constant(np.asarray(image)), tf.constant(level) / 10, tf.constant(1.0), FILL)
    assert close(ours.numpy(), expected)


@pytest.mark.parametrize("name", ["rotate", "shear_x", "translate_y"])
def test_sign_turns_geometry_around(photo, name, close):
    image = photo.resize((96, 64))
    expected = in_pillow(name, image, -timms_arguments(9.0)[name])
    ours = INCREASING[name](tf.constant(np.asarray(image)), tf.constant(0.9), tf.constant(-1.0), FILL)
    assert close(ours.numpy(), np.asarray(expected))


def test_sign_weakens_enhancements_but_not_below_a_tenth(photo):
    image = photo.resize((96, 64))
    for level, factor in ((3.0, 0.73), (10.0, 0.1)):
        ours = INCREASING["brightness"](
            tf.constant(np.asarray(image)), tf.constant(level / 10), tf.constant(-1.0), FILL
        )
        difference = ours.numpy().astype(int) - np.asarray(
            ImageEnhance.Brightness(image).enhance(factor), int
        )
        assert np.abs(difference).max() <= 1


def test_jitter_is_brightness_contrast_and_colour_in_random_order(photo):
    image = photo.resize((24, 16))
    jitter = make_augmentation("jitter-0.4", FILL, {})
    kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    orders = collections.Counter()
    for row in draws(120, jitter.draws).numpy():
        expected, order = image, tuple(np.argsort(row[:3]).tolist())
        orders[order] += 1
        for kind in order:
            expected = kinds[kind](expected).enhance(0.6 + 0.8 * float(row[3 + kind]))
        ours = jitter.apply(tf.constant(np.asarray(image)), tf.constant(row)).numpy().astype(int)
        assert np.abs(ours - np.asarray(expected, int)).mean() < 0.1
    assert len(orders) == 6


def test_another_set_is_a_small_addition(photo, monkeypatch):
    """DeiT III's: grey, solarised or left alone with equal chances (blur would be one more line)."""

    def three_augment(name, settings, fill):
        operations = [
            lambda image, *_: tf.repeat(augment.ops.to_gray(image), 3, axis=-1),
            lambda image, *_: augment.ops.solarize(image, 128),
            lambda image, *_: image,
        ]
        return rand_augment(operations, fill, layers=1, probability=1.0, magnitude=0, deviation=0)

    monkeypatch.setitem(augment._KINDS, "three", three_augment)
    made = make_augmentation("three", FILL, {})
    image = photo.resize((16, 16))
    seen = {
        made.apply(tf.constant(np.asarray(image)), row).numpy().tobytes() for row in draws(60, made.draws)
    }
    expected = (image.convert("L").convert("RGB"), ImageOps.solarize(image), image)
    assert seen == {np.asarray(each).tobytes() for each in expected}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rnd-m9-inc1", "unknown data.augment 'rnd-m9-inc1'; did you mean 'rand'"),
        ("rand-m9-mstd0.5", "only timm's increasing operations are supported; add -inc1"),
        ("rand-m11-inc1", "m must be at most 10"),
        ("rand-m9-p2-inc1", "p at most 1"),
        ("rand-m9-n0-inc1", "n from 1"),
        ("rand-m9-n1.5-inc1", "n from 1"),
        ("rand-x9-inc1", "'x9' must be one of mNUMBER, mstdNUMBER"),
        ("rand-m-inc1", "'m' must be one of"),
        ("rand-m9-m3-inc1", "'m3' must be one of .* each at most once"),
        ("jitter", "must be jitter-V"),
        ("jitter-2", "must be jitter-V"),
        ("jitter-a", "must be jitter-V"),
    ],
)
def test_user_errors(name, message):
    with pytest.raises(UserError, match=message) as caught:
        make_augmentation(name, FILL, {})
    assert "\n" not in str(caught.value)


def test_no_name_is_no_augmentation():
    assert make_augmentation("", FILL, {}) is None
    assert isinstance(make_augmentation("rand-m9-mstd0.5-inc1", FILL, {}), Augmentation)
    assert make_augmentation("rand-m9-n5-inc1", FILL, {}).draws == 20
    assert not math.isnan(make_augmentation("jitter-1", FILL, {}).draws)
