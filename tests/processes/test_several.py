"""Runs of several real processes: the same as of one, whatever becomes of them."""

import json
import re
import signal
import socket
import time

import numpy as np
import pytest
from forked import Process

from cnx2_jax.launch.local import free_port
from experiments import chaos

pytestmark = pytest.mark.processes

STEPS = 24
SMALL = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(4,8,8,16)",
    "--config.image_size=16",
    "--config.batch_size=16",
    f"--config.total_steps={STEPS}",
    "--config.log_steps=1",
    "--config.checkpoint_steps=5",
    "--config.eval_epochs=0.134",  # every 12 steps
    "--config.ema_decay=0.9",
]
HEARTBEAT = 8


def start(*commands, **variables):
    """Starts Python programs, all at once."""
    return [
        Process(command, **variables, **own)
        for command, own in (c if isinstance(c, tuple) else (c, {}) for c in commands)
    ]


def among(count, port=None):
    """The options of `count` processes."""
    if count == 1:
        return [[]]
    place = ["--coordinator", f"127.0.0.1:{port or free_port()}", "--heartbeat-seconds", HEARTBEAT]
    return [[*place, "--num-processes", count, "--process-id", index] for index in range(count)]


def cnx2(count, verb, *arguments):
    return start(*(["-m", "cnx2_jax.cli", verb, *arguments, *options] for options in among(count)))


def train(count, workdir, *overrides):
    recipe = ["--config", "configs/finetune.py:digits", "--workdir", workdir]
    return cnx2(count, "train", *recipe, *SMALL, *overrides)


def finish(processes):
    """Waits; returns (status, out, err) of each."""
    ends = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        ends.append((process.returncode, out, err))
    return ends


def metrics_of(ends):
    assert [status for status, _, _ in ends] == [0] * len(ends), ends
    assert not any("{" in out for _, out, _ in ends[1:])  # one of them tells
    return json.loads(ends[0][1].splitlines()[-1])


def wait_for_rows(workdir, count, processes):
    path = workdir / "metrics.jsonl"
    until = time.monotonic() + 200
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < until
        time.sleep(0.005)


def arrays(workdir):
    return chaos.read_arrays(workdir / "checkpoints" / str(STEPS), ("params", "opt_state", "ema"))


def assert_alike(workdir, reference, tolerance=1e-5):
    ours, theirs = chaos.read_rows(workdir), chaos.read_rows(reference)
    assert [(row["step"], row["split"]) for row in ours] == [(row["step"], row["split"]) for row in theirs]
    for row, other in zip(ours, theirs, strict=True):
        numbers, others = ({k: v for k, v in r.items() if k != "split"} for r in (row, other))
        assert numbers == pytest.approx(others, abs=tolerance, rel=tolerance)
    ours, theirs = arrays(workdir), arrays(reference)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=tolerance, err_msg=name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    return workdir, metrics_of(finish(train(1, workdir)))


def test_a_run_stopped_on_two_processes_and_finished_by_one(alone, tmp_path):
    reference, expected = alone
    workdir = tmp_path / "run"
    processes = train(2, workdir)
    wait_for_rows(workdir, 6, processes)
    processes[1].send_signal(signal.SIGTERM)  # one of them is told, and not the one that writes
    ends = finish(processes)
    assert [status for status, _, _ in ends] == [0, 0], ends
    said = re.search(r"stopped after step (\d+) of 24; the same command resumes", ends[0][2])
    stopped = int(said[1])
    assert 6 <= stopped < STEPS
    assert max(int(path.name) for path in (workdir / "checkpoints").iterdir()) == stopped
    assert not any("{" in out or "Traceback" in err for _, out, err in ends)

    ends = finish(train(1, workdir))
    assert f"resuming after step {stopped}" in ends[0][2]
    assert metrics_of(ends) == pytest.approx(expected, abs=1e-5)
    assert_alike(workdir, reference)


def test_a_run_begun_by_one_and_finished_on_two_is_evaluated_on_two(alone, tmp_path):
    reference, expected = alone
    workdir = tmp_path / "run"
    processes = train(1, workdir)
    wait_for_rows(workdir, 8, processes)
    processes[0].send_signal(signal.SIGTERM)
    assert finish(processes)[0][0] == 0
    # Each of them holds a half of every kernel, where the one had them all.
    halves = ["--config.mesh.data=1", "--config.mesh.fsdp=2"]
    assert metrics_of(finish(train(2, workdir, *halves))) == pytest.approx(expected, abs=1e-5)
    assert_alike(workdir, reference)

    found = metrics_of(finish(cnx2(2, "evaluate", "--workdir", workdir)))
    assert {name: found[name] for name in expected if name != "step"} == pytest.approx(
        {name: value for name, value in expected.items() if name != "step"}, abs=1e-6
    )


def test_a_kill_changes_nothing(tmp_path):
    options = ["--kills", 1, "--steps", 24, "--seed", 1, "--out", tmp_path / "chaos"]
    ((status, out, err),) = finish(start(["-m", "experiments.chaos", *options]))
    assert status == 0, (out, err)
    assert json.loads(out.splitlines()[-1])["kills"] == 1
    assert len(re.findall(r"^\| \d+ +\|", out, re.MULTILINE)) == 1


JOINED = """
import argparse, sys, time
from cnx2_jax.errors import UserError
from cnx2_jax.cluster import processes

if __name__ == "__main__":
    what, *options = sys.argv[1:]
    parser = argparse.ArgumentParser()
    processes.add_arguments(parser)
    processes.CONNECT_SECONDS = 4 if what == "alone" else 100
    with processes.joined(parser.parse_args(options)):
        import jax
        from jax.experimental.multihost_utils import process_allgather
        index = jax.process_index()
        gathered = process_allgather(jax.numpy.int32(index))
        print("joined", flush=True)
        if what == "count":
            print(index, jax.process_count(), gathered.tolist())
        if what == "fail" and index == 1:
            raise UserError("image 'x.png' cannot be read")
        if what == "vanish" and index == 1:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "vanish":
            process_allgather(jax.numpy.int32(index))
        if what in ("fail", "freeze"):
            time.sleep(100)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "joined.py"
    path.write_text(JOINED)
    return path


def together(program, what, count=2):
    return start(*([program, what, *options] for options in among(count)))


def test_when_one_process_fails_the_others_say_so_and_end_alike(program):
    (first, _, said), (second, _, own) = finish(together(program, "fail"))
    assert (first, second) == (2, 2)
    assert re.search(r"stopped: process 1 \(\S+, pid \d+\) of 2 failed: image 'x.png' cannot be read", said)
    assert "cnx2: error: image 'x.png' cannot be read" in own


def test_a_process_that_vanishes_is_named(program):
    (first, _, said), (second, _, _) = finish(together(program, "vanish"))
    assert (first, second) == (1, -signal.SIGKILL)
    assert re.search(r"stopped: process 1 \(\S+, pid \d+\) of 2 disappeared; give the same command", said)
    assert "Traceback" not in said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_frozen_host_ends_the_others_in_bounded_time(program, victim):
    processes = together(program, "freeze")
    for process in processes:
        while "joined" not in process.said[0]:
            assert process.poll() is None
            time.sleep(0.01)
    processes[victim].send_signal(signal.SIGSTOP)  # as silent as a machine without power
    other = processes[1 - victim]
    _, said = other.communicate(timeout=90)
    processes[victim].send_signal(signal.SIGKILL)
    processes[victim].communicate()
    assert other.returncode != 0
    expected = r"process 1 \(\S+, pid \d+\) of 2 disappeared" if victim else "process 0 of 2 is gone"
    assert re.search(expected, said)


def test_processes_that_do_not_come_together_say_so(program):
    one, two = among(2)
    ends = finish(start([program, "alone", *one], [program, "alone", *two[:1], "127.0.0.1:9", *two[2:]]))
    for status, _, said in ends:
        assert status == 1
        assert re.search(r"all 2 processes at \S+ did not connect within 4 s", said)


def test_a_coordinator_port_that_is_taken(program):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = server.getsockname()[1]
        (end,) = finish(start([program, "count", *among(2, port)[0]]))
    assert "cannot be opened" in end[2]


def test_slurm_is_found_by_itself(program):
    shared = {
        "SLURM_JOB_ID": str(free_port()),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    tasks = [
        ([program, "count"], {**shared, "SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)})
        for index in range(2)
    ]
    ends = finish(start(*tasks))
    assert [out.splitlines()[-1] for _, out, _ in ends] == ["0 2 [0, 1]", "1 2 [0, 1]"], ends


def test_open_mpi_is_found_by_itself(program):
    # The job's number, of which JAX makes the port that all meet at, and an address of the first host.
    shared = {
        "OMPI_MCA_orte_hnp_uri": f"{free_port() << 12}.0;tcp://127.0.0.1:{free_port()}",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    ranks = [
        ([program, "count"], {**shared, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank})
        for rank in ("0", "1")
    ]
    ends = finish(start(*ranks))
    assert [out.splitlines()[-1] for _, out, _ in ends] == ["0 2 [0, 1]", "1 2 [0, 1]"], ends


def test_one_process_waits_for_nobody(program):
    ((status, out, err),) = finish(start([program, "count"], SLURM_NTASKS=1, SLURM_PROCID=0))
    assert (status, out.split()) == (0, ["joined", "0", "1", "[0]"]), err
