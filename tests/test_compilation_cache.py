"""The folder of compiled programs."""

import os

import pytest

from cnx2_jax import compilation_cache
from cnx2_jax.compilation_cache import VARIABLE, keep_compiled


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """A folder of caches of its own, without a folder that was named."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_the_folder_is_the_users_and_of_this_processor(caches, monkeypatch):
    keep_compiled()
    (folder,) = (caches / "cnx2_jax").iterdir()
    assert os.environ[VARIABLE] == str(folder)
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr(compilation_cache, "_processor", lambda: "another")
    keep_compiled()
    assert os.environ[VARIABLE] == str(caches / "cnx2_jax" / "compiled-another")


@pytest.mark.parametrize("named", ["elsewhere", ""])
def test_a_named_folder_stays(named, caches, monkeypatch):
    monkeypatch.setenv(VARIABLE, named)
    keep_compiled()
    assert os.environ[VARIABLE] == named
    assert not list(caches.iterdir())


def test_without_a_place_nothing_is_kept(caches, monkeypatch):
    (caches / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches / "file"))
    keep_compiled()
    assert VARIABLE not in os.environ
