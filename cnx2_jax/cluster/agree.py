"""Exchanges JSON values and bytes between the processes of a run."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def from_first(value: Any) -> Any:
    """Returns process 0's value in all processes. Every process must call it; the others' values are ignored.

    Two processes can read different things from a shared folder, but must act on the same.

    Args:
      value: a JSON value.
    """
    return value if jax.process_count() == 1 else gathered(value if jax.process_index() == 0 else None)[0]


def gathered(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order. Every process must call it.

    Args:
      value: a JSON value.
    """
    if jax.process_count() == 1:
        return [value]
    return [json.loads(part) for part in gathered_bytes(json.dumps(value).encode())]


def gathered_bytes(content: bytes) -> list[bytes]:
    """Returns the bytes of all processes, in their order, under 2 GiB each. Every process must call it."""
    if jax.process_count() == 1:
        return [content]
    numbers = np.frombuffer(content, np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(numbers))))
    padded = np.zeros(sizes.max(), np.uint8)
    padded[: len(numbers)] = numbers
    every = multihost_utils.process_allgather(padded)
    return [bytes(part[:size]) for part, size in zip(np.asarray(every), sizes, strict=True)]
