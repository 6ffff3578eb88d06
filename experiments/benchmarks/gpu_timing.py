"""How the studies of a GPU take times: in groups of calls without waiting in between."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import jax


def notice(line: str) -> None:
    """Prints a line of progress."""
    print(line, file=sys.stderr, flush=True)


def seconds(call: Callable[[int], object], wait: Callable[[object], object], *, small: bool) -> float:
    """Returns the seconds of one call, the median of groups that run without waiting in between."""
    for index in range(2):
        wait(call(index))
    begin = time.perf_counter()
    wait(call(0))
    once = time.perf_counter() - begin
    count = 1 if small else int(min(200, max(3, 0.12 / once)))
    taken = []
    for _ in range(2 if small else 5):
        begin = time.perf_counter()
        for index in range(count):
            last = call(index)
        wait(last)
        taken.append((time.perf_counter() - begin) / count)
    return statistics.median(taken)


def jax_seconds(function: Callable, operands: Sequence[tuple], *, small: bool) -> float:
    """Times a jitted function on several sets of operands in turn, so that caches do not hold them."""
    return seconds(
        lambda index: function(*operands[index % len(operands)]), jax.block_until_ready, small=small
    )
