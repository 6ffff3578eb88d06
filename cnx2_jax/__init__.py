"""ConvNeXt V2 and FCMAE in JAX (Woo et al., CVPR 2023, arXiv 2301.00808)."""

import os

# Read when TensorFlow is imported. Its errors reach the user as exceptions, so its log, which repeats a
# broken image's several times over, may be silent. oneDNN is for matrix products, of which the pipeline has
# none; left on, TensorFlow announces it at every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
