"""Tables of labels: CSV files with one row per image, checked so that each mistake names its line.

The first row names the columns. `image` holds paths relative to the folder of images; `split`, which may be
missing, holds `train` or `val`. Which other columns are read depends on the task.
"""

import csv
import dataclasses
import math
import os
from collections.abc import Sequence

import numpy as np

from cnx2_jax.data.class_names import read_class_names
from cnx2_jax.errors import UserError, nearest

IMAGE, SPLIT, LABEL, LABELS = "image", "split", "label", "labels"
CLASS_SEPARATOR = ";"  # between the classes of one cell
_OTHER_SEPARATORS = {";": "';'", "\t": "tabs", "|": "'|'"}


@dataclasses.dataclass(frozen=True)
class Table:
    """A CSV file.

    Attributes:
      path: of the file.
      columns: names, in order.
      rows: the cells of each row, without blanks around them.
      lines: the line on which each row begins, counted from 1.
    """

    path: str
    columns: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    lines: Sequence[int]

    def where(self, row: int) -> str:
        """Returns what messages call a row."""
        return f"line {self.lines[row]} of '{self.path}'"

    def column(self, name: str) -> list[str]:
        """Returns the cells of a column.

        Raises:
          UserError: there is none of this name.
        """
        if name not in self.columns:
            others = [each for each in self.columns if each not in (IMAGE, SPLIT)]
            raise UserError(
                f"'{self.path}' has no column '{name}'{nearest(name, others)} (its columns: "
                f"{', '.join(self.columns)}); add it"
            )
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def ordered(self, images: Sequence[str]) -> "Table":
        """Returns the rows of these images, in their order.

        Raises:
          UserError: an image has no row, a row has no image, or an image has two rows.
        """
        row_of: dict[str, int] = {}
        known = set(images)
        for row, name in enumerate(self.column(IMAGE)):
            if name in row_of:
                raise UserError(
                    f"image '{name}' is on lines {self.lines[row_of[name]]} and {self.lines[row]} of "
                    f"'{self.path}'; remove one"
                )
            if name not in known:
                raise UserError(
                    f"{self.where(row)} names image '{name}', which is not below data.root; correct the "
                    "path, or remove the line"
                )
            row_of[name] = row
        missing = next((name for name in images if name not in row_of), None)
        if missing is not None:
            raise UserError(f"image '{missing}' has no row in '{self.path}'; add one, or remove the image")
        order = [row_of[name] for name in images]
        return dataclasses.replace(
            self, rows=[self.rows[row] for row in order], lines=[self.lines[row] for row in order]
        )


def read_table(path: str) -> Table:
    """Reads a CSV file, in UTF-8, whose columns are separated by commas; blank lines do not count.

    Raises:
      UserError: it cannot be read, has no rows or no column `image`, names a column twice, or a row has more
        or fewer cells than there are columns.
    """
    path = os.path.expanduser(path)
    rows, lines, line = [], [], 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                if any(map(str.strip, cells)):
                    rows.append([cell.strip() for cell in cells])
                    lines.append(line)
                line = reader.line_num + 1
    except OSError as error:
        raise UserError(f"cannot read data.labels '{path}': {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data.labels '{path}' is not UTF-8 text; save it as CSV in UTF-8") from error
    except csv.Error as error:
        raise UserError(f"line {line} of data.labels '{path}' is not valid CSV: {error}") from error
    if len(rows) < 2:
        raise UserError(
            f"data.labels '{path}' has no rows; write the names of the columns, then a row per image"
        )
    columns = tuple(rows[0])
    _check_columns(columns, path)
    for cells, place in zip(rows, lines, strict=True):
        if len(cells) != len(columns):
            raise UserError(
                f"line {place} of '{path}' has {len(cells)} cells for {len(columns)} columns; quote cells "
                "that hold commas"
            )
    return Table(path, columns, rows[1:], lines[1:])


def _check_columns(columns: tuple[str, ...], path: str) -> None:
    if len(columns) == 1:
        found = next((name for mark, name in _OTHER_SEPARATORS.items() if mark in columns[0]), None)
        if found:
            raise UserError(f"the columns of '{path}' are separated by {found}; separate them by commas")
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"'{path}' has two columns '{twice}'; rename one")
    if IMAGE not in columns:
        raise UserError(
            f"'{path}' has no column 'image'{nearest(IMAGE, columns)} (its columns: {', '.join(columns)}); "
            "add it, with the paths of the images below data.root"
        )


def read_split(table: Table) -> np.ndarray | None:
    """Returns which rows are for validation, bool [rows]; None if no column says so.

    Raises:
      UserError: a cell of the column `split` is neither `train` nor `val`.
    """
    if SPLIT not in table.columns:
        return None
    cells = table.column(SPLIT)
    for row, cell in enumerate(cells):
        if cell not in ("train", "val"):
            raise UserError(f"{table.where(row)}: split '{cell}' must be train or val; correct it")
    return np.array([cell == "val" for cell in cells])


def read_label(table: Table, classes: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads one class per image from the column `label`.

    Args:
      table: see `Table`.
      classes: a text file of class names (`data.classes`); if empty, the names that occur, sorted.

    Returns:
      int32 [rows], and the names of the classes.

    Raises:
      UserError: a cell is empty, or its class is not among the names.
    """
    cells = table.column(LABEL)
    names = read_class_names(classes) if classes else tuple(sorted({*cells} - {""}))
    index = {name: place for place, name in enumerate(names)}
    return np.array([_place(table, row, cell, index) for row, cell in enumerate(cells)], np.int32), names


def read_labels(table: Table, classes: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Reads any number of classes per image.

    From the column `labels`, whose cells hold the names of classes with `;` between them, or nothing. Without
    that column, from one column per class that holds 0 or 1.

    Args:
      table: see `Table`.
      classes: a text file of class names (`data.classes`). If empty, the names that occur, sorted, or else
        those of all columns but `image` and `split`, in their order.

    Returns:
      bool [rows, classes], and the names of the classes.

    Raises:
      UserError: a class is not among the names, is named twice in a cell, or has no column; a cell is neither
        0 nor 1; or there is no class at all.
    """
    if LABELS not in table.columns:
        names = _class_columns(table, classes)
        columns = []
        for name in names:
            cells = table.column(name)
            for row, cell in enumerate(cells):
                if cell not in ("0", "1"):
                    raise UserError(
                        f"{table.where(row)}: column '{name}' holds '{cell}', not 0 or 1; correct it"
                    )
            columns.append([cell == "1" for cell in cells])
        return np.array(columns, bool).T, names
    sets = [
        [name.strip() for name in cell.split(CLASS_SEPARATOR)] if cell else []
        for cell in table.column(LABELS)
    ]
    names = (
        read_class_names(classes)
        if classes
        else tuple(sorted({name for each in sets for name in each} - {""}))
    )
    if not names:
        raise UserError(f"no row of '{table.path}' has a label; fill in the column 'labels'")
    index = {name: place for place, name in enumerate(names)}
    targets = np.zeros((len(sets), len(names)), bool)
    for row, each in enumerate(sets):
        for name in each:
            place = _place(table, row, name, index)
            if targets[row, place]:
                raise UserError(f"{table.where(row)} names class '{name}' twice; remove one")
            targets[row, place] = True
    return targets, names


def _class_columns(table: Table, classes: str) -> tuple[str, ...]:
    if classes:
        return read_class_names(classes)
    names = tuple(name for name in table.columns if name not in (IMAGE, SPLIT))
    if not names:
        raise UserError(
            f"'{table.path}' has no labels: add a column 'labels', with class names separated by "
            f"'{CLASS_SEPARATOR}', or a column of 0 and 1 for each class"
        )
    return names


def _place(table: Table, row: int, name: str, index: dict[str, int]) -> int:
    if name not in index:
        problem = (
            f"class '{name}' is not in data.classes{nearest(name, index)}" if name else "a class is empty"
        )
        raise UserError(f"{table.where(row)}: {problem}; correct it, or add the class")
    return index[name]


def read_values(table: Table, targets: Sequence[str]) -> np.ndarray:
    """Returns the numbers in the columns `targets` (`data.targets`), float64 [rows, targets].

    Raises:
      UserError: no target is named or one twice, a column is missing, or a cell is not a finite number.
    """
    if not targets or len(set(targets)) < len(targets):
        raise UserError(f"data.targets {tuple(targets)} must name at least one column, and none twice")
    return np.array([_numbers(table, name) for name in targets]).T


def _numbers(table: Table, name: str) -> list[float]:
    numbers = []
    for row, cell in enumerate(table.column(name)):
        try:
            number = float(cell)
        except ValueError:
            problem = f"'{cell}', which is not a number" if cell else "nothing"
            raise UserError(f"{table.where(row)}: column '{name}' holds {problem}; correct it") from None
        if not math.isfinite(number):
            raise UserError(
                f"{table.where(row)}: column '{name}' holds '{cell}', but needs a finite number; fill it in, "
                "or remove the row and its image"
            )
        numbers.append(number)
    return numbers
