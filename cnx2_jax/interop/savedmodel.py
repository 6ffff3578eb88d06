"""SavedModel: a folder that TensorFlow loads, serves and converts without JAX.

It consists of TensorFlow's operations. A SavedModel by jax2tf contains StableHLO, which ties the reader to
JAX's version (TensorFlow 2.21 does not read the output of JAX 0.10), and TensorFlow Lite does not accept it.
"""

from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from cnx2_jax.data.tensorflow import tf
from cnx2_jax.interop.inference import InferenceModel, Results
from cnx2_jax.interop.layers import compose
from cnx2_jax.interop.tensorflow_operations import TensorFlowOperations
from cnx2_jax.kernels.pointwise import EPSILON


def write(path: Path, model: InferenceModel) -> None:
    """Writes the signature `serving_default`, `images -> InferenceModel.outputs`, for any batch size.

    The weights are variables with the names of our parameters.

    Raises:
      OSError: it cannot be written.
    """
    layers = _Layers(model)

    def forward(images):
        return compose(model, layers, images)

    images = tf.TensorSpec([None, *model.shape], model.dtype, name="images")
    layers.forward = tf.function(forward, input_signature=[images], autograph=False)
    try:
        tf.saved_model.save(layers, str(path), signatures={"serving_default": layers.forward})
    except tf.errors.OpError as error:
        raise OSError(error.message) from None


def run(path: Path, images: Shaped[np.ndarray, "b h w c"]) -> Results:
    """Runs a folder written by `write`."""
    loaded = tf.saved_model.load(str(path))  # a signature alone does not keep its variables alive
    found = loaded.signatures["serving_default"](images=tf.constant(images))
    results = {name: result.numpy() for name, result in found.items()}
    return results if len(results) > 1 else results.popitem()[1]


class _Layers(TensorFlowOperations, tf.Module):
    """Implements `layers.Layers`, and `operations.Operations` too; kernels have our layout."""

    def __init__(self, model: InferenceModel):
        super().__init__()
        self.mean_of_pixels, self.deviation = model.mean, model.std
        # An auxiliary head is for training alone.
        self.variables_by_name = {
            name: tf.Variable(value, name=name)
            for name, value in model.params.items()
            if not name.startswith("auxiliary_head.")
        }

    def _parameters(self, name: str, *leaves: str) -> list[tf.Variable]:
        return [self.variables_by_name[f"{name}.{leaf}"] for leaf in leaves]

    def normalise(self, images):
        mean, deviation = (tf.constant(x, tf.float32) for x in (self.mean_of_pixels, self.deviation))
        return (tf.cast(images, tf.float32) / 255 - mean) / deviation

    def patch_conv(self, x, name):
        kernel, bias = self._parameters(name, "kernel", "bias")
        return tf.nn.conv2d(x, kernel, strides=kernel.shape[0], padding="VALID") + bias

    def depthwise(self, x, name):
        kernel, bias = self._parameters(name, "kernel", "bias")
        return tf.nn.depthwise_conv2d(x, kernel[..., None], strides=[1, 1, 1, 1], padding="SAME") + bias

    def layer_norm(self, x, name):
        scale, bias = self._parameters(name, "scale", "bias")
        mean, variance = tf.nn.moments(x, axes=[-1], keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + EPSILON) * scale + bias

    def linear(self, x, name):
        kernel, bias = self._parameters(name, "kernel", "bias")
        return tf.tensordot(x, kernel, axes=1) + bias

    def gelu(self, x):
        return tf.nn.gelu(x, approximate=False)

    def grn(self, x, name):
        gamma, beta = self._parameters(name, "gamma", "beta")
        norm = tf.sqrt(tf.reduce_sum(tf.square(x), axis=[1, 2], keepdims=True) + EPSILON)
        norm /= tf.reduce_mean(norm, axis=-1, keepdims=True) + EPSILON
        return x * (1 + gamma * norm) + beta

    def add(self, x, y):
        return x + y

    def mean(self, x):
        return tf.reduce_mean(x, axis=[1, 2])

    def conv(self, x, name):
        x = tf.nn.conv2d(x, self.variables_by_name[f"{name}.kernel"], strides=1, padding="SAME")
        bias = self.variables_by_name.get(f"{name}.bias")
        return x if bias is None else x + bias

    def scale_shift(self, x, name, scale, shift):
        return x * tf.constant(scale) + tf.constant(shift)

    def relu(self, x):
        return tf.nn.relu(x)

    def resample(self, x, name, rows, columns):
        x = tf.einsum("yh,bhwc->bywc", tf.constant(rows), x)
        return tf.einsum("xw,bywc->byxc", tf.constant(columns), x)

    def concatenate(self, maps, name):
        return tf.concat(maps, axis=-1)

    def upsample(self, x, name):
        kernel, bias = self._parameters(name, "kernel", "bias")
        x = tf.einsum("bhwi,pqio->bhpwqo", x, kernel)
        return tf.reshape(x, [-1, 2 * x.shape[1], 2 * x.shape[3], x.shape[5]]) + bias
