"""Atomic writing: a file is whole or not there."""

import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.files import creating, replacing, write_text


def test_replacing_takes_the_place_of_an_older_file(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with replacing(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    write_text(path, "newer")
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"file.json": "newer"}


def test_replacing_keeps_the_older_file_after_an_error(tmp_path):
    path = tmp_path / "file.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half of the n")
        raise KeyboardInterrupt
    assert {one.name: one.read_text() for one in tmp_path.iterdir()} == {"file.json": "old"}


def test_two_writers_do_not_share_a_partial_file(tmp_path):
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        assert first != second
        first.write_text("one")
        second.write_text("two")
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_creating_moves_what_was_written_and_what_lies_beside_it(tmp_path):
    out = tmp_path / "new" / "out"
    with creating(out) as place:
        place.write_text("one")
        place.with_name("out.data").write_text("two")
        assert not out.exists()
    assert {path.name: path.read_text() for path in out.parent.iterdir()} == {"out": "one", "out.data": "two"}


def test_creating_leaves_nothing_after_an_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), creating(tmp_path / "out") as place:
        place.mkdir()
        (place / "half").write_text("")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out", "out.data"])
def test_creating_overwrites_nothing(name, tmp_path):
    with pytest.raises(UserError, match=f"{name}' exists already"), creating(tmp_path / "out") as place:
        place.write_text("one")
        place.with_name("out.data").write_text("two")
        (tmp_path / name).write_text("mine")  # while it was being written
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "mine"}


def test_creating_reports_what_cannot_be_written_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write '.*/file/out'"), creating(tmp_path / "file" / "out"):
        pass
    with pytest.raises(UserError, match=r"/out': No such file"), creating(tmp_path / "out") as place:
        (place / "nowhere").write_text("")
