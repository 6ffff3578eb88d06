"""Feature files: both exist and are complete, or neither exists."""

import json
import resource

import numpy as np
import pytest

from cnx2_jax.errors import UserError
from cnx2_jax.evaluation import feature_file

ROWS = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
NAMES = ["a.png", "b\n.png", "ü.png", "d\udcff.png", "e.png"]


def test_rows_and_their_names_are_read_back(tmp_path):
    path = tmp_path / "new" / "out.npy"
    with feature_file.writer(path, NAMES, 3) as write:
        write(ROWS[:3])
        assert not path.exists() and not path.with_suffix(".json").exists()
        write(ROWS[3:].astype(np.float64))
    stored = np.load(path)
    np.testing.assert_array_equal(stored, ROWS)
    assert stored.dtype == np.float32
    assert json.loads(feature_file.names_path(path).read_text()) == NAMES
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.json", "out.npy"]
    assert np.load(path, mmap_mode="r").shape == (5, 3)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), feature_file.writer(tmp_path / "out.npy", NAMES, 3) as write:
        write(ROWS)
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with (
        pytest.raises(UserError, match=r"cannot write '.*out.npy': File too large"),
        feature_file.writer(tmp_path / "out.npy", ["a"] * 5000, 3) as write,
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            write(ROWS.repeat(1000, axis=0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_takes_no_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot write"):
        feature_file.check(tmp_path / "file" / "out.npy")
    with (
        pytest.raises(UserError, match="cannot write"),
        feature_file.writer(tmp_path / "file" / "out.npy", NAMES, 3),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["out.npy", "out.json"])
def test_what_is_there_stays(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name}' exists already; nothing was overwritten, .* --features"):
        feature_file.check(tmp_path / "out.npy")


def test_another_ending(tmp_path):
    with pytest.raises(UserError, match=r"out.json' must end in .npy"):
        feature_file.check(tmp_path / "out.json")
