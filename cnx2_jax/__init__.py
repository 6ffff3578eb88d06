"""ConvNeXt V2 and FCMAE in JAX (Woo et al., CVPR 2023, arXiv 2301.00808)."""

import os

# TensorFlow reads these when it is imported. Its errors reach the user as exceptions, so its log, which
# repeats each several times, is off. With oneDNN on, it prints a line at every start.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
# Orbax and TensorFlow Datasets read this at their first path, local or not: TensorFlow takes seconds to
# import only to reach a bucket, and `storage` must see what they write.
os.environ.setdefault("EPATH_USE_TF", "false")
