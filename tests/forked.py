"""Processes that start with everything imported, because importing takes half of a small run's time.

`Process` starts a Python program as `subprocess.Popen` does: with a process, pipes, signals and an exit
status of its own. But it is forked from a server that has imported JAX, Orbax and TensorFlow, and has started
nothing. tests/test_cli.py and tests/test_package.py start theirs from nothing, as users do.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

MODULES = (
    "cnx2_jax.commands.train",
    "cnx2_jax.commands.evaluate",
    "cnx2_jax.data.tensorflow",
    "jax.experimental.multihost_utils",
    "sklearn.datasets",
)
# Modules read these variables when they are imported: programs that differ in them need servers of their own.
READ_AT_IMPORT = ("EPATH_", "JAX_", "TF_")
ROOT = Path(__file__).resolve().parents[1]

# Processor seconds of all programs that have ended, for cpu_seconds.py.
spent = 0.0
_servers: dict[str, socket.socket] = {}


class Process:
    """A Python program that runs.

    Args:
      arguments: what follows `python` in a command: `-m MODULE ...`, `-c CODE ...` or `FILE ...`.
      **variables: environment variables beside those of this process.

    Attributes:
      pid: its number.
      said: what it has written so far, whole lines, to standard output and to standard error.
      returncode: its exit status, negative for a signal; None until its end has been asked for.
    """

    def __init__(self, arguments: Sequence[object], **variables: object):
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        message = json.dumps([list(map(str, arguments)), environment]).encode()
        (out, child_out), (err, child_err), (status, child_status) = pipes = [os.pipe() for _ in range(3)]
        socket.send_fds(_server(environment), [message], [child_out, child_err, child_status])
        for _, child_end in pipes:
            os.close(child_end)
        self._status = os.fdopen(status)
        self.said = ["", ""]
        self._readers = [
            threading.Thread(target=self._read, args=each, daemon=True) for each in enumerate((out, err))
        ]
        for reader in self._readers:
            reader.start()
        self.returncode: int | None = None
        self.pid = int(self._status.readline())

    def _read(self, index: int, pipe: int) -> None:
        with os.fdopen(pipe) as file:
            for line in file:
                self.said[index] += line

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired if it still runs after `timeout` seconds."""
        global spent
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            status, seconds = self._status.readline().split()
            self._status.close()
            self.returncode, spent = int(status), spent + float(seconds)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for its end; returns standard output and standard error."""
        self.wait(timeout)
        for reader in self._readers:
            reader.join()
        return self.said[0], self.said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def _server(environment: dict[str, str]) -> socket.socket:
    """Returns the way to the server with these variables; starts it the first time."""
    key = json.dumps({name: environment[name] for name in environment if name.startswith(READ_AT_IMPORT)})
    if key not in _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            cwd=ROOT,
            env=environment | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        atexit.register(ours.close)  # which ends the server
        _servers[key] = ours
    return _servers[key]


def _serve(channel: socket.socket) -> None:
    """Forks for each message; returns in a process that is to run a program, after preparing it."""
    for name in MODULES:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the guardians
    while True:
        message, pipes, _, _ = socket.recv_fds(channel, 1 << 20, 3)
        if not message:
            os._exit(0)
        if not os.fork():
            break
        for pipe in pipes:
            os.close(pipe)
    channel.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    out, err, status = pipes
    # A guardian waits for the program and tells how it ended.
    if pid := os.fork():
        os.close(out)
        os.close(err)
        os.write(status, f"{pid}\n".encode())
        _, end, usage = os.wait4(pid, 0)
        seconds = usage.ru_utime + usage.ru_stime
        os.write(status, f"{os.waitstatus_to_exitcode(end)} {seconds}\n".encode())
        os._exit(0)
    os.close(status)
    for pipe, number in ((out, 1), (err, 2)):
        os.dup2(pipe, number)
        os.close(pipe)
    arguments, environment = json.loads(message)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments


def _run() -> None:
    kind, *rest = sys.argv
    sys.path[0] = "" if kind in ("-m", "-c") else os.path.dirname(kind)
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    _run()
