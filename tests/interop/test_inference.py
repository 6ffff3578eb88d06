"""The exported model, independent of formats: float32, not scanned, with the results of the network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.interop.inference import InferenceModel


def test_it_gives_what_the_network_gives(kind, inference_model, example, error):
    exported = inference_model(kind)
    images, expected = example(kind)
    ((name, output),) = exported.outputs.items()
    assert name == ("logits" if kind.num_classes else "features")
    assert (expected.shape, expected.dtype) == ((5, *output.shape), output.dtype)
    assert error(exported.reference(images), expected) < 1e-5


def test_it_computes_in_float32_whatever_the_network_does(inference_model, error):
    coarse, fine = inference_model(dtype=jnp.bfloat16), inference_model()
    images = fine.some_images(2)
    np.testing.assert_array_equal(coarse.reference(images), fine.reference(images))


def test_no_loop_stacks_weights(inference_model):
    exported = inference_model()
    jaxpr = jax.make_jaxpr(lambda x: exported.apply(exported.params, x))(exported.some_images(1))
    assert "scan[" not in str(jaxpr) and "erf" in str(jaxpr)


def test_images_are_the_same_every_time_and_fill_their_range(kind, inference_model):
    exported = inference_model(kind)
    images = exported.some_images(3)
    np.testing.assert_array_equal(images, exported.some_images(3))
    assert images.shape == (3, *exported.shape) and images.dtype == exported.dtype
    assert images.std() > (70 if kind.uint8 else 0.9)


def test_size_of_no_whole_strides_is_refused(network, kind):
    with pytest.raises(UserError, match="image size 36x32 is not a multiple"):
        InferenceModel(network(kind), (36, 32), mean=(0.5,), std=(0.5,), uint8=False)
