"""What a run lives through and what ends it with a line: bad numbers, full disks, damage, a hang."""

import os
import re
import resource
import shutil
import sys
import threading

import numpy as np
import pytest
from forked import Process
from tiny_task import TinyTask

from cnx2_jax.checkpoints import checkpoint, damage
from cnx2_jax.cli import main
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.observe.timing import TIMED
from cnx2_jax.train.loop import fit

pytestmark = pytest.mark.processes

SKIP = "on_nonfinite=skip"
ITEMS = ("opt_state", "params")


def params_at(workdir, step):
    params = checkpoint.read_params(workdir / "checkpoints" / str(step))
    return {name: np.asarray(value) for name, value in params.items()}


def rows(workdir):
    found = [row for row in read_metrics(workdir / "metrics.jsonl") if row["split"] == "train"]
    return [{name: value for name, value in row.items() if not TIMED.fullmatch(name)} for row in found]


def steps(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went well, with checkpoints 8, 10 and 12; not to be changed."""
    workdir = tmp_path_factory.mktemp("finished")
    fit(TinyTask(), workdir)
    assert steps(workdir) == ["10", "12", "8"]
    return workdir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it, to damage."""
    return shutil.copytree(finished, tmp_path / "run")


# Updates that are not finite.


def test_an_update_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(
        RunError, match="loss is nan at step 5; stopped before any checkpoint holds that update"
    ):
        fit(TinyTask(poisoned={5}), tmp_path)
    assert steps(tmp_path) == ["2", "4"]


def test_a_skipped_update_leaves_all_but_the_step_as_it_was(finished, tmp_path, capsys):
    task = TinyTask(SKIP, "checkpoint_steps=1", "keep_checkpoints=12", "ema_decay=0.9", poisoned={5, 6, 9})
    fit(task, tmp_path)
    assert "loss is nan at step 6: this update is skipped, 2 in a row, 2 in total" in capsys.readouterr().err
    bits = {}
    for step in range(3, 11):
        folder = tmp_path / "checkpoints" / str(step)
        bits[step] = [value.tobytes() for value in damage_free(folder)]
    assert bits[4] == bits[5] == bits[6]
    assert bits[8] == bits[9]
    for step in (3, 6, 7, 9):
        assert bits[step] != bits[step + 1]
    found = {row["step"]: row for row in rows(tmp_path)}
    assert [found[step]["skipped"] for step in range(1, 13)] == [0, 0, 0, 0, 1, 2, 2, 2, 3, 3, 3, 3]
    assert "loss" not in found[5] and found[7]["loss"] > 0
    rates = {row["step"]: row["learning_rate"] for row in rows(finished)}
    assert len(set(rates.values())) == 12
    for step, row in found.items():
        assert row["learning_rate"] == rates[step - row["skipped"]]


def damage_free(folder):
    """The arrays of parameters, their average and the optimizer's state."""
    import jax
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "ema", "opt_state"):
            yield from map(np.asarray, jax.tree.leaves(checkpointer.restore(folder / item)))


def test_a_run_without_bad_updates_is_the_same_with_and_without_skipping(finished, tmp_path):
    fit(TinyTask(SKIP), tmp_path)
    for name, value in params_at(finished, 12).items():
        np.testing.assert_array_equal(params_at(tmp_path, 12)[name], value)


def test_counts_of_skipped_updates_go_on_after_a_stop(tmp_path):
    """The run is cut between two bad updates, and stops at the third in a row as if it had not been."""

    def task():
        return TinyTask(SKIP, "max_nonfinite=3", "checkpoint_steps=1", poisoned={2, 6, 7, 8})

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    message = "loss is nan at step 8; stopped because 3 updates in a row were not finite"
    with pytest.raises(RunError, match=message):
        fit(task(), whole)

    stopping = task()
    stopping.data.before = lambda step: os.kill(os.getpid(), 15) if step == 6 else None
    assert fit(stopping, cut) is None
    assert steps(cut)[-1] == "7"
    with pytest.raises(RunError, match=message):
        fit(task(), cut)
    assert rows(cut) == rows(whole)
    assert [row["skipped"] for row in rows(cut)] == [0, 1, 1, 1, 1, 2, 3]


def test_a_run_may_begin_to_skip(tmp_path):
    with pytest.raises(RunError, match="at step 7"):
        fit(TinyTask(poisoned={7}), tmp_path)
    assert fit(TinyTask(SKIP, poisoned={7}), tmp_path)["step"] == 12
    assert rows(tmp_path)[-1]["skipped"] == 1


def test_other_policies_are_refused(tmp_path):
    with pytest.raises(UserError, match="unknown on_nonfinite 'skp'; did you mean 'skip'"):
        fit(TinyTask("on_nonfinite=skp"), tmp_path)


# Damaged checkpoints.


def cut_short(folder):
    for path in (folder / "opt_state").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lose_data(folder):
    for path in (folder / "params").rglob("d/*"):
        path.unlink()


def lose_item(folder):
    shutil.rmtree(folder / "opt_state")


def lose_metadata(folder):
    (folder / "params" / "_METADATA").unlink()


def empty_metadata(folder):
    (folder / "params" / "_METADATA").write_text("")


def lose_card(folder):
    (folder / "card" / "metadata").unlink()


def lose_all(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = [cut_short, lose_data, lose_item, lose_metadata, empty_metadata, lose_card, lose_all]


def test_a_whole_checkpoint_has_no_flaw(finished):
    assert damage.flaw(finished / "checkpoints" / "12", ITEMS) is None


@pytest.mark.parametrize("harm", DAMAGE, ids=lambda harm: harm.__name__)
def test_damage_is_set_aside_and_the_checkpoint_before_is_used(harm, run, capsys):
    harm(run / "checkpoints" / "12")
    assert damage.latest_whole(run / "checkpoints", ITEMS) == 10
    assert steps(run) == ["10", "8", "damaged-12"]
    assert "warning: checkpoint 12 is damaged" in capsys.readouterr().err


def test_a_damaged_run_goes_on_to_the_same_end(finished, run, capsys):
    cut_short(run / "checkpoints" / "12")
    lose_all(run / "checkpoints" / "10")
    assert fit(TinyTask(), run)["step"] == 12
    said = capsys.readouterr().err
    assert "checkpoint 12 is damaged" in said and "checkpoint 10 is damaged" in said
    assert "resuming after step 8" in said
    assert steps(run) == ["10", "12", "8", "damaged-10", "damaged-12"]
    assert rows(run) == rows(finished)
    for name, value in params_at(finished, 12).items():
        np.testing.assert_array_equal(params_at(run, 12)[name], value)

    # A second damage of the same step finds another name.
    cut_short(run / "checkpoints" / "12")
    fit(TinyTask(), run)
    assert {"damaged-12", "damaged-12-2"} < set(steps(run))


def test_a_run_never_begins_anew_because_all_is_damaged(run):
    for step in ("8", "10", "12"):
        cut_short(run / "checkpoints" / step)
    for _ in range(2):
        with pytest.raises(UserError, match=r"all checkpoints in .* are damaged: damaged-10, damaged-12"):
            fit(TinyTask(), run)
    assert steps(run) == ["damaged-10", "damaged-12", "damaged-8"]


def test_who_reads_a_damaged_checkpoint_is_told_of_another(run):
    lose_data(run / "checkpoints" / "12")
    with pytest.raises(UserError, match=r"cannot be read: .*; give another one, .*checkpoints/10") as raised:
        checkpoint.read_params(checkpoint.find(run))
    assert "checkpoints/12'" in str(raised.value)


# What cannot be written.


def test_a_full_disk_ends_the_run_and_spares_what_was_saved(finished, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    task = TinyTask()

    def fill(step):
        # No file may grow beyond this from here on: what a full disk does, but for all users.
        if step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))

    task.data.before = fill
    try:
        with pytest.raises(
            RunError, match=r"cannot (save|write) to .*; checkpoints saved before are"
        ) as raised:
            fit(task, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(raised.value)
    assert not [name for name in steps(tmp_path) if name.isdigit() and int(name) > 8]
    assert damage.latest_whole(tmp_path / "checkpoints", ITEMS) in (4, 6)
    # Orbax's threads end with the process; here they may still clear away what the next run clears away.
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            threading.Thread.join(thread, timeout=20)  # their own raises what they died of
    assert fit(TinyTask(), tmp_path)["step"] == 12
    for name, value in params_at(finished, 12).items():
        np.testing.assert_array_equal(params_at(tmp_path, 12)[name], value)


def test_a_save_that_fails_in_the_background_is_no_secret(tmp_path):
    """Only checkpoints meet the limit: the rows of metrics.jsonl stay below it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        task = TinyTask("log_steps=1000", "total_steps=3", ballast=50_000)
        with pytest.raises(RunError, match="cannot save to"):
            fit(task, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [name for name in steps(tmp_path) if name.isdigit()]


def test_a_place_where_checkpoints_cannot_be(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match=r"cannot save to '.*checkpoints': "):
        fit(TinyTask(), tmp_path)
    assert (tmp_path / "checkpoints").read_text() == "a file"


# A hang.

HANG = """
import sys, time
from pathlib import Path
from tiny_task import TinyTask
from cnx2_jax.train.loop import fit

def sleeps_for_ever(step):
    while step == 5:
        time.sleep(1)

task = TinyTask("hang_seconds=3")
task.data.before = sleeps_for_ever
fit(task, Path(sys.argv[1]))
"""


def test_a_hang_shows_where_it_is_and_ends(tmp_path):
    process = Process(["-c", HANG, tmp_path])
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert re.search(r"cnx2: stopped: no progress for \d+ s \(hang_seconds 3\)", err)
    for text in (err, (tmp_path / "stacks-0.txt").read_text()):
        assert "sleeps_for_ever" in text and "in fit" in text
    assert fit(TinyTask(), tmp_path)["step"] == 12


# The options of several processes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--coordinator", "a:1"], "--num-processes and --process-id must be given too"),
        (["--process-id", "0"], "--coordinator and --num-processes must be given too"),
        (["--coordinator", "a", "--num-processes", "2", "--process-id", "0"], "'a' must be HOST:PORT"),
        (["--coordinator", "a:99999", "--num-processes", "2", "--process-id", "0"], "must be HOST:PORT"),
        (["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"], "--process-id 2 with"),
        (["--coordinator", "a:1", "--num-processes", "0", "--process-id", "0"], "--num-processes 0"),
        (["--heartbeat-seconds", "1"], "--heartbeat-seconds 1 must be at least 2"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "evaluate"])
def test_options_that_make_no_sense(verb, options, message, tmp_path, capsys):
    config = ["--config", "configs/pretrain.py:digits"] if verb == "train" else []
    assert main([verb, *config, "--workdir", str(tmp_path / "run"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("hosts", [None, "host-0,host-1"])
def test_a_kubernetes_job_without_the_extra(hosts, tmp_path, monkeypatch, capsys):
    """Pods with TPUs find each other without it."""
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES", raising=False)  # preflight sets it for this process
    if hosts:
        monkeypatch.setenv("TPU_WORKER_HOSTNAMES", hosts)
    assert main(["evaluate", "--workdir", str(tmp_path / "run")]) == 2
    needed = "an indexed Kubernetes job needs pip install" in capsys.readouterr().err
    assert needed == (hosts is None)
