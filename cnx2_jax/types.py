"""Types that several rooms share."""

from collections.abc import Mapping

import jax
import numpy as np

# The key of a batch under which a dictionary holds the NumPy arrays that never go to a device.
HOST = "host"

HostBatch = Mapping[str, np.ndarray]  # one host's share of a batch; the first axis is the sample
Batch = Mapping[str, jax.Array]  # the same on the devices, as global arrays
Metrics = dict[str, float]
