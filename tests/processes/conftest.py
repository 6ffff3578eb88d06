"""What runs here runs a few steps: compiling fast code would take longer than slow code does."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly, quick_environment):
    """In this process, and in those that tests start: results are compared bit for bit between them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in quick_environment.items():
            patch.setenv(name, value)
        yield
