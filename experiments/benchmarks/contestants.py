"""Times contestants in turns, each in a process of its own.

Separate processes keep thread pools and memory apart; taking turns exposes every contestant to the same
noise.
"""

import contextlib
import ctypes
import dataclasses
import importlib
import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from pathlib import Path

from cnx2_jax.errors import RunError

TRAIN, FORWARD, CLASSIFY = "train step", "forward", "classification forward"
PEERS = ("eager", "compile")  # modes of PyTorch
WARMUP = 2

Programs = dict[str, Callable[[], None]]
Facts = dict[str, dict]  # of some programs: what `Measurement` holds beside the seconds


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to run a model.

    Attributes:
      build: a module's function that makes the programs, and what is known of them, in a new process.
      library: `jax` or `torch`.
      variant: such as `atto`.
      mode: what `build` distinguishes; for torch `eager` or `compile`.
      batch: images.
      image_size: pixels along both sides.
      programs: some of TRAIN (loss, gradient, AdamW), FORWARD (loss) and CLASSIFY.
    """

    build: Callable[["Contestant"], tuple[Programs, Facts]]
    library: str
    variant: str
    mode: str
    batch: int = 8
    image_size: int = 224
    programs: tuple[str, ...] = (TRAIN, FORWARD, CLASSIFY)

    @property
    def name(self) -> str:
        return f"{self.library} {self.mode}"


@dataclasses.dataclass
class Measurement:
    """One program: seconds of every round, the process's memory, and for JAX the compiler's time and figures.

    `peak_bytes` is what the process holds at most while the program runs, beyond what it held before it built
    the programs; None where the system does not tell.
    """

    contestant: Contestant
    program: str
    seconds: list[float]
    compile_seconds: float | None = None
    temp_bytes: int | None = None
    flops: float | None = None
    peak_bytes: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def record(self) -> dict:
        """Returns the measurement as JSON, with its median and quartiles."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        values = dataclasses.asdict(self) | {"median": self.median, "quartiles": [low, high]}
        del values["contestant"]["build"]
        return {key: value for key, value in values.items() if value is not None}


def measure(contestants: Iterable[Contestant], rounds: int, notice: Callable) -> list[Measurement]:
    """Runs all contestants' programs in turns.

    Args:
      contestants: the contestants; one that cannot start is skipped with a notice.
      rounds: turns of each program after warm-up.
      notice: called with lines of progress.

    Raises:
      RunError: the process of a contestant ended early.
    """
    with contextlib.ExitStack() as stack:
        measurements, connections = [], []
        for contestant in contestants:
            notice(f"starting {contestant.name}, {contestant.variant}")
            started = _start(contestant, stack)
            if isinstance(started, str):
                notice(f"skipped {contestant.name}, {contestant.variant}: {started}")
                continue
            connection, facts = started
            for program in contestant.programs:
                measurements.append(Measurement(contestant, program, [], **facts.get(program, {})))
                connections.append(connection)
        for turn in range(rounds):
            notice(f"round {turn + 1} of {rounds}")
            for measurement, connection in zip(measurements, connections, strict=True):
                connection.send(measurement.program)
                measurement.seconds.append(_receive(connection, measurement.contestant))
    return measurements


def _start(contestant: Contestant, stack: contextlib.ExitStack) -> tuple[Connection, dict] | str:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(contestant, theirs), daemon=True)
    process.start()
    theirs.close()
    stack.callback(process.join)
    stack.callback(ours.close)
    facts = _receive(ours, contestant)
    return facts if isinstance(facts, str) else (ours, facts)


def _receive(connection: Connection, contestant: Contestant):
    try:
        return connection.recv()
    except EOFError:
        raise RunError(f"the process of {contestant.name}, {contestant.variant} ended early") from None


def _serve(contestant: Contestant, connection: Connection) -> None:
    """Builds the programs and sends their figures, then runs a program per request and sends its time."""
    try:
        importlib.import_module(contestant.library)
        before = _resident()
        programs, facts = contestant.build(contestant)
        for name, run in programs.items():
            run()
            _forget_peak()
            for _ in range(WARMUP):
                run()
            peak = _resident("VmHWM")
            if before is not None and peak is not None:
                facts.setdefault(name, {})["peak_bytes"] = peak - before
    except ImportError as error:
        connection.send(f"{error}; the extra `parity` installs PyTorch")
        return
    except Exception:
        connection.send(traceback.format_exc().strip().splitlines()[-1])
        return
    connection.send(facts)
    with contextlib.suppress(EOFError):
        while True:
            run = programs[connection.recv()]
            begin = time.perf_counter()
            run()
            connection.send(time.perf_counter() - begin)


def _resident(line: str = "VmRSS") -> int | None:
    """Returns the bytes that this process holds, or with `VmHWM` the most it has held; None if unknown."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(found.split()[1]) for found in lines if found.startswith(f"{line}:"))


def _forget_peak() -> None:
    """Gives free memory back, such as what the compiler used, and starts to count the peak anew."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
