"""Images in, batches of NumPy arrays out; all of it in TensorFlow, on the host."""

import tensorflow as tf

# The accelerator's memory belongs to JAX.
tf.config.set_visible_devices([], "GPU")
