"""Sliding windows against a literal loop, and resizing of padded maps against PyTorch's rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.evaluation.windows import average_over_windows, resized_to

CANVAS = (40, 48)


def logits_of(windows):
    """Depends on the place in the window, so that overlapping windows differ."""
    rows, columns = windows.shape[1:3]
    ramp = jnp.arange(rows)[:, None] * 0.1 + jnp.arange(columns) * 0.01
    return jnp.stack(
        [windows.sum(axis=-1) * ramp, windows.mean(axis=(1, 2, 3), keepdims=True)[..., 0] + ramp], -1
    )


def literal(image, window, stride):
    """mmsegmentation's loop, for one image `[h, w, c]` without padding."""
    height, width, channels = image.shape
    padded = np.zeros((max(height, window[0]), max(width, window[1]), channels))
    padded[:height, :width] = image
    total, count = np.zeros((*padded.shape[:2], 2)), np.zeros(padded.shape[:2])
    for row in range(max(height - window[0] + stride[0] - 1, 0) // stride[0] + 1):
        for column in range(max(width - window[1] + stride[1] - 1, 0) // stride[1] + 1):
            bottom = min(row * stride[0] + window[0], height)
            right = min(column * stride[1] + window[1], width)
            top, left = max(bottom - window[0], 0), max(right - window[1], 0)
            place = slice(top, top + window[0]), slice(left, left + window[1])
            total[place] += np.asarray(logits_of(padded[place][None]))[0]
            count[place] += 1
    return (total / count[..., None])[:height, :width]


@pytest.mark.parametrize(
    ("window", "stride"), [((16, 16), (10, 10)), ((16, 24), (16, 7)), ((8, 8), (8, 8)), ((32, 16), (21, 10))]
)
def test_windows_equal_a_literal_loop(window, stride):
    """Borders, images that just fit a number of windows, and images smaller than a window."""
    sizes = np.array([[40, 48], [16, 16], [17, 16], [32, 47], [10, 40], [12, 9]])
    rng = np.random.default_rng(0)
    images = np.zeros((len(sizes), *CANVAS, 3), np.float32)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:height, :width] = rng.standard_normal((height, width, 3))
    run = jax.jit(average_over_windows, static_argnums=(0, 3, 4))
    found = np.asarray(run(logits_of, jnp.asarray(images), jnp.asarray(sizes), window, stride))
    for image, (height, width), ours in zip(images, sizes, found, strict=True):
        expected = literal(image[:height, :width].astype(np.float64), window, stride)
        np.testing.assert_allclose(ours[:height, :width], expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(found).all()


def test_padded_maps_of_different_sizes_are_resized_by_torchs_rule():
    rng = np.random.default_rng(0)
    sizes, targets = np.array([[5, 7], [8, 6], [1, 3]]), np.array([[11, 9], [4, 13], [6, 3]])
    maps = rng.standard_normal((3, 8, 9, 2)).astype(np.float32)
    found = np.asarray(jax.jit(resized_to, static_argnums=3)(maps, sizes, targets, (12, 14)))
    assert found.shape == (3, 12, 14, 2)
    for before, (h, w), (height, width), after in zip(maps, sizes, targets, found, strict=True):
        for y in range(height):
            for x in range(width):
                v, u = max((y + 0.5) * h / height - 0.5, 0), max((x + 0.5) * w / width - 0.5, 0)
                v0, u0 = min(int(v), h - 1), min(int(u), w - 1)
                v1, u1 = min(v0 + 1, h - 1), min(u0 + 1, w - 1)
                v, u = v - v0, u - u0
                above = before[v0, u0] * (1 - u) + before[v0, u1] * u
                below = before[v1, u0] * (1 - u) + before[v1, u1] * u
                np.testing.assert_allclose(after[y, x], above * (1 - v) + below * v, rtol=1e-4, atol=1e-5)
