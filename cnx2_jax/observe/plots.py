"""Plots."""

from collections.abc import Callable
from pathlib import Path


def draw_into(path: Path, draw: Callable) -> str:
    """Writes a plot and returns a line that says so, or why not: matplotlib is optional.

    Args:
      path: the picture to write.
      draw: draws into the matplotlib figure that it is given.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"no {path.name}: matplotlib is not installed; pip install 'cnx2_jax[benchmark]' installs it"
    figure = Figure(dpi=150, layout="constrained")
    draw(figure)
    figure.savefig(path)
    return f"drew {path}"
