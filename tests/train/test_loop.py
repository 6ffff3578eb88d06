"""Runs in this process: what a run leaves behind, and what stops it."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from tiny_task import TinyTask

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.cli import main
from cnx2_jax.configuration import load_config
from cnx2_jax.errors import RunError, UserError
from cnx2_jax.models.state import split
from cnx2_jax.observe import flops
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.tasks import make_task, weights
from cnx2_jax.train.loop import fit

SMALL = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(4,8,8,16)",
    "--config.image_size=16",
    "--config.batch_size=16",
    "--config.total_steps=8",
    "--config.log_steps=3",
    "--config.checkpoint_steps=2",
    "--config.eval_epochs=0",
]


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Runs of a few steps: fast code would take longer to compile than it saves."""


def small(recipe, *overrides):
    return make_task(load_config(f"configs/{recipe}", [*SMALL, *overrides]))


def test_a_pretraining_run_leaves_what_the_readme_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(flops.PEAKS, jax.devices()[0].device_kind, 1e12)
    metrics = fit(small("pretrain.py:digits"), tmp_path)
    assert metrics["step"] == 8
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["split"]) for row in rows] == [
        (3, "train"), (6, "train"), (8, "train"), (8, "val"),
    ]  # fmt: skip
    assert rows[0].keys() == {
        "step", "split", "loss", "grad_norm", "update_norm", "learning_rate", "images_per_sec",
        "goodput", "data_wait", "step_seconds_p50", "step_seconds_p90", "step_seconds_p99",
        "flop_utilisation",
    }  # fmt: skip
    assert 0 < rows[1]["goodput"] < 1 and 0 <= rows[1]["data_wait"] <= 1
    # What an image costs is no matter of time.
    costs = [1e12 * row["flop_utilisation"] / row["images_per_sec"] for row in rows[:3]]
    assert costs == pytest.approx([costs[0]] * 3, rel=1e-4) and 1e4 < costs[0] < 1e7
    assert metrics["loss"] == rows[-1]["loss"]
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 16
    # The latest two; the best is the last, for it alone was evaluated.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["6", "8"]
    assert Image.open(tmp_path / "reconstructions" / "00000008.png").size[0] > 300
    assert list((tmp_path / "tensorboard").iterdir())
    said = capsys.readouterr().err
    assert "1,438 images" in said
    assert "step 8/8 (100%)" in said
    assert "% of peak FLOP/s" in said


def test_the_best_checkpoint_outlives_later_ones(tmp_path):
    # The evaluation of the tiny task is best before it has learnt anything. Every two steps:
    fit(TinyTask("total_steps=8", "eval_epochs=0.1666", "keep_checkpoints=1"), tmp_path)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["split"] == "val"]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    best = min(rows, key=lambda row: row["loss"])["step"]
    assert best < 8, rows
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [best, 8]


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_a_checkpoint(tmp_path):
    overrides = [
        "optimizer.base_learning_rate=1e39",
        "optimizer.warmup_epochs=0",
        "total_steps=20",
        "checkpoint_steps=1",
    ]
    with pytest.raises(RunError, match=r"(loss|grad_norm|update_norm) is (nan|inf) at step (\d+)") as stopped:
        fit(TinyTask(*overrides), tmp_path)
    step = int(str(stopped.value).partition("at step ")[2].partition(";")[0])
    assert all(np.isfinite(row["loss"]) for row in read_metrics(tmp_path / "metrics.jsonl"))
    for folder in (tmp_path / "checkpoints").iterdir():
        assert int(folder.name) < step
        params = checkpoint.read_params(folder)
        assert all(np.isfinite(value).all() for value in params.values())

    # The same command meets the same end, and leaves what is there alone.
    before = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    with pytest.raises(RunError):
        fit(TinyTask(*overrides), tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == before


def test_only_one_process_trains_in_a_workdir(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="is in use by another training process"):
        fit(TinyTask(), tmp_path)
    assert not list(tmp_path.iterdir())
    holder.kill()
    holder.wait()
    assert fit(TinyTask(), tmp_path)["step"] == 12


HOLD = """
import sys
from pathlib import Path
from cnx2_jax.train.loop import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_stop_during_an_evaluation_keeps_the_best_checkpoint_known(tmp_path, monkeypatch):
    task = TinyTask()
    evaluate = task.evaluate

    def interrupted(model, batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(model, batches)

    monkeypatch.setattr(task, "evaluate", interrupted)
    assert fit(task, tmp_path) is None
    assert (tmp_path / "checkpoints" / "12").is_dir()
    assert not (tmp_path / "checkpoints" / "12" / "metrics").exists()
    assert fit(TinyTask(), tmp_path)["loss"] > 0
    assert (tmp_path / "checkpoints" / "12" / "metrics").exists()


def test_averaged_parameters_have_an_evaluation_of_their_own(tmp_path, capsys):
    task = small("finetune.py:digits", "--config.ema_decay=0.5", "--config.total_steps=4")
    metrics = fit(task, tmp_path)
    assert {"accuracy", "loss", "ema_accuracy", "ema_loss"} <= metrics.keys()
    assert metrics["ema_loss"] != metrics["loss"]
    assert "the best checkpoint by ema_accuracy is" in capsys.readouterr().err
    # The command reads both from the checkpoint, and gets the same.
    assert main(["evaluate", "--workdir", str(tmp_path)]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    expected = {name: value for name, value in metrics.items() if name != "step"}
    assert {name: again[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    # What is used from then on is the average.
    folder = checkpoint.find(tmp_path)
    model, _, _ = weights.load(tmp_path)
    params = checkpoint.read_params(folder, averaged=False)
    averaged = split(model)[1]
    assert (averaged["head.kernel"] != params["head.kernel"]).any()
    start = weights.starting_params(tmp_path, task.config, params)
    np.testing.assert_array_equal(start["head.kernel"], averaged["head.kernel"])


def test_a_trace_of_some_updates(tmp_path):
    fit(TinyTask("profile_steps=3:4"), tmp_path)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    with pytest.raises(UserError, match="profile_steps '4:3' must be FIRST:LAST"):
        fit(TinyTask("profile_steps=4:3"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
