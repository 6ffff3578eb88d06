"""TensorBoard's event files: equal to those of TensorFlow, and raise errors where they happen."""

import io
import resource

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cnx2_jax.data.tensorflow import tf
from cnx2_jax.errors import RunError
from cnx2_jax.observe.report import Report
from cnx2_jax.observe.tensorboard import EventWriter

SCALARS = [
    ("train/loss", 1, 0.1),
    ("train/loss", 2, 1e-30),
    ("val/accuracy", 2, 1.0),
    ("val/loss", 7, np.inf),
]
IMAGE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)


def read(folder):
    """Everything that TensorBoard reads: (tag, step, plugin, values), with decoded images."""
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    found = []
    for tag in events.Tags()["tensors"]:
        metadata = events.SummaryMetadata(tag)
        for event in events.Tensors(tag):
            values = tf.make_ndarray(event.tensor_proto)
            if values.dtype == object:
                width, height, png = values
                values = [width, height, tf.io.decode_png(png).numpy().tolist()]
            else:
                values = [values.dtype.name, values.shape, values.tolist()]
            found.append((tag, event.step, metadata.SerializeToString(), values))
    return found


def test_files_hold_what_tensorflow_writes(tmp_path):
    ours = EventWriter(tmp_path / "ours")
    theirs = tf.summary.create_file_writer(str(tmp_path / "theirs"))
    for tag, step, value in SCALARS:
        ours.scalar(tag, value, step)
        with theirs.as_default():
            tf.summary.scalar(tag, value, step=step)
    png = io.BytesIO()
    Image.fromarray(IMAGE).save(png, "PNG")
    ours.image("reconstructions", png.getvalue(), 20, 12, 7)
    with theirs.as_default():
        tf.summary.image("reconstructions", IMAGE[None], step=7)
    ours.close()
    theirs.close()
    found = read(tmp_path / "ours")
    assert len(found) == len(SCALARS) + 1
    assert found == read(tmp_path / "theirs")


def test_flushed_events_can_be_read_while_the_file_is_open(tmp_path):
    writer = EventWriter(tmp_path)
    writer.scalar("loss", 0.5, 3)
    writer.flush()
    assert [(tag, step) for tag, step, _, _ in read(tmp_path)] == [("loss", 3)]
    writer.close()


def test_writers_of_one_second_have_files_of_their_own(tmp_path):
    for step in (1, 2):
        writer = EventWriter(tmp_path)
        writer.scalar("loss", step, step)
        writer.close()
    assert [step for _, step, _, _ in read(tmp_path)] == [1, 2]


@pytest.fixture
def limit_file_size():
    """A function that limits the size of this process's files, which acts like a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_of_the_log_that_meets_it(tmp_path, limit_file_size):
    report = Report(tmp_path, start_step=0, total_steps=4, batch_size=1)
    limit_file_size(200)  # a row of metrics.jsonl is shorter, its events are longer
    message = r"cannot write to workdir .*: File too large; .*same command resumes"
    with pytest.raises(RunError, match=message) as raised:
        report.log(1, "train", {"loss": 1.0, "grad_norm": 2.0, "learning_rate": 0.1})
    assert "\n" not in str(raised.value)
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    with pytest.raises(RunError, match="cannot write to workdir"):
        report.close()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "tensorboard").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write to workdir .*: File exists"):
        Report(tmp_path, start_step=0, total_steps=4, batch_size=1)
