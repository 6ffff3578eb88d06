"""TensorFlow on the host only: import `tf` from here, so that it never takes an accelerator's memory."""

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def _keras_hidden() -> Iterator[None]:
    """Makes an import of Keras fail, unless Keras is imported already."""
    modules: dict = sys.modules
    if modules.setdefault("keras.src") is not None:
        yield
        return
    try:
        yield
    finally:
        del modules["keras.src"]


# TensorFlow imports Keras only to register optimizers, a third of its start, and does without Keras
# if that fails. `tf.keras` still imports it.
with _keras_hidden():
    import tensorflow as tf

# By default TensorFlow reserves the memory of every GPU, which JAX needs.
tf.config.set_visible_devices([], "GPU")

__all__ = ["tf"]
