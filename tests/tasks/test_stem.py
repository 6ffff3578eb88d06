"""Starting weights for other bands: the response to equal bands, or to the three that are named."""

import numpy as np
import pytest

from cnx2_jax.configuration import override
from cnx2_jax.errors import UserError
from cnx2_jax.tasks import defaults, make_task
from cnx2_jax.tasks.stem import adapt, adapted

rng = np.random.default_rng(0)


def kernel_of(bands):
    return rng.standard_normal((4, 4, bands, 6)).astype(np.float32)


def names_of(count):
    return tuple(f"B{place}" for place in range(count))


def response(kernel, images):
    """The stem's response to one patch [4, 4, bands]."""
    return np.einsum("ijb,ijbd->d", images.astype(np.float64), kernel.astype(np.float64))


@pytest.mark.parametrize("choice", ["mean", "tile"])
@pytest.mark.parametrize("before", [1, 3, 12])
@pytest.mark.parametrize("after", [1, 2, 4, 5, 6, 12, 13])
def test_the_response_to_grey_images_stays(choice, before, after):
    kernel, grey = kernel_of(before), rng.standard_normal((4, 4, 1))
    found = adapted(kernel, kernel_of(after), choice, names_of(after))
    assert found.shape == (4, 4, after, 6) and found.dtype == np.float32
    expected = response(kernel, grey.repeat(before, axis=2))
    np.testing.assert_allclose(response(found, grey.repeat(after, axis=2)), expected, atol=1e-5)


def test_tile_repeats_the_kernels():
    kernel = kernel_of(3)
    found = adapted(kernel, kernel_of(4), "tile", names_of(4))
    np.testing.assert_array_equal(found[:, :, [0, 3]], kernel[:, :, [0, 0]] / 2)
    np.testing.assert_array_equal(found[:, :, [1, 2]], kernel[:, :, [1, 2]])


def test_map_places_the_colours():
    kernel = kernel_of(3)
    found = adapted(kernel, kernel_of(5), "map:B3,B1,B0", names_of(5))
    np.testing.assert_array_equal(found[:, :, [3, 1, 0]], kernel)
    assert not found[:, :, [2, 4]].any()


def test_fresh_takes_the_new_kernel():
    fresh = kernel_of(5)
    assert adapted(kernel_of(3), fresh, "fresh", names_of(5)) is fresh


@pytest.mark.parametrize(
    ("choice", "before", "message"),
    [
        ("", 3, r"checkpoint 'runs/a' is of images with 3 bands, and the run's have 4; set init_bands"),
        ("map:1,2,9", 3, r"init_bands: unknown band '9'; bands: 1, 2, 3, 4"),
        ("map:1,2", 3, r"init_bands 'map:1,2' must name three bands"),
        ("map:1,2,3", 2, r"for a checkpoint of three, not of 2"),
    ],
)
def test_mistakes(choice, before, message):
    data = defaults("classify").data
    with pytest.raises(UserError, match=message):
        adapt(kernel_of(before), kernel_of(4), "runs/a", choice, data)


def test_equal_numbers_need_no_choice():
    kernel = kernel_of(4)
    assert adapt(kernel, kernel_of(4), "runs/a", "", defaults("classify").data) is kernel


@pytest.mark.parametrize("choice", ["median", "map", "Mean"])
def test_an_unknown_choice(choice):
    with pytest.raises(UserError, match=f"unknown init_bands '{choice}'; choose mean, tile, map:R,G,B"):
        make_task(override(defaults("classify"), [f"--config.init_bands={choice}"]))
