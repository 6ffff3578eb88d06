"""metrics.jsonl, pictures and TensorBoard, of a new and of a resumed run."""

import json

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnx2_jax.data.tensorflow import tf
from cnx2_jax.observe import progress
from cnx2_jax.observe.progress import watched
from cnx2_jax.observe.report import Report, read_evaluations, read_metrics


@pytest.fixture
def report(tmp_path):
    """Opens reports on one workdir and closes them at the end."""
    opened = []

    def open_report(start_step=0, total_steps=10):
        opened.append(Report(tmp_path, start_step=start_step, total_steps=total_steps, batch_size=4))
        return opened[-1]

    yield open_report
    for each in opened:
        each.close()


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_on_disk_at_once(report, tmp_path):
    ours = report()
    ours.log(2, "train", {"loss": 0.5, "images_per_sec": 1.0})
    assert rows(tmp_path) == [{"step": 2, "split": "train", "loss": 0.5, "images_per_sec": 1.0}]
    ours.log(2, "val", {"accuracy": 0.25})
    assert rows(tmp_path)[1:] == [{"step": 2, "split": "val", "accuracy": 0.25}]
    assert read_metrics(tmp_path / "metrics.jsonl") == rows(tmp_path)


def test_values_keep_every_digit(report, tmp_path):
    value = float(np.float32(0.1))
    report().log(1, "train", {"loss": value})
    assert rows(tmp_path)[0]["loss"] == value


def test_evaluations_are_read_up_to_a_step(report, tmp_path):
    ours, path = report(), tmp_path / "metrics.jsonl"
    assert read_evaluations(path, 2) == []
    ours.log(2, "train", {"loss": 1.0})
    assert read_evaluations(path, 2) == []
    ours.log(2, "val", {"loss": 0.5, "accuracy": 0.25})
    ours.log(4, "val", {"loss": 0.4})
    first = {"step": 2, "loss": 0.5, "accuracy": 0.25}
    assert read_evaluations(path, 1) == []
    assert read_evaluations(path, 3) == [first]
    assert read_evaluations(path, 4) == [first, {"step": 4, "loss": 0.4}]
    report(start_step=1)  # which drops the later rows
    assert read_evaluations(path, 4) == []


def test_rows_after_the_step_to_go_on_from_are_dropped(report, tmp_path):
    first = report()
    for step in range(1, 6):
        first.log(step, "train", {"loss": float(step)})
    first.log(3, "val", {"loss": 0.3})
    first.log(5, "val", {"loss": 0.5})
    first.close()
    second = report(start_step=3)
    assert [(row["step"], row["split"]) for row in rows(tmp_path)] == [
        (1, "train"),
        (2, "train"),
        (3, "train"),
        (3, "val"),
    ]
    second.log(4, "train", {"loss": 4.0})
    assert rows(tmp_path)[-1] == {"step": 4, "split": "train", "loss": 4.0}


@pytest.mark.parametrize("end", ['{"step": 2, "split": "tr', "{", '{"step": 2, "split": "train", "loss":'])
def test_a_line_that_a_killed_process_left_is_dropped(report, tmp_path, end):
    first = report()
    first.log(1, "train", {"loss": 1.0})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(end)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "split": "train", "loss": 1.0}]
    report(start_step=5).log(6, "train", {"loss": 6.0})
    assert [row["step"] for row in rows(tmp_path)] == [1, 6]


def test_no_file_is_no_rows(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_pictures_are_files(report, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    ours = report()
    ours.picture(7, "reconstructions", image)
    ours.picture(12, "reconstructions", image[::-1])
    assert sorted(path.name for path in (tmp_path / "reconstructions").iterdir()) == [
        "00000007.png",
        "00000012.png",
    ]
    np.testing.assert_array_equal(Image.open(tmp_path / "reconstructions" / "00000007.png"), image)


def test_tensorboard_reads_scalars_and_pictures(report, tmp_path):
    ours = report()
    for step in (1, 2):
        ours.log(step, "train", {"loss": 1 / step, "learning_rate": 0.1 * step})
    ours.log(2, "val", {"loss": 0.25})
    image = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    ours.picture(2, "reconstructions", image)
    ours.close()

    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    assert set(events.Tags()["tensors"]) == {
        "train/loss",
        "train/learning_rate",
        "val/loss",
        "reconstructions",
    }
    points = [
        (event.step, float(tf.make_ndarray(event.tensor_proto))) for event in events.Tensors("train/loss")
    ]
    assert points == [(1, 1.0), (2, 0.5)]
    _, _, png = tf.make_ndarray(events.Tensors("reconstructions")[0].tensor_proto)
    np.testing.assert_array_equal(tf.io.decode_png(png), image)


def test_the_last_line_tells_throughput(report, capsys):
    ours = report()
    ours.log(10, "train", {"loss": 0.5, "images_per_sec": 12.0})
    assert "step 10/10 (100%), loss 0.5, 12 images/s" in capsys.readouterr().err


def test_watched_batches_pass_and_are_told_of_only_if_they_take_long(monkeypatch, capsys):
    batches = [{"mask": np.ones(4, bool)} for _ in range(3)]
    assert all(a is b for a, b in zip(watched(batches, 10), batches, strict=True))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    assert len(list(watched(batches, 10))) == 3
    lines = ["4 of 10 images", "8 of 10 images", "10 of 10 images"]  # padding is no image
    assert capsys.readouterr() == ("", "".join(f"{line}\n" for line in lines))
