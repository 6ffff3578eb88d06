"""Shared by the tests of launching: the command as a process, and a git repository to launch from."""

import os
import subprocess
import sys
import time

import pytest


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Turns off optimisations, also for the runs that are launched."""


@pytest.fixture
def start_launch():
    """The function `start_launch(*arguments, **options)` that starts `cnx2 launch` as a process."""

    def start(*arguments, **options):
        return subprocess.Popen(
            [sys.executable, "-m", "cnx2_jax.cli", "launch", *map(str, arguments)],
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
        for arguments in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "Begin"]):
            subprocess.run(["git", *arguments], cwd=root, check=True)
        return root

    return make


@pytest.fixture
def wait_for():
    """The function `wait_for(condition)` that returns its first value that is true, within five minutes."""

    def wait(condition):
        for _ in range(30_000):
            value = condition()
            if value:
                return value
            time.sleep(0.01)
        raise AssertionError("nothing happened for five minutes")

    return wait


@pytest.fixture
def recorder(tmp_path, monkeypatch):
    """The function `recorder(name, body="")` that puts a stand-in for a program on the PATH.

    It appends its arguments, quoted for a shell, to the file that `recorder.calls` reads, then runs `body`.
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
