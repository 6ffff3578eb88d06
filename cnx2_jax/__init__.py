"""ConvNeXt V2 and FCMAE in JAX (Woo et al., CVPR 2023, arXiv 2301.00808)."""

import os

# TensorFlow reads these when it is imported. Its errors reach the user as exceptions, so its log, which
# repeats each several times, is off. With oneDNN on, it prints a line at every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
