"""Tables in Markdown."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Returns a table in Markdown whose columns line up in a terminal; without a newline at its end.

    Args:
      header: the names of the columns.
      rows: as many values as there are columns, shown as `str` does.

    Raises:
      ValueError: a row is longer or shorter than the header.
    """
    cells = [[str(value) for value in row] for row in (header, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])
