"""Several real processes and devices: evaluation counts each image once, BatchNorm sees all of a batch."""

import json
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from forked import Process

from cnx2_jax.data.images import preprocess_files
from cnx2_jax.data.tensorflow import tf
from cnx2_jax.models.pixels import normalise

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("compile_quickly")]

# Batches of 48 of 359 digits and of 8 of 20 scenes: neither number is a multiple of the batch or of 8.

PROGRAM = """
import json, sys
import jax
address, count, index = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if count > 1:
    jax.distributed.initialize(address, count, index)
from tests_helper import TASKS, random_model, running_averages
from cnx2_jax.train import sharding
from cnx2_jax.models.state import merge, split

found = {"devices": jax.device_count(), "processes": jax.process_count()}
for name, make in TASKS.items():
    task = make()
    mesh = sharding.make_mesh(task.config.mesh)
    graph, params = split(random_model(task))
    model = merge(graph, sharding.put_params(params, mesh))
    batches = task.data.eval_batches(process_index=jax.process_index(), process_count=jax.process_count())
    found[name] = task.evaluate(model, sharding.put_batches(batches, mesh))
found["statistics"] = running_averages(mesh)
print(json.dumps(found))
"""

HELPER = """
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from cnx2_jax.configuration import load_config, override
from cnx2_jax.recipes import use_digits
from cnx2_jax.models.layers import BatchNorm
from cnx2_jax.models.state import merge, split
from cnx2_jax.tasks import defaults, make_task

NARROW = ["--config.model.depths=(1,1,1,1)", "--config.model.dims=(8,8,16,16)"]


def classify():
    config = defaults("classify")
    use_digits(config)
    config.image_size = (16, 16)
    return make_task(override(config, [*NARROW, "--config.batch_size=48"]))


def segment():
    options = ["batch_size=8", "data.source=scenes:20", "model.channels=8", "model.auxiliary_channels=4"]
    return make_task(load_config("segment:digits", [*NARROW, *(f"--config.{each}" for each in options)]))


TASKS = {"classify": classify, "segment": segment}


def random_model(task):
    graph, like = split(nnx.eval_shape(lambda: task.init(nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draws = {name: 0.3 * rng.standard_normal(leaf.shape) for name, leaf in sorted(like.items())}
    draws |= {name: np.exp(value) for name, value in draws.items() if name.endswith(".var")}
    return merge(graph, {name: jnp.float32(value) for name, value in draws.items()})


def images():
    # Each image is brighter than the one before, so no part of them has the statistics of all.
    return np.random.default_rng(0).normal(np.arange(16)[:, None, None], 1, (16, 5, 3)).astype(np.float32)


def running_averages(mesh):
    def averages(x):
        norm = BatchNorm(3, dtype=jnp.float32, momentum=1)
        norm(x, train=True)
        return norm.mean[...], norm.var[...]

    split_batch = PartitionSpec(mesh.axis_names)
    whole = jax.make_array_from_callback((16, 5, 3), NamedSharding(mesh, split_batch), images().__getitem__)
    on_each = jax.shard_map(averages, mesh=mesh, in_specs=split_batch, out_specs=PartitionSpec())
    return [np.asarray(each).tolist() for each in jax.jit(on_each)(whole)]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "tests_helper.py").write_text(HELPER)
    (folder / "program.py").write_text(PROGRAM)
    return folder


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def evaluate(folder, devices, processes) -> list[dict]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    address = f"127.0.0.1:{free_port()}"
    running = [
        Process([folder / "program.py", address, processes, index], XLA_FLAGS=flags)
        for index in range(processes)
    ]
    results = []
    for process in running:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.fixture(scope="module")
def helper():
    namespace: dict = {}
    exec(HELPER, namespace)
    return namespace


@pytest.fixture(scope="module")
def accuracies(helper, folder):
    """Accuracies of a plain NumPy loop over the validation images of digits, one at a time."""
    task = helper["classify"]()
    model = helper["random_model"](task)
    forward = jax.jit(lambda images: model(normalise(images, task.config.data.mean, task.config.data.std)))
    correct, top5, count = 0, 0, 0
    for index in range(task.data.num_val):
        record = task.data.val.read(index)
        path = folder / "image.png"
        path.write_bytes(record["image"].numpy())
        image = preprocess_files([path], task.config)
        logits = np.asarray(forward(jnp.asarray(image)))[0]
        order = np.argsort(-logits, kind="stable")
        label = int(record["label"])
        correct += order[0] == label
        top5 += label in order[:5]
        count += 1
    assert count == 359 and 0 < correct < top5 < count
    return {"accuracy": correct / count, "top5_accuracy": top5 / count}


@pytest.fixture(scope="module")
def overlaps(helper):
    """Scores of segmentation from a plain loop over the scenes and their classes."""
    task = helper["segment"]()
    model = helper["random_model"](task)
    scenes = [task.data.val.read(index) for index in range(task.data.num_val)]
    images = np.stack([tf.io.decode_png(scene["image"]) for scene in scenes])
    truth = np.stack([tf.io.decode_png(scene["map"])[..., 0] for scene in scenes])
    segment = jax.jit(lambda image: model.segment(task.normalised(image, jnp.array([[64, 64]]))))
    found = np.stack([np.asarray(segment(image[None]))[0].argmax(-1) for image in images])
    classes = range(len(task.class_names))
    both, either = (
        np.array([op(truth == c, found == c).sum() for c in classes])
        for op in (np.logical_and, np.logical_or)
    )
    assert len(scenes) == 20 and 0 < both.sum() < truth.size
    return {
        "miou": np.mean(both[either > 0] / either[either > 0]),
        "mean_accuracy": np.mean([both[c] / (truth == c).sum() for c in classes]),
        "pixel_accuracy": both.sum() / truth.size,
    }


@pytest.mark.parametrize(("devices", "processes"), [(1, 1), (8, 1), (1, 2)])
def test_scores_are_a_plain_loops_to_the_last_digit(folder, helper, accuracies, overlaps, devices, processes):
    """And BatchNorm's running averages are those of the whole batch."""
    results = evaluate(folder, devices, processes)
    assert len(results) == processes
    for result in results:
        assert result["devices"] == devices * processes and result["processes"] == processes
        for name, value in accuracies.items():
            assert result["classify"][name] == value, name
        for name, value in overlaps.items():
            assert result["segment"][name] == value, name
        values = helper["images"]().reshape(-1, 3).astype(np.float64)
        np.testing.assert_allclose(result["statistics"], [values.mean(0), values.var(0, ddof=1)], rtol=1e-5)
