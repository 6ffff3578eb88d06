"""A run that is killed and resumed equals one that was left alone, bit for bit.

Real processes, real signals, real checkpoints on disk.
"""

import json
import signal
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked import Process

from cnx2_jax.observe.timing import TIMED

pytestmark = pytest.mark.processes

STEPS = 24
SMALL = [
    "--config.model.depths=(1,1,1,1)",
    "--config.model.dims=(4,8,8,16)",
    "--config.image_size=16",
    "--config.batch_size=16",
    f"--config.total_steps={STEPS}",
    "--config.log_steps=1",
    "--config.checkpoint_steps=6",
    "--config.eval_epochs=0.133",  # every 12 steps
    "--config.optimizer.warmup_epochs=0.05",
    "--config.optimizer.clip_norm=1.0",
    "--config.model.drop_path=0.2",
    "--config.ema_decay=0.9",
    "--config.optimizer.layer_decay=0.8",
]
TASKS = {"pretrain": "configs/pretrain.py:digits", "classify": "configs/finetune.py:digits"}


def start(task, workdir):
    recipe = ["--config", TASKS[task], "--workdir", workdir]
    return Process(["-m", "cnx2_jax.cli", "train", *recipe, *SMALL])


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def wait_until(condition, process):
    for _ in range(150_000):
        if condition() or process.poll() is not None:
            return
        time.sleep(0.002)
    raise AssertionError("nothing happened for five minutes")


def rows(workdir):
    """The rows of metrics.jsonl without the one metric that is a time; a cut last line is none."""
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append({name: value for name, value in row.items() if not TIMED.fullmatch(name)})
    return found


def arrays(workdir):
    """Every array of the last checkpoint, parameters and optimizer state, by path."""
    found = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "opt_state", "ema"):
            tree = checkpointer.restore((workdir / "checkpoints" / str(STEPS) / item).absolute())
            for path, leaf in ocp.utils.to_flat_dict(tree).items():
                found[(item, *path)] = np.asarray(leaf)
    return found


def assert_same_run(workdir, reference):
    assert rows(workdir) == rows(reference)
    ours, theirs = arrays(workdir), arrays(reference)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 100
    for path, value in theirs.items():
        assert value.tobytes() == ours[path].tobytes(), path


@pytest.fixture(scope="module", params=TASKS)
def reference(request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp(f"{request.param}_alone") / "run"
    out, _ = finish(start(request.param, workdir))
    assert json.loads(out.splitlines()[-1])["step"] == STEPS
    found = rows(workdir)
    assert [row["step"] for row in found if row["split"] == "train"] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found if row["split"] == "val"] == [12, 24]
    assert len({row["loss"] for row in found if row["split"] == "train"}) == STEPS
    return request.param, workdir


def test_signals_and_kills_change_nothing(reference, tmp_path):
    task, alone = reference
    workdir = tmp_path / "run"

    def step():
        return max((row["step"] for row in rows(workdir)), default=0)

    def saving():
        return step() > 8 and any(workdir.glob("checkpoints/*tmp*"))

    # In the middle of training, of a save, and between the last update and the end.
    for number, moment in (
        (signal.SIGTERM, lambda: step() >= 3),
        (signal.SIGKILL, lambda: step() >= 6),
        (signal.SIGKILL, saving),
        (signal.SIGINT, lambda: step() >= 16),
        (signal.SIGKILL, lambda: step() >= STEPS),
    ):
        process = start(task, workdir)
        wait_until(moment, process)
        process.send_signal(number)
        if number == signal.SIGKILL:
            process.communicate()
            continue
        out, err = finish(process)
        assert "the same command resumes there" in err
        assert "Traceback" not in err
        assert out == ""  # no final metrics: the run has not ended
    finish(start(task, workdir))
    assert_same_run(workdir, alone)
