"""From stored records to batches of NumPy arrays, in TensorFlow, on the host."""

import tensorflow as tf

# TensorFlow must not take the accelerator's memory, which JAX needs.
tf.config.set_visible_devices([], "GPU")
