"""Commands compile much and run little."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Turns off optimisations."""


@pytest.fixture(autouse=True)
def nothing_reports_progress(no_progress_lines):
    """Lets tests compare what commands print."""
