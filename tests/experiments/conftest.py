"""Shared by the tests of experiments/: importing what is there, and a git repository to launch from."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


@pytest.fixture
def load(monkeypatch):
    """The function that imports a module of experiments/, as running a script there would."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    return importlib.import_module


@pytest.fixture
def script():
    """The function `script(name, *words, **options)` that starts an experiment as a user would."""

    def start(name, *words, **options):
        return subprocess.Popen(
            [sys.executable, EXPERIMENTS / name, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start


@pytest.fixture
def repository(tmp_path):
    """The function `repository(**files)` that makes a git repository with one commit of these files."""

    def make(**files):
        root = tmp_path / "repository"
        root.mkdir()
        for name, text in {"_gitignore": "runs/\n", **files}.items():
            (root / name.replace("_", ".")).write_text(text)
        identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.org"]
        for words in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "Begin"]):
            subprocess.run(["git", *words], cwd=root, check=True)
        return root

    return make


@pytest.fixture
def wait_for():
    """The function `wait_for(condition)` that returns its first value that is true, within two minutes."""

    def wait(condition):
        for _ in range(12_000):
            value = condition()
            if value:
                return value
            time.sleep(0.01)
        raise AssertionError("nothing happened for two minutes")

    return wait


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """The function `recorder(name, body="")` that puts a program on the PATH which stands in for another.

    It appends its words, quoted for a shell, to the file that `recorder.calls` reads, then does `body`.
    """
    folder = tmp_path / "programs"
    folder.mkdir()
    record = tmp_path / "calls"
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")

    class Recorder:
        def __call__(self, name, body=""):
            line = f'printf "%q " {name} "$@" >>{record}; echo >>{record}'
            (folder / name).write_text(f"#!/usr/bin/env bash\n{line}\n{body}\n")
            (folder / name).chmod(0o755)

        @staticmethod
        def calls():
            return record.read_text().splitlines() if record.exists() else []

    return Recorder()
