"""Images in, NumPy batches out: the only room of the house that imports TensorFlow."""

import os

# Must be set before TensorFlow is imported. Its errors reach the user as exceptions, so its log, which
# repeats a broken image's several times over, may be silent. oneDNN is for matrix products, of which
# there are none here; left on, TensorFlow announces it on standard error at every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import tensorflow as tf

# The accelerators belong to JAX: TensorFlow would otherwise claim a GPU's whole memory.
tf.config.set_visible_devices([], "GPU")
