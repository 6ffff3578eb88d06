"""How the processes of a run find each other, before anything touches a device."""

import argparse
import contextlib
import errno
import glob
import importlib.util
import os
import socket
import sys
import threading
from collections.abc import Iterator

import jax

from cnx2_jax.cluster.peers import Watch
from cnx2_jax.errors import RunError, UserError, report

MEETING_SECONDS = 300  # in which all processes of a run must have started
JAX_LATER_SECONDS = 15  # that JAX waits for a sign longer than we do
LEAVING_SECONDS = 60  # that a process that is done waits for the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which a process is told its place among others."""
    group = parser.add_argument_group(
        "several processes",
        "On a TPU pod, under Slurm or Open MPI, and in an indexed Kubernetes job processes find each other; "
        "elsewhere give the first three of these.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens for the others")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0 on")
    group.add_argument(
        "--heartbeat-seconds",
        type=int,
        default=60,
        metavar="N",
        help="how long a process may give no sign before the others end; 60 by default",
    )


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Runs what is inside as one process of several, if the options or the environment say so.

    When one of them fails or is gone, all end: with its exit status, or 1, and a line that names it. A
    process alone is not touched.

    Raises:
      UserError: some of the three options without the others, or values that make no sense.
    """
    if not _start(args):
        yield
        return
    watch = _watch(args)
    try:
        yield
    except BaseException as error:
        if watch is not None:
            watch.fail(error)
        raise
    if watch is not None:
        watch.leave()
    jax.distributed.shutdown()


def _watch(args: argparse.Namespace) -> Watch | None:
    index, count = jax.process_index(), jax.process_count()
    return Watch(index, count, args.heartbeat_seconds) if count > 1 else None


def is_first() -> bool:
    """Whether this process is the one that tells and writes what is one for all."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def share() -> dict[str, int]:
    """Returns which share of every batch is this process's, as the readers of batches take it."""
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}


def _start(args: argparse.Namespace) -> bool:
    options = {
        "--coordinator": args.coordinator,
        "--num-processes": args.num_processes,
        "--process-id": args.process_id,
    }
    missing = [name for name, value in options.items() if value is None]
    if not args.heartbeat_seconds >= 2:
        raise UserError(f"--heartbeat-seconds {args.heartbeat_seconds} must be at least 2")
    if len(missing) == len(options):
        place = _environment()
        if place is None:
            return False
        with _meeting(f"the processes that {place} started"):
            _initialize(args)
        return True
    if missing:
        raise UserError(f"{' and '.join(missing)} must be given too: the three options belong together")
    count, index = args.num_processes, args.process_id
    host, _, port = args.coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator '{args.coordinator}' must be HOST:PORT, such as 10.0.0.1:8476")
    if count < 1 or not 0 <= index < count:
        raise UserError(
            f"--process-id {index} with --num-processes {count}: ids are from 0 to one less than the number"
        )
    if index == 0:
        _check_free(int(port))
    with _meeting(f"all {count} processes at {args.coordinator}"):
        _initialize(
            args,
            coordinator_address=args.coordinator,
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate",
        )
    return True


def _initialize(args: argparse.Namespace, **place) -> None:
    # The loop agrees on where to stop by itself (peers.Agreement): JAX's service takes SIGTERM from every
    # command, and Orbax asks it about steps that are long past, which breaks its count of steps.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **place,
        # Longer than ours, as JAX would abort with a stack of C++ functions.
        initialization_timeout=MEETING_SECONDS + 60,
        # What JAX says when it misses a sign is another such stack: we look for signs ourselves, and before.
        heartbeat_timeout_seconds=args.heartbeat_seconds + JAX_LATER_SECONDS + args.heartbeat_seconds // 4,
        shutdown_timeout_seconds=LEAVING_SECONDS,
    )


@contextlib.contextmanager
def _meeting(whom: str) -> Iterator[None]:
    """Ends the process with one line if what is inside, which cannot be interrupted, takes too long."""

    def give_up() -> None:
        error = RunError(
            f"{whom} did not come together within {MEETING_SECONDS} s; check that all were started, with the "
            "same --coordinator and --num-processes, and reach that port"
        )
        status = report(error)
        sys.stderr.flush()
        os._exit(status)

    timer = threading.Timer(MEETING_SECONDS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check_free(port: int) -> None:
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise UserError(
                    f"port {port} of --coordinator cannot be opened: {error.strerror}; choose another one"
                ) from None


def _environment() -> str | None:
    """Names what started this process as one of several, if anything did.

    JAX reads the details; it is asked only where there are some, for it would look for them over the network.
    """
    environment = os.environ
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError("an indexed Kubernetes job needs pip install 'cnx2_jax[kubernetes]'")
        return "Kubernetes"
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = environment.get("JAX_PLATFORMS", "tpu")
    if devices and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None:
        return "the TPU runtime"
    return None
