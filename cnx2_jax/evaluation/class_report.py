"""A report of every class: a table in Markdown and a picture of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cnx2_jax.files import creating
from cnx2_jax.observe.plots import draw_into
from cnx2_jax.observe.tables import markdown_table

INCH_PER_CLASS = 0.22


def write_report(folder: Path, class_names: Sequence[str], columns: Mapping[str, np.ndarray]) -> str:
    """Writes `classes.md` and, where matplotlib is installed, `classes.png` into a new folder.

    Args:
      folder: a path that does not exist.
      class_names: the name of each class.
      columns: by name, a value per class; NaN where a class does not occur. The first is drawn.

    Returns:
      A line about the picture, or why there is none.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    rows = [
        (name, *("" if np.isnan(value) else f"{value:.4f}" for value in values))
        for name, *values in zip(class_names, *columns.values(), strict=True)
    ]
    first = next(iter(columns))

    def draw(figure) -> None:
        figure.set_size_inches(6, 1 + INCH_PER_CLASS * len(class_names))
        axes = figure.add_subplot()
        axes.barh(range(len(class_names)), np.nan_to_num(columns[first]), height=0.7)
        axes.set_yticks(range(len(class_names)), class_names, fontsize=7)
        axes.set_ylim(len(class_names) - 0.5, -0.5)
        axes.set(xlabel=first, xlim=(0, 1))

    with creating(folder) as partial:
        partial.mkdir()
        (partial / "classes.md").write_text(
            markdown_table(("class", *columns), rows) + "\n", encoding="utf-8"
        )
        line = draw_into(partial / "classes.png", draw)
    return line.replace(str(partial), str(folder))
