"""PhotoMetricDistortion: its arithmetic against NumPy, and how often and how much it changes what."""

import colorsys
import itertools

import numpy as np
import pytest
from scipy import stats

from cnx2_jax.data import distortion
from cnx2_jax.data.augment import make_augmentation
from cnx2_jax.data.distortion import DRAWS, distort, from_hsv, saturate, to_hsv, turn_hue
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import UserError

FILL = (124, 116, 104)
# All combinations of some levels, with neighbours, whose hues and saturations are the hardest to round.
LEVELS = (0, 1, 2, 17, 100, 101, 128, 254, 255)
COLOURS = np.array(list(itertools.product(LEVELS, repeat=3)), np.uint8).reshape(27, 27, 3)
OFF = 0.99  # a draw by which an operation is left out


def converted(image, alpha=1.0, beta=0.0):
    """mmsegmentation's `convert`, by its definition."""
    return np.clip(image.astype(np.float32) * np.float32(alpha) + np.float32(beta), 0, 255).astype(np.uint8)


def draws(**pairs):
    """The draws that apply the named operations alone, each with this amount."""
    order = ("brightness", "contrast", "saturation", "hue")
    values = [value for name in order for value in ((0.0, pairs[name]) if name in pairs else (OFF, 0.5))]
    return tf.constant([*values, pairs.get("last", 0.0)], tf.float32)


@pytest.mark.parametrize("amount", [0.0, 0.13, 0.5, 0.77, 0.999])
def test_brightness_and_contrast_are_clipped_and_truncated(amount):
    np.testing.assert_array_equal(
        distort(COLOURS, draws(brightness=amount)), converted(COLOURS, beta=32 * (2 * amount - 1))
    )
    np.testing.assert_array_equal(distort(COLOURS, draws(contrast=amount)), converted(COLOURS, 0.5 + amount))


def test_hsv_is_that_of_colorsys_in_units_of_opencv():
    exact = np.array([colorsys.rgb_to_hsv(*pixel) for pixel in (COLOURS / 255.0).reshape(-1, 3)])
    hue, saturation, value = (part.numpy().reshape(-1) for part in to_hsv(tf.constant(COLOURS)))
    np.testing.assert_array_equal(value, np.round(255 * exact[:, 2]))
    # Half a step, and half a unit of the rounded reciprocals times what they multiply.
    assert np.abs(saturation - 255 * exact[:, 1]).max() <= 0.5 + 0.5 * 255 / 4096
    turn = np.abs(hue - 180 * exact[:, 0])
    assert np.minimum(turn, 180 - turn).max() <= 0.5 + 0.5 * 5 * 255 / 4096
    assert hue.min() >= 0 and hue.max() < 180


def test_rgb_is_that_of_colorsys():
    rng = np.random.default_rng(0)
    parts = rng.integers(0, [180, 256, 256], (400, 3))
    exact = np.array([colorsys.hsv_to_rgb(h / 180, s / 255, v / 255) for h, s, v in parts])
    ours = from_hsv(*(tf.constant(part[None], tf.int32) for part in parts.T)).numpy()[0]
    truncated = 255 * exact - ours
    assert truncated.min() > -0.001 and truncated.max() < 1.001


def test_saturation_scales_and_hue_turns():
    grey = saturate(tf.constant(COLOURS), 0.0).numpy()
    np.testing.assert_array_equal(grey, np.repeat(COLOURS.max(axis=-1, keepdims=True), 3, axis=-1))
    pure = tf.constant([[[255, 0, 0], [0, 255, 0], [90, 90, 90]]], tf.uint8)
    # 60 steps of 2 degrees lead from red to green; 60 back from green to red.
    np.testing.assert_array_equal(turn_hue(pure, 60)[0], [[0, 255, 0], [0, 0, 255], [90, 90, 90]])
    np.testing.assert_array_equal(turn_hue(pure, -60)[0], [[0, 0, 255], [255, 0, 0], [90, 90, 90]])


def test_steps_come_in_order_and_contrast_may_come_last():
    image = tf.constant(COLOURS)
    amounts = {"brightness": 0.9, "contrast": 0.8, "saturation": 0.2, "hue": 0.7}
    bright = converted(COLOURS, beta=32 * 0.8)

    def coloured(levels):
        return turn_hue(saturate(tf.constant(levels), 0.7), int(0.7 * 36) - 18).numpy()

    first, last = coloured(converted(bright, 1.3)), converted(coloured(bright), 1.3)
    assert not np.array_equal(first, last)
    np.testing.assert_array_equal(distort(image, draws(**amounts, last=0.0)), first)
    np.testing.assert_array_equal(distort(image, draws(**amounts, last=0.5)), last)


def test_nothing_drawn_changes_nothing():
    np.testing.assert_array_equal(distort(COLOURS, draws()), COLOURS)


def test_draws_have_mmsegmentations_distributions(monkeypatch):
    """Notes what each step is given, over many draws."""
    noted = {"convert": [], "saturate": [], "turn_hue": []}

    def noting(name):
        def step(image, *given, **named):
            noted[name].append((given, named))
            return image

        return step

    monkeypatch.setattr(distortion, "_converted", noting("convert"))
    monkeypatch.setattr(distortion, "saturate", noting("saturate"))
    monkeypatch.setattr(distortion, "turn_hue", noting("turn_hue"))
    count = 800
    for row in tf.random.stateless_uniform([count, DRAWS], [0, 3]):
        distort(COLOURS, row)
    brightness = [float(named["beta"]) for given, named in noted["convert"] if named]
    contrast = [float(given[0]) for given, named in noted["convert"] if not named]
    saturation = [float(given[0]) for given, _ in noted["saturate"]]
    hue = [int(given[0]) for given, _ in noted["turn_hue"]]
    for values in (brightness, contrast, saturation, hue):
        assert stats.binomtest(len(values), count, 0.5).pvalue > 1e-4
    assert stats.kstest(brightness, stats.uniform(-32, 64).cdf).pvalue > 1e-4
    for factors in (contrast, saturation):
        assert stats.kstest(factors, stats.uniform(0.5, 1.0).cdf).pvalue > 1e-4
    counts = np.bincount(np.array(hue) + 18, minlength=36)
    assert len(counts) == 36 and stats.chisquare(counts).pvalue > 1e-4


def test_it_is_an_augmentation_of_colours_alone(in_tf_data):
    made = make_augmentation("distort", FILL, {})
    assert made.draws == DRAWS and not made.geometric
    row = np.array(draws(brightness=0.9, hue=0.3))
    np.testing.assert_array_equal(in_tf_data(made.apply, COLOURS, row), distort(COLOURS, tf.constant(row)))


@pytest.mark.parametrize(
    ("name", "fill", "message"),
    [
        ("distort-0.4", FILL, "distort has no settings; set it to distort"),
        ("distort", (120,), "changes hues, but images have 1 channel; set it to jitter"),
    ],
)
def test_user_errors(name, fill, message):
    with pytest.raises(UserError, match=message):
        make_augmentation(name, fill, {})
