"""Against Hugging Face's ConvNeXt V2 in PyTorch, with copied random weights; GRN is not zero.

A ladder, so that the first rung to fail names the culprit: stem, one block, down-sampling, whole network.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.models import ConvNeXtV2, EncoderConfig
from cnx2_jax.models.layouts import Dense

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BOUND = 1e-5  # largest absolute difference over largest absolute value, in float32


@pytest.fixture(scope="module", params=[4, 1])
def pair(request, build, parameters, twin_of):
    """A small network with some stem patch size, and its twin."""
    config = EncoderConfig((1, 2, 1, 1), (8, 16, 24, 40), patch_size=request.param, in_chans=5)
    model = build(ConvNeXtV2, config, num_classes=7)
    return model, twin_of(model, parameters(model))


def channels_first(x):
    return torch.tensor(np.asarray(x).transpose(0, 3, 1, 2))


def channels_last(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_stem(pair, error):
    model, twin = pair
    images = normal(2, 24, 32, 5)
    conv, norm = model.downsample_layers[0]
    found = norm(conv(Dense().enter(images, model.config.patch_size)))
    expected = channels_last(twin.convnextv2.embeddings(channels_first(images)))
    assert error(found, expected) < BOUND


def test_one_block(pair, error):
    model, twin = pair
    x = normal(2, 9, 12, 16)
    found = model.stages[1][1](x, Dense())
    expected = channels_last(twin.convnextv2.encoder.stages[1].layers[1](channels_first(x)))
    assert error(found, expected) < BOUND


def test_one_down_sampling(pair, error):
    model, twin = pair
    x = normal(2, 6, 10, 16)
    norm, conv = model.downsample_layers[2]
    expected = channels_first(x)
    for layer in twin.convnextv2.encoder.stages[2].downsampling_layer:
        expected = layer(expected)
    assert error(conv(Dense().patches(norm(x))), channels_last(expected)) < BOUND


def test_small_network(pair, run_of_twin, error):
    model, twin = pair
    images = normal(2, 32, 64, 5)
    logits, maps = jax.jit(lambda m, x: (m(x), m.features(x)))(model, images)
    expected_logits, expected_maps = run_of_twin(twin, np.asarray(images))
    for found, expected in zip([logits, *maps], [expected_logits, *expected_maps], strict=True):
        assert error(found, expected) < BOUND


def test_whole_network(reference, parameters, twin_of, run_of_twin, error):
    """Logits and all four stage maps of atto and tiny, square and not."""
    model = reference.model()
    twin = twin_of(model, parameters(model))
    expected_logits, expected_maps = run_of_twin(twin, reference.images())
    logits, maps = reference.outputs()
    assert logits.shape == (2, 1000) and len(maps) == 4
    for found, expected in zip([logits, *maps], [expected_logits, *expected_maps], strict=True):
        assert error(found, expected) < BOUND
