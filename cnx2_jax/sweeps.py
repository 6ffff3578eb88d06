"""Helpers for the `sweep_NAME()` functions of config files, which return a list of overrides to try.

Overrides are a dict of config keys and values, such as `{"optimizer.layer_decay": 0.8}`; `cnx2 sweep` makes a
run of each.
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
    """Returns every combination of the keys' values, the last key's changing fastest.

    Keys have dots: `product(**{"optimizer.layer_decay": (0.7, 0.8), "batch_size": (512, 1024)})`.
    """
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def random(count: int, seed: int, **distributions: Draw) -> list[Overrides]:
    """Returns `count` draws of all keys.

    Each value is a function of the seed, its place and its key alone: a longer sweep begins with a shorter
    one, and another key leaves the values of the others as they are.

    Args:
      count: how many.
      seed: of the draws.
      **distributions: by key, such as `log_uniform(1e-4, 1e-2)`.

    Raises:
      UserError: count is less than 1.
    """
    if count < 1:
        raise UserError(f"a random sweep of {count} runs has none; give at least 1")
    return [
        {key: draw(python_random.Random(f"{seed} {place} {key}")) for key, draw in distributions.items()}
        for place in range(count)
    ]


def uniform(low: float, high: float) -> Draw:
    """Draws between two numbers."""
    return lambda generator: _rounded(generator.uniform(low, high))


def log_uniform(low: float, high: float) -> Draw:
    """Draws between two positive numbers, each factor as likely as another.

    Raises:
      UserError: they are not positive.
    """
    if not 0 < low <= high:
        raise UserError(f"log_uniform({low}, {high}) must be of positive numbers, the lower one first")
    return lambda generator: _rounded(math.exp(generator.uniform(math.log(low), math.log(high))))


def choice(*values: Any) -> Draw:
    """Draws one of some values."""
    return lambda generator: generator.choice(values)


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")  # a name that can be read, and written on a command line


def arguments(overrides: Overrides) -> list[str]:
    """Returns overrides as `cnx2 train` takes them: `--config.KEY=VALUE`."""
    return [f"--config.{key}={value}" for key, value in overrides.items()]
