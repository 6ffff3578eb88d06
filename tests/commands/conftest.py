"""Commands compile much and run little."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Turns off optimisations."""
