"""Images in, batches of NumPy arrays out.

This is the one room that needs TensorFlow (and `interop/savedmodel.py`, to write its format). Importing the
package itself, or `data.imagenet`, does not load TensorFlow.
"""
