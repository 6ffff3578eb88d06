"""The number of devices, and how parameters are spread over them, changes nothing but rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnx2_jax.train import checkpoint
from cnx2_jax.train.observe import TIMED

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
SMALL = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(8,8,16,16)",
    "--config.model.drop_path=0.2",
    "--config.image_size=16",
    "--config.batch_size=16",
    f"--config.total_steps={STEPS}",
    "--config.log_steps=1",
    "--config.optimizer.warmup_epochs=0.05",
]
TASKS = {
    "pretrain": ["configs/pretrain.py:digits"],
    # Mixing takes images from other devices, and from other parts of an accumulated batch.
    "classify": [
        "configs/finetune.py:digits",
        "--config.mixup=0.8",
        "--config.cutmix=1.0",
        "--config.optimizer.base_learning_rate=2e-3",
    ],
}

RUNS: dict[str, tuple] = {
    "8": (8,),
    "2x4": (8, "--config.mesh.data=2", "--config.mesh.fsdp=4"),
    "1x8": (8, "--config.mesh.data=1", "--config.mesh.fsdp=8"),
    "accumulated": (2, "--config.accumulation_steps=4"),
}


def train(task, workdir, devices, *overrides):
    command = [sys.executable, "-m", "cnx2_jax.cli", "train", "--workdir", workdir, "--config", *TASKS[task]]
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [*map(str, command), *SMALL, *overrides], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"on {devices} cpu device(s)" in done.stderr
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS + 1
    # On this process's one device, whatever it was saved from.
    params = checkpoint.read_params(workdir / "checkpoints" / str(STEPS))
    rows = [{k: v for k, v in row.items() if k != "split" and not TIMED.fullmatch(k)} for row in rows]
    return rows, {name: np.asarray(value) for name, value in params.items()}


@pytest.mark.parametrize("task", TASKS)
def test_metrics_and_parameters_do_not_depend_on_the_devices(task, tmp_path):
    expected_rows, expected = train(task, tmp_path / "1", 1)
    for name, arguments in RUNS.items():
        if task == "classify" and name in ("8", "1x8"):
            continue  # says nothing that 2x4 does not
        rows, params = train(task, tmp_path / name, *arguments)
        assert params.keys() == expected.keys()
        for row, other in zip(rows, expected_rows, strict=True):
            assert row == pytest.approx(other, rel=3e-5, abs=1e-5), name
        for path, value in expected.items():
            np.testing.assert_allclose(params[path], value, rtol=0, atol=1e-5, err_msg=f"{name} {path}")
