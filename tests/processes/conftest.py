"""What runs here runs a few steps: compiling fast code would take longer than slow code does."""

import os

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """In this process, and in those that tests start: results are compared bit for bit between them."""
    before = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS")
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    yield
    if before is None:
        del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]
    else:
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = before
