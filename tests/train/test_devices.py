"""The number of devices, and how parameters are spread over them, changes nothing but rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cnx2_jax.checkpoints import checkpoint
from cnx2_jax.cli import main
from cnx2_jax.observe.timing import TIMED

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("compile_quickly")]

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
# Runs in one process, which takes longer to start than they do. A line is a run: the number of TPU slices
# that the devices stand for, and the arguments of the command.
PROGRAM = """
import json, sys
from cnx2_jax.cli import main
from cnx2_jax.train import sharding

failed = False
for line in sys.stdin:
    slices, arguments = json.loads(line)
    sharding.slice_of = lambda device: device.id % slices
    failed |= bool(main(arguments))
sys.exit(failed)
"""
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

MESHES = {
    "8": [],
    "2x4": ["--config.mesh.data=2", "--config.mesh.fsdp=4"],
    "1x8 accumulated": ["--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.accumulation_steps=2"],
    "slices accumulated": [
        "--config.mesh.data=2",
        "--config.mesh.fsdp=4",
        "--config.accumulation_steps=2",
    ],
}
# Few, because each is traced and compiled for eight devices: every mesh, and accumulation with each task.
RUNS = [
    *(("pretrain", mesh) for mesh in ("8", "2x4", "1x8 accumulated")),
    ("classify", "slices accumulated"),
]


def words(task, mesh, workdir):
    return ["train", "--workdir", str(workdir), "--config", *TASKS[task], *SMALL, *mesh]


def outcome(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS + 1
    # On this process's one device, whatever it was saved from.
    params = checkpoint.read_params(workdir / "checkpoints" / str(STEPS))
    rows = [{k: v for k, v in row.items() if k != "split" and not TIMED.fullmatch(k)} for row in rows]
    return rows, {name: np.asarray(value) for name, value in params.items()}


@pytest.fixture(scope="module")
def eight(tmp_path_factory, compile_quickly):
    """The folder of all runs on eight devices."""
    folder = tmp_path_factory.mktemp("eight")
    lines = [
        json.dumps([2 if mesh.startswith("slices") else 1, words(task, MESHES[mesh], folder / task / mesh)])
        for task, mesh in RUNS
    ]
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input="\n".join(lines),
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("on 8 cpu device(s)") == len(RUNS)
    return folder


@pytest.fixture(scope="module", params=TASKS)
def one(request, tmp_path_factory, compile_quickly):
    """A task and its outcome on one device."""
    workdir = tmp_path_factory.mktemp("one") / request.param
    assert main(words(request.param, [], workdir)) == 0
    return request.param, *outcome(workdir)


def check_evaluation(row, other, mesh):
    """Equal but for rounding, which decides about an image whose two best classes are equally likely."""
    for name in row:
        near = {"abs": 1.5 / 359} if "accuracy" in name else {"rel": 3e-5, "abs": 1e-5}
        assert row[name] == pytest.approx(other[name], **near), (mesh, name)
    assert row.keys() == other.keys()


def test_metrics_and_parameters_do_not_depend_on_the_devices(eight, one):
    task, expected_rows, expected = one
    for mesh in (mesh for of, mesh in RUNS if of == task):
        rows, params = outcome(eight / task / mesh)
        assert params.keys() == expected.keys()
        for row, other in zip(rows[:-1], expected_rows[:-1], strict=True):
            assert row == pytest.approx(other, rel=3e-5, abs=1e-5), mesh
        check_evaluation(rows[-1], expected_rows[-1], mesh)
        for path, value in expected.items():
            np.testing.assert_allclose(params[path], value, rtol=0, atol=1e-5, err_msg=f"{mesh} {path}")
