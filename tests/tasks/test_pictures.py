"""Pictures of many bands: which bands become red, green and blue, and how far they are stretched."""

import jax
import numpy as np
import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.tasks import TASKS, defaults
from cnx2_jax.tasks.base import Described
from cnx2_jax.tasks.pictures import are_colours, coloured, projection


def config(bands, **data):
    found = defaults("pretrain")
    found.model.in_chans = bands
    found.data.update({"dtype": "uint16", **data})
    return found


@pytest.mark.parametrize(
    ("bands", "shown", "expected"),
    [
        (4, "4,2,1", [[3], [1], [0]]),
        (1, "", [[0], [0], [0]]),
        (2, "", [[1], [0, 1], [0]]),
        (3, "", [[2], [1], [0]]),
        (7, "", [[5, 6], [3, 4], [0, 1, 2]]),
    ],
)
def test_which_bands_are_shown(bands, shown, expected):
    weights = projection(config(bands, show_bands=shown))
    assert [np.flatnonzero(column).tolist() for column in weights.T] == expected
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-6)


def test_percentiles_of_the_originals_become_black_and_full():
    images = np.random.default_rng(0).standard_normal((2, 20, 30, 4)) * [1, 2, 3, 4]
    found = coloured(config(4, show_bands="4,2,1"), {"original": images, "other": images + 100}, "original")
    low, high = np.percentile(images[..., [3, 1, 0]], (2, 98), axis=(0, 1, 2))
    expected = np.clip((images[..., [3, 1, 0]] - low) / (high - low), 0, 1) * 255
    np.testing.assert_allclose(found["original"], expected, atol=0.51)
    assert found["other"].min() == 255 and found["other"].dtype == np.uint8


@pytest.mark.parametrize("name", ["pretrain", "classify", "multilabel"])
def test_a_sheet_of_float_arrays_is_that_of_normalised_images(name):
    """Whether `prepare` normalises, which the dtype cannot tell of float32."""
    settings = defaults(name)
    settings.update({"image_size": (32, 32)})
    settings.model.in_chans = 4
    settings.data.update({"dtype": "float32", "mean": (9.0, 9.0, 1.0, 5.0), "std": (0.5, 8.0, 1.0, 2.0)})
    task = TASKS[name](settings, data=Described(class_names=("a", "b")))
    images = np.random.default_rng(0).standard_normal((2, 32, 32, 4)).astype(np.float32) * 9
    batch = {"image": images, "label": np.zeros(2, int), "labels": np.ones((2, 2), np.float32)}
    drawn, _ = task.sheet(batch, task.prepare(batch, jax.random.key(0)))
    normal = (images - np.array(settings.data.mean)) / np.array(settings.data.std)
    expected = coloured(settings, {"images": normal}, "images")["images"].astype(int)
    assert np.abs(drawn - expected).max() <= 1


def test_which_images_are_drawn_as_they_are():
    assert are_colours(config(3, dtype="uint8")) and are_colours(config(1, dtype="uint8"))
    assert not are_colours(config(3)) and not are_colours(config(4, dtype="uint8"))
    assert not are_colours(config(3, dtype="uint8", show_bands="1,2,3"))


@pytest.mark.parametrize(
    ("shown", "message"), [("1,2", r"must name three bands"), ("1,2,R", r"data.show_bands: unknown band 'R'")]
)
def test_mistakes(shown, message):
    with pytest.raises(UserError, match=message):
        projection(config(4, show_bands=shown))
