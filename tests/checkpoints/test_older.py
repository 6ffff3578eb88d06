"""Runs that version 0.1.0 wrote: resumed to the end it reached, used, and refused if they are newer.

`golden/runs_0_1.tar.gz` holds a run of each task as version 0.1.0 left it: the checkpoint of step 3 of 6, and
the metrics of all 6 steps, which that version reached.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.cli import main
from cnx2_jax.errors import UserError
from cnx2_jax.observe.report import read_metrics
from cnx2_jax.observe.timing import TIMED

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compile_quickly")]

ARCHIVE = Path(__file__).parents[1] / "golden" / "runs_0_1.tar.gz"
RECIPES = {"classify": "finetune:digits", "pretrain": "pretrain:digits"}
# The overrides that both were started with.
SMALL = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(4,4,4,8)",
    "--config.image_size=16",
    "--config.batch_size=16",
    "--config.total_steps=6",
    "--config.log_steps=1",
    "--config.checkpoint_steps=3",
    "--config.keep_checkpoints=2",
    "--config.eval_epochs=0",
    "--config.ema_decay=0.5",
]
OF_TASK = {"classify": [], "pretrain": ["--config.model.decoder_dim=8"]}


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def rows(workdir):
    """The rows of a run, without those that are a matter of time."""
    return [
        {name: value for name, value in row.items() if name != "split" and not TIMED.fullmatch(name)}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


@pytest.mark.parametrize("task", RECIPES)
def test_an_old_run_resumes_to_the_same_end(old, task, capsys):
    expected = rows(old / task)
    assert [row["step"] for row in expected] == [1, 2, 3, 4, 5, 6, 6]
    command = ["train", "--config", RECIPES[task], "--workdir", str(old / task), *SMALL, *OF_TASK[task]]
    assert main(command) == 0
    assert "resuming after step 3" in capsys.readouterr().err
    found = rows(old / task)
    assert len(found) == len(expected)
    for row, before in zip(found, expected, strict=True):
        # Bit for bit where the processor is the one that made the archive.
        assert row == pytest.approx(before, rel=1e-4, abs=1e-6)


def test_an_old_checkpoint_predicts(old, capsys):
    Image.fromarray(np.full((8, 8), 99, np.uint8)).save(old / "digit.png")
    checkpoint_folder = old / "classify" / "checkpoints" / "3"
    assert main(["predict", "--checkpoint", str(checkpoint_folder), "--json", str(old / "digit.png")]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert len(predictions) == 5 and {p["class"] for p in predictions} <= set("0123456789")


def test_metadata_of_another_format_is_refused_in_one_line(old):
    folder = old / "classify" / "checkpoints" / "3"
    path = folder / "card" / "metadata"
    values = json.loads(path.read_text())
    for stated, message in (
        ("cnx2_jax 2", r"metadata of format 2, and this cnx2_jax reads up to 1; install the version"),
        ("another 1", r"states no format of cnx2_jax \('another 1'\)"),
        (None, r"states no format of cnx2_jax \(None\)"),
    ):
        path.write_text(json.dumps({**values, "format": stated}))
        with pytest.raises(UserError, match=message) as refused:
            checkpoint.read_metadata(folder)
        assert "\n" not in str(refused.value)
    shutil.rmtree(folder / "card")
    with pytest.raises(UserError, match="has no readable metadata"):
        checkpoint.read_metadata(folder)
