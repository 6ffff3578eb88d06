"""Analyses of layers against literal NumPy, on random maps with planted channels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from cnx2_jax.evaluation import analysis, analysis_report
from cnx2_jax.models import FCMAE, ConvNeXtV2, EncoderConfig
from cnx2_jax.models.pixels import normalise
from cnx2_jax.models.state import merge, split
from cnx2_jax.observe.flops import matrix_flops
from cnx2_jax.observe.grid import GAP, HEADER, LEAST_SIDE
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, models

ENCODER = EncoderConfig((1, 2, 1, 1), (4, 4, 8, 12), in_chans=1, patch_size=1)
IMAGES, CLASSES = 7, 4

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def config():
    values = defaults("classify")
    use_digits(values)
    return values


@pytest.fixture(scope="module")
def encoder(build):
    """An encoder; channels 0 and 1 of stage 1 are equal, channel 2 is dead and channel 3 saturated."""
    model = models.without_decoder(build(FCMAE, ENCODER, decoder_dim=8))
    down = model.downsample_layers[1][1]
    down.kernel[...] = down.kernel[...].at[..., 1].set(down.kernel[..., 0]).at[..., 2:].multiply(0)
    down.bias[...] = jnp.array([0.3, 0.3, 0, 50])
    for block in model.stages[1]:
        last = block.pwconv2
        last.kernel[...] = last.kernel[...].at[:, 1].set(last.kernel[:, 0]).at[:, 2:].multiply(0)
        last.bias[...] = jnp.array([0.1, 0.1, 0, 0])
        last.kernel[...] = last.kernel[...].at[:, 3].set(0.03 * last.kernel[:, 0])
    return model


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (IMAGES, 16, 16, 1), np.uint8), rng.integers(0, CLASSES - 1, IMAGES)


def batches(images, sizes, padded):
    """The images in batches of `padded` places with the given numbers of valid ones; the rest is noise."""
    pixels, labels = images
    start = 0
    for size in sizes:
        image = np.random.default_rng(1).integers(0, 256, (padded, 16, 16, 1), np.uint8)
        label = np.zeros(padded, np.int32)
        image[:size], label[:size] = pixels[start : start + size], labels[start : start + size]
        yield {"image": image, "label": label, "mask": np.arange(padded) < size}
        start += size


@pytest.fixture(scope="module")
def maps(encoder, config, images):
    """The maps of all layers, float64 [images, positions, channels]."""

    def every_map(model, pixels):
        return dict(analysis.layer_maps(model, normalise(pixels, config.data.mean, config.data.std)))

    found = jax.jit(every_map)(encoder, images[0])
    return {
        name: np.asarray(found[name], np.float64).reshape(IMAGES, -1, found[name].shape[-1])
        for name in analysis.layer_names(encoder)
    }


@pytest.fixture(scope="module")
def measured(encoder, config, images):
    count, layers = analysis.analyse(encoder, config, batches(images, [4, 3], 4), CLASSES)
    assert count == IMAGES
    return layers


def literal_distance(x):
    """1/C^2 sum_ij (1 - cos) / 2, pair by pair."""
    distances = []
    for image in x:
        total, count = 0.0, image.shape[1]
        for first in image.T:
            for second in image.T:
                lengths = np.linalg.norm(first) * np.linalg.norm(second)
                total += (1 - (first @ second / lengths if lengths else 0)) / 2
        distances.append(total / count**2)
    return np.mean(distances)


def literal_selectivity(x, labels):
    activity = np.maximum(x, 0).mean(axis=1)
    indices = []
    for channel in activity.T:
        means = sorted(channel[labels == label].mean() for label in np.unique(labels))
        top, rest = means[-1], np.mean(means[:-1])
        indices.append((top - rest) / (top + rest) if top + rest else 0)
    return indices


def literal_rank(x):
    singular = np.linalg.svd(np.cov(x.reshape(-1, x.shape[-1]).T), compute_uv=False)
    shares = singular[singular > 0] / singular.sum()
    return np.exp(-np.sum(shares * np.log(shares)))


def test_layers_are_those_of_the_network(encoder, config, images, maps):
    last = encoder.features(normalise(images[0], config.data.mean, config.data.std))[-1]
    np.testing.assert_allclose(maps["stages.3.0"].reshape(last.shape), last, rtol=1e-4, atol=1e-4)
    assert [*maps] == analysis.layer_names(encoder) and len(maps) == 10
    assert maps["stages.3.0.grn"].shape == (IMAGES, 4, 48)


def test_all_measures_equal_literal_numpy(measured, maps, images):
    assert [*measured] == [*maps]
    for name, x in maps.items():
        layer, flat = measured[name], x.reshape(-1, x.shape[-1])
        assert layer.channels == x.shape[-1]
        assert layer.cosine_distance == pytest.approx(literal_distance(x), rel=1e-4, abs=1e-6)
        np.testing.assert_allclose(layer.selectivity, literal_selectivity(x, images[1]), atol=1e-4)
        if name.endswith(".grn"):
            assert layer.effective_rank is None
        else:
            assert layer.effective_rank == pytest.approx(literal_rank(x), rel=1e-3)
        deviation = flat.std(axis=0)
        dead = deviation <= 0.01 * deviation.mean()
        saturated = ~dead & (deviation <= 0.1 * abs(flat.mean(axis=0)))
        assert (layer.dead, layer.saturated) == (dead.sum(), saturated.sum())


def test_planted_channels_are_counted(measured):
    layer = measured["stages.1.1"]
    assert (layer.dead, layer.saturated) == (1, 1)
    # Of the four channels, two are equal, one is dead, and one hardly changes.
    assert layer.effective_rank < 1.5
    assert layer.selectivity[0] == layer.selectivity[1] and layer.selectivity[2] == 0


@pytest.mark.parametrize(("sizes", "padded"), [([7], 7), ([3, 0, 4], 4)])
def test_batches_and_padding_make_no_difference(encoder, config, images, measured, sizes, padded):
    _, layers = analysis.analyse(encoder, config, batches(images, sizes, padded), CLASSES)
    for name, layer in layers.items():
        expected = measured[name]
        assert layer.cosine_distance == pytest.approx(expected.cosine_distance, rel=1e-4, abs=1e-6)
        assert (layer.dead, layer.saturated) == (expected.dead, expected.saturated)
        np.testing.assert_allclose(layer.selectivity, expected.selectivity, atol=1e-4)
        if layer.effective_rank is not None:
            assert layer.effective_rank == pytest.approx(expected.effective_rank, rel=1e-3)


def test_distance_and_rank_of_known_maps():
    rng = np.random.default_rng(0)
    same = np.repeat(rng.random((2, 5, 1), np.float32), 6, axis=2)
    np.testing.assert_allclose(analysis.cosine_distance(same), [0, 0], atol=1e-6)
    orthogonal = np.eye(6, dtype=np.float32)[None]
    np.testing.assert_allclose(analysis.cosine_distance(orthogonal), [(1 - 1 / 6) / 2], rtol=1e-6)
    zeros = np.zeros((1, 5, 6), np.float32)
    np.testing.assert_allclose(analysis.cosine_distance(zeros), [0.5])
    assert analysis.effective_rank(np.eye(6)) == pytest.approx(6)
    assert analysis.effective_rank(np.ones((6, 6))) == pytest.approx(1)
    assert analysis.effective_rank(np.zeros((6, 6))) == 0


def test_selectivity_needs_two_classes():
    activity = np.array([[6.0, 2, 0], [0, 2, 0], [0, 0, 0]])
    found = analysis.class_selectivity(activity, np.array([2, 2, 0]))
    np.testing.assert_allclose(found, [1, 0, 0])
    assert analysis.class_selectivity(activity, np.array([2, 0, 0])) is None


def test_matrix_products_stay_below_twice_the_forward_pass():
    dims = (128, 256, 512, 1024)  # of base, whose blocks all have the same share
    graph, params = split(
        nnx.eval_shape(lambda: ConvNeXtV2(EncoderConfig((1, 1, 2, 1), dims), num_classes=0, rngs=nnx.Rngs(0)))
    )
    scale = FrozenConfigDict({"mean": (0.5,) * 3, "std": (0.2,) * 3})
    batch = {
        "image": jax.ShapeDtypeStruct((8, 224, 224, 3), np.uint8),
        "label": jax.ShapeDtypeStruct((8,), np.int32),
        "mask": jax.ShapeDtypeStruct((8,), bool),
    }
    state = jax.eval_shape(lambda: analysis._empty(graph, params, scale, batch, 1000))
    analysed = matrix_flops(analysis._update.trace(graph, params, scale, batch, state).jaxpr)

    def forward(params, images):
        return merge(graph, params).features(normalise(images, scale["mean"], scale["std"]))[-1]

    once = matrix_flops(jax.jit(forward).trace(params, batch["image"]).jaxpr)
    assert 1 < analysed / once < 1.2


def test_a_planted_channel_shows_in_its_layer_alone(encoder, config, images):
    """A channel that alone is bright fills its tile of the sheet, in the layer where it was planted."""
    graph, params = split(encoder)
    planted = {**params, "stages.2.0.pwconv2.bias": params["stages.2.0.pwconv2.bias"].at[5].set(1e4)}
    names = ["stages.1.1", "stages.2.0.grn", "stages.2.0"]
    bright = {}
    for name, values in analysis.activation_maps(merge(graph, planted), config, images[0][:2], names).items():
        assert len(values) == 2
        sheet = analysis_report.draw_activations(values[1])
        side = LEAST_SIDE + GAP
        tiles = [
            sheet[GAP + i // 8 * (side + HEADER) :, GAP + i % 8 * side :][:LEAST_SIDE, :LEAST_SIDE]
            for i in range(values.shape[-1])
        ]
        bright[name] = [i for i, tile in enumerate(tiles) if tile.min() == 255]
    assert bright["stages.2.0"] == [5]
    assert 5 not in bright["stages.1.1"] and bright["stages.2.0.grn"] == []


def test_more_channels_than_fit_are_spaced_evenly():
    maps = np.zeros((3, 3, 256), np.float32)
    maps[..., 4] = 1  # tile 1, as every fourth is drawn
    sheet = analysis_report.draw_activations(maps)
    left = GAP + LEAST_SIDE + GAP
    assert sheet[GAP : GAP + LEAST_SIDE, left : left + LEAST_SIDE].min() == 255
    assert sheet[GAP : GAP + LEAST_SIDE, GAP : GAP + LEAST_SIDE].max() == 0


def test_table_of_checkpoints_side_by_side(measured):
    fewer = {name: layer for name, layer in measured.items() if not name.startswith("stages.3")}
    header, rows = analysis_report.make_table({"A": measured, "B": fewer})
    assert len(header) == 13 and header[7] == "B channels"
    assert [row[0] for row in rows][:2] == ["stages.0.0.grn", "stages.1.0.grn"]
    by_name = {row[0]: row for row in rows}
    assert by_name["stages.3.0"][7:] == [""] * 6
    assert by_name["stages.1.1"][1:7] == by_name["stages.1.1"][7:]
    assert by_name["stages.1.1"][5:7] == ["1", "1"] and by_name["stages.1.1.grn"][4] == ""
    stored = measured["stages.1.1"].as_json()
    assert sum(stored["selectivity_histogram"]) == 4 and len(stored["selectivity_histogram"]) == analysis.BINS
