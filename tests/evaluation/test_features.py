"""Feature vectors and probabilities of all images except padding, in their order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cnx2_jax.data.images import ImageData, eval_batches
from cnx2_jax.evaluation import features
from cnx2_jax.models import FCMAE, ConvNeXtV2, EncoderConfig
from cnx2_jax.models.pixels import normalise
from cnx2_jax.recipes import use_digits
from cnx2_jax.tasks import defaults, models
from cnx2_jax.train import sharding

ENCODER = EncoderConfig((1, 1, 1, 1), (4, 4, 8, 12), in_chans=1, patch_size=1)


pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture
def config():
    values = defaults("classify")
    use_digits(values)
    values.image_size = (16, 16)
    values.batch_size = 4
    return values


@pytest.fixture(scope="module")
def classifier(build):
    return build(ConvNeXtV2, ENCODER, num_classes=3)


@pytest.fixture(scope="module")
def encoder(build):
    return models.without_decoder(build(FCMAE, ENCODER, decoder_dim=8))


def batches(counts):
    """Padded batches of 4 noisy images with the given numbers of valid ones and consecutive labels."""
    rng, label = np.random.default_rng(0), 0
    for count in counts:
        images = rng.integers(0, 256, (4, 16, 16, 1), np.uint8)
        labels = np.arange(label, label + 4, dtype=np.int32)
        yield {"image": images, "label": labels, "mask": np.arange(4) < count}
        label += count


def expected(model, config, counts):
    """The vectors by their definition, one image at a time: LayerNorm of the last map's mean."""
    maps, vectors = jax.jit(lambda model, x: model.features(x)), []
    for batch in batches(counts):
        for image in batch["image"][batch["mask"]]:
            last = maps(model, normalise(jnp.asarray(image[None]), config.data.mean, config.data.std))[-1]
            mean = np.asarray(last, np.float64).mean(axis=(1, 2))[0]
            unit = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-6)
            vectors.append(unit * np.asarray(model.norm.scale) + np.asarray(model.norm.bias))
    return np.array(vectors)


@pytest.mark.parametrize("kind", ["classifier", "encoder"])
def test_features_are_the_normalised_means_of_valid_images(kind, request, config):
    model = request.getfixturevalue(kind)
    found = list(features.features(model, config, batches([4, 4, 1])))
    assert [len(vectors) for vectors, _ in found] == [4, 4, 1]
    assert [labels.tolist() for _, labels in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]
    vectors = np.concatenate([vectors for vectors, _ in found])
    assert vectors.shape == (9, 12) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected(model, config, [4, 4, 1]), atol=2e-5)


def test_predictions_are_the_softmax_of_the_head_on_the_vectors(classifier, config):
    ((vectors, shares),) = features.predictions(classifier, config, batches([3]))
    np.testing.assert_allclose(vectors, expected(classifier, config, [3]), atol=2e-5)
    logits = vectors @ np.asarray(classifier.head.kernel) + np.asarray(classifier.head.bias)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    np.testing.assert_allclose(shares, powers / powers.sum(axis=1, keepdims=True), rtol=1e-5)
    assert shares.dtype == np.float32


def test_without_a_head_no_class_is_probable(encoder, config):
    ((vectors, shares),) = features.predictions(encoder, config, batches([3]))
    assert (vectors.shape, shares.shape) == ((3, 12), (3, 0))


def test_all_batches_and_passes_compile_once(classifier, config):
    features._forward.clear_cache()
    list(features.predictions(classifier, config, batches([4, 4, 1])))
    list(features.features(classifier, config, batches([4, 2])))
    assert features._forward._cache_size() == 1


def test_bfloat16_gives_float32_vectors(build, config):
    model = build(ConvNeXtV2, dataclasses.replace(ENCODER, dtype=jnp.bfloat16), num_classes=3)
    ((vectors, labels),) = features.features(model, config, batches([4]))
    assert (vectors.dtype, labels.dtype) == (np.float32, np.int32)
    assert np.isfinite(vectors).all()


def test_all_features_leave_out_what_cannot_be_read(classifier, config, tmp_path):
    for index in range(11):
        folder = tmp_path / "ab"[index % 2]
        folder.mkdir(exist_ok=True)
        pixels = np.random.default_rng(index).integers(0, 256, (16, 16), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02}.png")
    (tmp_path / "a" / "04.png").write_bytes(b"no image")
    config.data.update({"source": "folder", "root": str(tmp_path), "val_fraction": 0.0})
    config.data.update({"unreadable": "skip", "max_unreadable": 0.5})
    source = ImageData(config).train
    mesh = sharding.make_mesh(config.mesh)
    vectors, labels = features.all_features(classifier, config, source, mesh)
    assert labels.tolist() == [0] * 5 + [1] * 5
    rows = [b["image"][b["mask"]] for b in eval_batches(source, config)]
    images = normalise(jnp.asarray(np.concatenate(rows)), config.data.mean, config.data.std)
    np.testing.assert_allclose(
        vectors, jax.jit(lambda model, x: model.pooled(x))(classifier, images), atol=2e-5
    )
