"""Reports of an evaluation: tables, plots and pictures in a folder. A task says what its report holds."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cnx2_jax.files import creating
from cnx2_jax.observe.pictures import write_picture
from cnx2_jax.observe.plots import draw_into
from cnx2_jax.observe.tables import markdown_table

INCH_PER_CLASS = 0.22


class Table(NamedTuple):
    """Rows below the names of their columns."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]


class Report(NamedTuple):
    """The contents of a report, by the names of its files.

    Attributes:
      tables: written in Markdown and as CSV.
      plots: each draws into the matplotlib figure that it is given.
      pictures: uint8 `[H, W, 3]`.
    """

    tables: Mapping[str, Table]
    plots: Mapping[str, Callable]
    pictures: Mapping[str, np.ndarray] = {}


def write_report(folder: Path, report: Report) -> list[str]:
    """Writes a report into a new folder; plots only where matplotlib is installed.

    Args:
      folder: a path that does not exist.
      report: what to write.

    Returns:
      A line about each plot, or why there is none.

    Raises:
      UserError: the folder exists or cannot be written.
    """
    with creating(folder) as partial:
        partial.mkdir()
        for name, table in report.tables.items():
            (partial / f"{name}.md").write_text(markdown_table(*table) + "\n", encoding="utf-8")
            with (partial / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([table.header, *table.rows])
        for name, picture in report.pictures.items():
            write_picture(picture, partial / f"{name}.png")
        lines = [draw_into(partial / f"{name}.png", draw) for name, draw in report.plots.items()]
    return [line.replace(str(partial), str(folder)) for line in lines]


def shown(value: float) -> str:
    """Returns a number as tables show it: whole numbers as such, others with 4 digits, and NaN as nothing."""
    if isinstance(value, int | np.integer):
        return str(value)
    return "" if np.isnan(value) else f"{value:.4f}"


def class_report(class_names: Sequence[str], columns: Mapping[str, np.ndarray]) -> Report:
    """Returns a report of every class: a table `classes` and a plot of its first column.

    Args:
      class_names: the name of each class.
      columns: by name, a value per class; NaN where a class does not occur.
    """
    rows = [(name, *map(shown, values)) for name, *values in zip(class_names, *columns.values(), strict=True)]
    first = next(iter(columns))

    def draw(figure) -> None:
        figure.set_size_inches(6, 1 + INCH_PER_CLASS * len(class_names))
        axes = figure.add_subplot()
        axes.barh(range(len(class_names)), np.nan_to_num(columns[first]), height=0.7)
        axes.set_yticks(range(len(class_names)), class_names, fontsize=7)
        axes.set_ylim(len(class_names) - 0.5, -0.5)
        axes.set(xlabel=first, xlim=(0, 1))

    return Report({"classes": Table(("class", *columns), rows)}, {"classes": draw})
