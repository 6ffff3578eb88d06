"""Mixup and cutmix against timm's, written out in NumPy for given draws; and what is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.data.mixing import Mix, cutmix_at, draw_mix, mix_images, mix_targets


def timms_targets(labels, classes, share, smoothing):
    """timm.data.mixup.mixup_target, literally."""
    off = smoothing / classes
    on = 1 - smoothing + off
    one, two = np.full((2, len(labels), classes), off)
    one[np.arange(len(labels)), labels] = on
    two[np.arange(len(labels)), labels[::-1]] = on
    return one * share + two * (1 - share)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_mixup_is_timms(share, smoothing):
    rng = np.random.default_rng(0)
    images, labels = rng.standard_normal((5, 8, 6, 3)), rng.integers(0, 10, 5)
    mix = Mix(jnp.full((8, 6, 1), share), jnp.float32(share))
    expected = np.stack([share * images[i] + (1 - share) * images[4 - i] for i in range(5)])
    np.testing.assert_allclose(mix_images(jnp.float32(images), mix), expected, atol=1e-6)
    targets = mix_targets(jnp.int32(labels), 10, mix, smoothing)
    np.testing.assert_allclose(targets, timms_targets(labels, 10, share, smoothing), atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (17, 9)])
def test_cutmix_is_timms(height, width, smoothing):
    rng = np.random.default_rng(1)
    images, labels = rng.standard_normal((4, height, width, 3)).astype(np.float32), rng.integers(0, 7, 4)
    for share in (0.0, 0.05, 0.4, 0.9, 1.0):
        for _ in range(10):
            row, column = int(rng.integers(0, height)), int(rng.integers(0, width))
            # timm.data.mixup.rand_bbox and cutmix_bbox_and_lam, literally.
            ratio = np.sqrt(1 - share)
            cut_h, cut_w = int(height * ratio), int(width * ratio)
            yl, yh = np.clip(row - cut_h // 2, 0, height), np.clip(row + cut_h // 2, 0, height)
            xl, xh = np.clip(column - cut_w // 2, 0, width), np.clip(column + cut_w // 2, 0, width)
            corrected = 1 - (yh - yl) * (xh - xl) / (height * width)
            expected = images.copy()
            expected[:, yl:yh, xl:xh] = images[::-1][:, yl:yh, xl:xh]

            mix = cutmix_at(jnp.float32(share), row, column, (height, width))
            np.testing.assert_array_equal(mix_images(images, mix), expected)
            assert float(mix.share) == pytest.approx(corrected, abs=1e-6)
            targets = mix_targets(jnp.int32(labels), 7, mix, smoothing)
            np.testing.assert_allclose(targets, timms_targets(labels, 7, corrected, smoothing), atol=1e-6)


def drawn(mixup, cutmix, count=3000, size=(24, 40)):
    keys = jax.random.split(jax.random.key(0), count)
    mixes = jax.jit(jax.vmap(lambda key: draw_mix(key, size, mixup, cutmix)))(keys)
    keep, share = np.asarray(mixes.keep)[..., 0], np.asarray(mixes.share)
    # A cut keeps all or nothing of a pixel.
    return keep, share, np.isin(keep, (0, 1)).all(axis=(1, 2))


def kolmogorov_smirnov(sample, reference) -> float:
    grid = np.union1d(sample, reference)
    cumulative = [np.searchsorted(np.sort(x), grid, "right") / len(x) for x in (sample, reference)]
    return np.abs(cumulative[0] - cumulative[1]).max()


@pytest.mark.parametrize("alpha", [0.3, 0.8, 1.0])
def test_mixup_coefficients_are_beta(alpha):
    keep, share, cut = drawn(alpha, 0.0)
    assert not cut.all() and cut.mean() < 0.05  # a share of 0 or 1, as small alphas often give, looks cut
    np.testing.assert_array_equal(keep, np.broadcast_to(share[:, None, None], keep.shape))
    # Two samples of 3000 differ by 0.057 once in 10^4.
    assert kolmogorov_smirnov(share, np.random.default_rng(0).beta(alpha, alpha, 3000)) < 0.057


def test_cutmix_boxes_are_timms():
    keep, share, cut = drawn(0.0, 1.0)
    assert cut.all()
    rng, expected = np.random.default_rng(0), []
    for _ in range(3000):
        ratio = np.sqrt(1 - rng.beta(1.0, 1.0))
        sides = []
        for side in (24, 40):
            half, centre = int(side * ratio) // 2, rng.integers(0, side)
            sides.append(np.clip(centre + half, 0, side) - np.clip(centre - half, 0, side))
        expected.append(1 - sides[0] * sides[1] / (24 * 40))
    assert kolmogorov_smirnov(share, np.array(expected)) < 0.057
    np.testing.assert_allclose(keep.mean(axis=(1, 2)), share, atol=1e-6)


def test_both_take_turns():
    _, share, cut = drawn(0.8, 1.0)
    assert abs(cut.mean() - 0.5) < 0.05
    reference = np.random.default_rng(0).beta(0.8, 0.8, 3000)
    assert kolmogorov_smirnov(share[~cut], reference) < 0.08


def test_neither_leaves_all_as_it_is():
    keep, share, _ = drawn(0.0, 0.0, count=20)
    assert (keep == 1).all() and (share == 1).all()
