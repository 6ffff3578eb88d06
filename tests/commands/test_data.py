"""`cnx2 data`: its output, its sheet, and its errors."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cnx2_jax.cli import main
from cnx2_jax.commands import data
from cnx2_jax.observe.grid import GAP, HEADER, LEAST_SIDE

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = ["--config.image_size=16", "--seconds", "0"]


def run(*arguments):
    try:
        return main(["data", *map(str, arguments)])
    except SystemExit as end:
        return end.code


def test_sheet_of_mixed_digits(tmp_path, capfd):
    out = tmp_path / "new" / "sheet.png"
    mixed = ["--config.mixup=0.8", "--config.label_smoothing=0.1", "--rows", 2]
    assert run("--config", f"{CONFIGS / 'finetune.py'}:digits", "--out", out, *DIGITS, *mixed) == 0
    captured = capfd.readouterr()
    result = json.loads(captured.out)
    assert result == {"num_train": 1438, "num_val": 359, "classes": 10, "sheet": str(out)}
    lines = captured.err.splitlines()
    assert lines[0].startswith("train: 1,438 images, 10 classes of 139 to 146 images, median 144 (1: 146,")
    assert lines[1] == "  of 1,000 of them: heights 8 to 8, median 8; widths 8 to 8, median 8"
    assert [line[:5] for line in lines[5:9]] == ["yes  "] * 4
    side = 16 * -(-LEAST_SIDE // 16)
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (GAP + 2 * (side + HEADER + GAP), GAP + data.COLUMNS * (side + GAP), 3)


def test_sheet_of_a_folder_for_pretraining_beginning_at_a_step(tmp_path, capfd):
    for index in range(12):
        noise = np.random.default_rng(index).integers(0, 256, (40 + index, 50, 3), np.uint8)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(noise).save(tmp_path / "images" / f"{index}.jpg")
    config = ["--config", f"{CONFIGS / 'pretrain.py'}:atto", f"--config.data.root={tmp_path / 'images'}"]
    small = ["--config.image_size=64", "--config.batch_size=8", "--seconds", 0, "--rows", 1]
    sheets = {}
    for name, step in (("a", 0), ("b", 5)):
        assert run(*config, *small, "--step", step, "--out", tmp_path / f"{name}.png") == 0
        sheets[name] = (tmp_path / f"{name}.png").read_bytes()
    assert sheets["a"] != sheets["b"]
    assert "train: 11 images, 0 classes" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}/file.png"], "{tmp}/file.png' exists already; nothing was overwritten"),
        (["--out", "{tmp}/x.docx"], "{tmp}/x.docx' does not end in the suffix of an image format"),
        (["--out", "{tmp}/file.png/x.png"], "cannot write '{tmp}/file.png/x.png'"),
        (["--out", "{tmp}/x.png", "--rows", "0"], "--rows 0 must be 1 to 100"),
        (["--out", "{tmp}/x.png", "--step", "-1"], "--step -1 at least 0"),
        (
            ["--out", "{tmp}/x.png", "--config.data.augment=rnd"],
            "unknown data.augment 'rnd'; did you mean 'rand'",
        ),
        (["--out", "{tmp}/x.png", "--config.data.source=digit"], "did you mean 'digits'"),
        (["--out", "{tmp}/x.png", "--config.data.unreadable=ignore"], "unknown data.unreadable 'ignore'"),
        (["--out", "{tmp}/x.png", "--config.data.random_erasing=2"], "data.random_erasing 2"),
    ],
)
def test_mistakes(tmp_path, capfd, arguments, message):
    (tmp_path / "file.png").write_text("mine")
    config = f"{CONFIGS / 'finetune.py'}:digits"
    assert run("--config", config, *DIGITS, *(word.format(tmp=tmp_path) for word in arguments)) == 2
    captured = capfd.readouterr()
    assert message.format(tmp=tmp_path) in captured.err.splitlines()[-1]
    assert captured.out == "" and (tmp_path / "file.png").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["file.png"]
