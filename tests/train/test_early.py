"""Early stopping: when a run ends, what it leaves behind, and that a resumed run ends alike."""

import json
import os
import signal

import numpy as np
import pytest

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.errors import UserError
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.train.early import EarlyStopping
from cnx2_jax.train.loop import fit
from experiments import chaos
from tests.tiny_task import TinyTask

# The evaluation of the tiny task is best before it has learnt anything. Every two steps:
SETTINGS = ("eval_epochs=0.1666", "early_stopping_patience=3", "keep_checkpoints=1", "checkpoint_steps=3")


@pytest.fixture(scope="module", autouse=True)
def all_compile_quickly(compile_quickly):
    """Runs of a few steps."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, all_compile_quickly):
    """The workdir and the result of a run that stopped early."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, fit(TinyTask(*SETTINGS), workdir)


def evaluations(*values):
    return [{"step": 10 * place, "accuracy": value} for place, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("end", "values", "over"),
    [
        ("max", (), False),
        ("max", (0.1,), False),
        ("max", (0.5, 0.4, 0.4), True),
        ("max", (0.5, 0.4, 0.6), False),
        ("max", (0.5, 0.4, 0.6, 0.5, 0.59), True),
        ("max", (0.5, 0.5, 0.5), True),  # as good is not better
        ("max", (float("nan"), 0.5, 0.6), False),
        ("min", (0.5, 0.4, 0.4), False),
        ("min", (0.5, 0.6, 0.6), True),
        ("min", (float("nan"), float("nan"), float("nan")), True),
    ],
)
def test_patience_counts_evaluations_since_the_best(end, values, over):
    assert EarlyStopping("accuracy", end, 2).reached(evaluations(*values)) is over
    assert not EarlyStopping("accuracy", end, 0).reached(evaluations(*values))


def test_the_reason_names_metric_value_and_epoch():
    stopping = EarlyStopping("accuracy", "max", 2)
    assert stopping.reason(evaluations(0.5, 0.93, 0.9, 0.91), images=100, batch=60) == (
        "stopped early: accuracy has not improved on 0.93 (epoch 12) for 2 evaluations"
    )


def test_a_run_ends_early_and_its_best_checkpoint_is_its_result(undisturbed, tmp_path, capsys):
    assert fit(TinyTask(*SETTINGS), tmp_path)["step"] == 2
    said = capsys.readouterr().err
    assert "stopped early: loss has not improved on" in said and "(epoch 0.1667) for 3 evaluations" in said
    rows = read_metrics(tmp_path / "metrics.jsonl")
    found = [row for row in rows if row["split"] == "val"]
    assert [row["step"] for row in found] == [2, 4, 6, 8]
    assert undisturbed[1] == {"step": 2, "loss": found[0]["loss"]}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "8"]

    assert checkpoint.find(tmp_path).name == "8"
    (tmp_path / "result.json").write_text(json.dumps(undisturbed[1]))  # as the command does
    assert checkpoint.find(tmp_path) == tmp_path / "checkpoints" / "2"
    for text in ('{"step": 5}', "{", "[]"):
        (tmp_path / "result.json").write_text(text)
        assert checkpoint.find(tmp_path).name == "8"

    # The same command trains no further, and has the same result.
    task = TinyTask(*SETTINGS)
    task.data.before = lambda step: pytest.fail(f"trains on after step {step}") if step > 8 else None
    assert fit(task, tmp_path) == undisturbed[1]
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


@pytest.mark.parametrize("broken", [3, 5, 7])
def test_a_run_that_broke_off_ends_where_an_undisturbed_one_does(undisturbed, broken, tmp_path):
    def breaks(step):
        if step == broken:
            raise InterruptedError

    task = TinyTask(*SETTINGS)
    task.data.before = breaks
    with pytest.raises(InterruptedError):
        fit(task, tmp_path)
    assert fit(TinyTask(*SETTINGS), tmp_path) == undisturbed[1]
    results = []
    for workdir in (tmp_path, undisturbed[0]):
        params = checkpoint.read_params(workdir / "checkpoints" / "8")
        results.append((params, chaos.read_rows(workdir)))
    (ours, our_rows), (theirs, their_rows) = results
    assert our_rows == their_rows
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])


def test_an_evaluation_that_its_checkpoint_lacks_still_chooses_the_best(tmp_path):
    """The run died after it wrote the evaluation and before it saved the checkpoint again, with it."""

    def breaks(step):
        if step == 4:
            raise InterruptedError

    task = TinyTask("checkpoint_steps=3", "keep_checkpoints=1")
    task.data.before = breaks
    with pytest.raises(InterruptedError):
        fit(task, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "split": "val", "loss": -1.0}) + "\n")
    (tmp_path / "result.json").write_text('{"step": 3}')  # left by an earlier run
    assert fit(TinyTask("checkpoint_steps=3", "keep_checkpoints=1"), tmp_path)["step"] == 12
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "3"]
    assert not (tmp_path / "result.json").exists()


def test_a_signal_after_an_evaluation_does_not_end_the_run(tmp_path, capsys):
    task = TinyTask("eval_epochs=0.1666")
    evaluate = task.evaluate

    def signalled(model, batches):
        metrics = evaluate(model, batches)
        os.kill(os.getpid(), signal.SIGTERM)
        return metrics

    task.evaluate = signalled
    assert fit(task, tmp_path) is None
    assert "stopped after step 2 of 12; the same command resumes there" in capsys.readouterr().err
    assert fit(TinyTask("eval_epochs=0.1666"), tmp_path)["step"] == 12


def test_patience_without_evaluations_is_refused():
    with pytest.raises(UserError, match="early_stopping_patience 3 counts evaluations, and eval_epochs is 0"):
        TinyTask("early_stopping_patience=3")
