"""Tables in Markdown."""

import pytest

from cnx2_jax.observe.tables import markdown_table


def test_columns_line_up():
    assert markdown_table(["run", "step"], [["a", 10], ["longer", None]]).splitlines() == [
        "| run    | step |",
        "|--------|------|",
        "| a      | 10   |",
        "| longer | None |",
    ]


def test_a_table_of_no_rows_is_its_header():
    assert markdown_table(["a"], []).splitlines() == ["| a   |", "|-----|"]


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="zip"):
        markdown_table(["a", "b"], [["only one"]])
