"""Commands compile much and run little."""

import pytest

from cnx2_jax.observe import progress


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Turns off optimisations."""


@pytest.fixture(autouse=True)
def no_progress_lines(monkeypatch):
    """On a busy machine a command may take so long that it reports progress, and what it says is compared."""
    monkeypatch.setattr(progress, "LINE_SECONDS", float("inf"))
