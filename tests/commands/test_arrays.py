"""Twelve bands of 16 bits, oblong, three of them chosen by name: every command, and a run that resumes."""

import json
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image

from cnx2_jax import cli
from cnx2_jax.checkpoints import checkpoint

BANDS = tuple(f"B{number:02}" for number in range(1, 13))
TINY = {
    "image_size": "(32,64)",
    "batch_size": 4,
    "total_steps": 4,
    "log_steps": 1,
    "checkpoint_steps": 2,
    "keep_checkpoints": 5,
    "model.variant": "custom",
    "model.depths": "(1,1,1,1)",
    "model.dims": "(4,4,8,8)",
    "model.in_chans": 3,
    "model.patch_size": 2,
    "model.drop_path": 0.0,
    "data.augment": "",
    "data.root": "",
    "data.source": "arrays",
    "data.use_bands": "B08,B04,B03",
    "ema_decay": 0.0,
}


def keys(**changes):
    return [f"--config.{name}={value}" for name, value in changes.items()]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten TIFFs of 40x72 pixels in two classes, which differ in the slope of one band."""
    root = tmp_path_factory.mktemp("bands")
    rng = np.random.default_rng(0)
    for index in range(10):
        image = rng.integers(200, 9000, (40, 72, len(BANDS))).astype(np.uint16)
        image[..., 7] += (np.arange(72) * (20 if index % 2 else -20) + 1500).astype(np.uint16)
        path = root / ("falling", "rising")[index % 2] / f"{index}.tif"
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(path, image, photometric="minisblack", planarconfig="contig")
    return root


@pytest.mark.slow
def test_twelve_bands_from_end_to_end(images, tmp_path, capsys):
    place = {"data.root": images, "data.source": "arrays", "data.bands": ",".join(BANDS)}
    statistics = tmp_path / "bands.json"
    assert run("data", "--config", "pretrain:smoke", "--statistics", statistics, *keys(**place)) == 0
    small = {**TINY, **place, "data.val_fraction": 0.4}
    assert run("train", "--config", "pretrain:smoke", "--workdir", tmp_path / "none", *keys(**small)) == 2
    assert "cnx2 data --config pretrain:tiny --statistics bands.json" in capsys.readouterr().err

    small["data.statistics"] = statistics
    pretrain = {**small, "model.decoder_dim": 8}
    first, second = tmp_path / "first", tmp_path / "second"
    train = ("train", "--config", "pretrain:smoke")
    assert run(*train, "--workdir", first, *keys(**pretrain)) == 0
    shutil.copytree(first, second)
    shutil.rmtree(second / "checkpoints" / "4")  # as if the run had ended after step 2
    (second / "result.json").unlink()
    assert run(*train, "--workdir", second, *keys(**pretrain)) == 0
    straight, resumed = (
        checkpoint.read_params(checkpoint.find(path / "checkpoints" / "4")) for path in (first, second)
    )
    assert all(np.array_equal(resumed[name], straight[name]) for name in straight)

    file = images / "rising" / "1.tif"
    assert run("reconstruct", "--workdir", first, "--out", tmp_path / "grid.png", file) == 0
    assert run("reconstruct", "--workdir", first, "--out", tmp_path / "some.png") == 0

    tuned = tmp_path / "tuned"
    start = keys(**small, init_from=first, mixup=0.0, cutmix=0.0)
    assert run("train", "--config", "finetune:smoke", "--workdir", tuned, *start) == 0
    capsys.readouterr()
    kept = statistics.rename(tmp_path / "moved.json")  # a trained run needs the file no more
    assert run("evaluate", "--workdir", tuned, "--report", tmp_path / "report") == 0
    assert 0 <= json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy"] <= 1
    assert run("predict", "--checkpoint", tuned, "--json", file) == 0
    assert {each["class"] for each in json.loads(capsys.readouterr().out)["predictions"]} == {
        "falling",
        "rising",
    }
    assert run("predict", "--checkpoint", tuned, "--heatmap", tmp_path / "heat", file) == 0
    (picture,) = (tmp_path / "heat").iterdir()
    assert Image.open(picture).mode == "RGB"
    out = tmp_path / "model.safetensors"
    assert run("export", "--checkpoint", tuned, "--format", "stablehlo", "--out", out) == 0
    kept.rename(statistics)

    other = {
        **small,
        "data.use_bands": "",
        "model.in_chans": 12,
        "init_from": tuned,
        "mixup": 0.0,
        "cutmix": 0.0,
    }
    capsys.readouterr()
    assert run("train", "--config", "finetune:smoke", "--workdir", tmp_path / "bad", *keys(**other)) == 2
    assert "set init_bands to mean, tile, map:R,G,B" in capsys.readouterr().err
    mapped = keys(**other, init_bands="map:B08,B04,B03")
    assert run("train", "--config", "finetune:smoke", "--workdir", tmp_path / "all", *mapped) == 0
    stored = checkpoint.read_metadata(checkpoint.find(tmp_path / "all"))["config"]
    assert stored["init_bands"] == "map:B08,B04,B03" and len(stored["data"]["mean"]) == 12

    sheet = (
        "data",
        "--config",
        "finetune:smoke",
        "--out",
        tmp_path / "sheet.png",
        "--rows",
        1,
        "--seconds",
        0,
    )
    assert run(*sheet, *keys(**{**small, "batch_size": 8})) == 0
