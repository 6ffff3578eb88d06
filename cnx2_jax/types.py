"""Names for what travels between rooms."""

from collections.abc import Mapping

import jax
import numpy as np

HostBatch = Mapping[str, np.ndarray]  # one host's share of a batch; the first axis is the sample
Batch = Mapping[str, jax.Array]  # the same on the devices, as global arrays
Metrics = dict[str, float]
