"""A pytest plugin that adds up each test's processor time: `pytest -p cpu_seconds` prints the 30 largest.

Processor time of this process and of those it started and waited for, so it hardly depends on what else the
machine does. A fixture counts for the first test that asks for it. `make times` runs the suite with it.
"""

import collections
import os
import sys

import pytest

SHOWN = 30
_seconds: collections.Counter[str] = collections.Counter()  # by test; in the process that reports
_last = 0.0


def _spent() -> float:
    times = os.times()
    forked = getattr(sys.modules.get("forked"), "spent", 0.0)
    return times.user + times.system + times.children_user + times.children_system + forked


def pytest_runtest_logstart() -> None:
    global _last
    _last = _spent()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call) -> None:
    """Stores the seconds since the previous phase (setup, call or teardown) with the test."""
    global _last
    now = _spent()
    item.user_properties.append((f"cpu_{call.when}", now - _last))
    _last = now


def pytest_runtest_logreport(report) -> None:
    """Runs in the reporting process, also for tests of xdist's workers."""
    # A worker that crashed measured nothing.
    _seconds[report.nodeid] += dict(report.user_properties).get(f"cpu_{report.when}", 0)


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints the sum, the sums of the files and the largest tests."""
    files: collections.Counter[str] = collections.Counter()
    for test, seconds in _seconds.items():
        files[test.partition("::")[0]] += seconds
    terminalreporter.section(f"processor time: {_seconds.total():.0f} s")
    for counts in (files, _seconds):
        for name, seconds in counts.most_common(SHOWN):
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
        terminalreporter.write_line("")
