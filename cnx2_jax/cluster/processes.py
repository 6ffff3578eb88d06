"""Connects the processes of a run, before anything touches a device."""

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

from cnx2_jax.cluster.peers import PeerWatch
from cnx2_jax.errors import RunError, UserError, report

CONNECT_SECONDS = 300  # all processes of a run must start within this time
JAX_EXTRA_SECONDS = 15  # JAX waits this much longer for a heartbeat than we do
SHUTDOWN_SECONDS = 60  # a finished process waits this long for the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that give the number of processes and the index of this one."""
    group = parser.add_argument_group(
        "several processes",
        "On a TPU pod, under Slurm or Open MPI, and in an indexed Kubernetes job, processes find each other; "
        "elsewhere give the first three options.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="the address at which process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--heartbeat-seconds",
        type=int,
        default=60,
        metavar="N",
        help="time without a heartbeat after which the other processes end; 60 by default",
    )


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Runs the block as one process of several, if the options or the environment say so.

    When one process fails or disappears, all end: with its exit status, or 1, and a line that names it. With
    one process this does nothing.

    Raises:
      UserError: some of the three options are missing, or a value is out of range.
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


def _watch(args: argparse.Namespace) -> PeerWatch | None:
    index, count = jax.process_index(), jax.process_count()
    return PeerWatch(index, count, args.heartbeat_seconds) if count > 1 else None


def is_first() -> bool:
    """Whether this is process 0, which prints and writes for all."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def share() -> dict[str, int]:
    """Returns this process's share of every batch, as keyword arguments for the data readers."""
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
        starter = _environment()
        if starter is None:
            return False
        with _time_limit(f"the processes that {starter} started"):
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
            f"--process-id {index} with --num-processes {count}: the ids of N processes are 0 to N - 1"
        )
    if index == 0:
        _check_free(int(port))
    with _time_limit(f"all {count} processes at {args.coordinator}"):
        _initialize(
            args,
            coordinator_address=args.coordinator,
            num_processes=count,
            process_id=index,
            cluster_detection_method="deactivate",
        )
    return True


def _initialize(args: argparse.Namespace, **options) -> None:
    # peers.Agreement decides where to stop. JAX's preemption service would take SIGTERM away from every
    # command, and Orbax queries it about past steps, which breaks its count of steps.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **options,
        # Both limits are longer than ours: at its own limits JAX aborts with a C++ stack trace.
        initialization_timeout=CONNECT_SECONDS + 60,
        heartbeat_timeout_seconds=args.heartbeat_seconds + JAX_EXTRA_SECONDS + args.heartbeat_seconds // 4,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )


@contextlib.contextmanager
def _time_limit(whom: str) -> Iterator[None]:
    """Ends the process with one line if the block, which cannot be interrupted, takes too long."""

    def give_up() -> None:
        error = RunError(
            f"{whom} did not connect within {CONNECT_SECONDS} s; check that all were started with the "
            "same --coordinator and --num-processes, and that they can reach that port"
        )
        status = report(error)
        sys.stderr.flush()
        os._exit(status)

    timer = threading.Timer(CONNECT_SECONDS, give_up)
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
                    f"port {port} of --coordinator cannot be opened: {error.strerror}; choose another port"
                ) from None


def _environment() -> str | None:
    """Returns the name of the scheduler that started this process as one of several, or None.

    JAX reads the details. We call it only if there are some: otherwise it searches the network for them.
    """
    environment = os.environ
    if int(environment.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in environment:
        return "Slurm"
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    indexed = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    if indexed and "TPU_WORKER_HOSTNAMES" not in environment:  # GKE sets it in pods with TPUs
        if importlib.util.find_spec("kubernetes") is None:
            raise UserError("an indexed Kubernetes job needs pip install 'cnx2_jax[kubernetes]'")
        return "Kubernetes"
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    wanted = environment.get("JAX_PLATFORMS", "tpu")
    if devices and "tpu" in wanted and importlib.util.find_spec("libtpu") is not None:
        return "the TPU runtime"
    return None
