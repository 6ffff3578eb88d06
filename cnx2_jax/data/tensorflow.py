"""TensorFlow on the host only: import `tf` from here, so that it never takes an accelerator's memory."""

import tensorflow as tf

# By default TensorFlow reserves the memory of every GPU, which JAX needs.
tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
