"""What runs here runs a few steps: compiling fast code would take longer than slow code does."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Turns off optimisations."""
