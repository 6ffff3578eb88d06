"""Building blocks for sweeps. A config's function `sweep_NAME()` returns a list of overrides.

An override is a dict of config keys and values, such as `{"optimizer.layer_decay": 0.8}`; `cnx2 sweep` makes
one run of each.
"""

import itertools
import math
import random as python_random
from collections.abc import Callable, Iterable
from typing import Any

from cnx2_jax.errors import UserError

Overrides = dict[str, Any]
Draw = Callable[[python_random.Random], Any]


def product(**axes: Iterable) -> list[Overrides]:
    """Returns every combination of the values; the last key varies fastest.

    Keys contain dots, so unpack a dict:
    `product(**{"optimizer.layer_decay": (0.7, 0.8), "batch_size": (512, 1024)})`.
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def random(count: int, seed: int, **distributions: Draw) -> list[Overrides]:
    """Returns `count` random draws of all keys.

    Each value is a function of the seed, its position and its key alone. So a longer sweep starts with the
    values of a shorter one, and a new key does not change the values of the others.

    Args:
      count: number of draws.
      seed: of the draws.
      **distributions: one per key, such as `log_uniform(1e-4, 1e-2)`.

    Raises:
      UserError: count is less than 1.
    """
    if count < 1:
        raise UserError(f"a random sweep of {count} runs is empty; count must be at least 1")
    return [
        {key: draw(python_random.Random(f"{seed} {place} {key}")) for key, draw in distributions.items()}
        for place in range(count)
    ]


def uniform(low: float, high: float) -> Draw:
    """Draws uniformly between two numbers."""
    return lambda generator: _rounded(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
    """Draws between two positive numbers, uniformly in their logarithm.

    Raises:
      UserError: a number is not positive, or `low` is larger than `high`.
    """
    if not 0 < low <= high:
        raise UserError(f"log_uniform({low}, {high}) takes two positive numbers, the lower one first")
    return lambda generator: _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))


def choice(*values: Any) -> Draw:
    """Draws one of the values."""
    return lambda generator: generator.choice(values)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")  # short enough for a folder name and a command line


def arguments(overrides: Overrides) -> list[str]:
    """Returns the overrides as arguments of `cnx2 train`: `--config.KEY=VALUE`."""
    return [f"--config.{key}={value}" for key, value in overrides.items()]
